// Decode attention over packed rows for five query rows and more of one key-value head (GQA-8, or several tokens at
// once), with 8 x 8 matrix products. Same inputs, outputs and units as kv_attention_lanes, and the same merge.
//
// A simdgroup takes 8 tokens and 8 query rows: S = Q·Kᵀ, then O += P·V. The two elements that a lane holds of a tile are
// (row, column), (row, column + 1), where lane bits b4 b3 b2 b1 b0 give row = b4 b2 b1 and column = b3 b0 0. A product does
// not care in which order its inner axis is summed, so the head axis is dealt out as it lies in memory: index i of tile j of
// group g is value 64·g + 8·i + j, and a lane's values of all eight tiles are 8 neighbours. Codes enter as whole numbers;
// K's scale and bias are applied to the scores, V's scale to the weights, V's bias as one number per row and group.
// S comes out in the layout in which P is needed. No shuffle but those of the softmax and of the group words.
// header: packed_kv
// variant: kv_attention_tiles_segments of kv_attention_tiles with SEGMENTED
#include <metal_simdgroup_matrix>

typedef metal::simdgroup_matrix<float, 8, 8> Tile;

constant constexpr float LOWEST = -1e30f;

// Adds up, or takes the maximum of, the values of the four lanes that hold one row of a tile.
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}
METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}

// kernel: kv_attention_tiles
//   as kv_attention_lanes, with GS = 64, R = 8·M query rows, M = 1 or 2 tiles of them, U times 8 tokens per step
  constexpr int GROUPS = D / 64;
  constexpr int KW = D * KB / 32, VW = D * VB / 32;
  constexpr int KG = KB == 16 ? 0 : GROUPS, VG = VB == 16 ? 0 : GROUPS;
  constexpr int W = KW + VW + KG + VG;
  constexpr int KN = 8 * KB / 32, VN = 8 * VB / 32;            // words of 8 neighbouring values
  constexpr bool EVEN = W % 2 == 0;                            // KW is even: D is a multiple of 64
  static_assert(D % 64 == 0 && KG + VG <= 8, "shape");

  const ushort lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int row = ((lane >> 2) & 4) | ((lane >> 1) & 3);
  const int column = ((lane >> 1) & 4) | ((lane & 1) << 1);
  const int block = threadgroup_position_in_grid.y, blocks = threadgroups_per_grid.y;
  const int n_tokens = dims[0], n_queries = dims[1], capacity = dims[2], n_rows = dims[3], tiles = dims[4];
  const int head = int(threadgroup_position_in_grid.z) / tiles;
  const int first = int(threadgroup_position_in_grid.z) % tiles * (8 * M);
  const int chunk = dims[5];
  const int end = metal::min(n_tokens, (block + 1) * chunk);
  const size_t base = size_t(head) * capacity;

  Tile Q[M][8 * GROUPS], O[M][8 * GROUPS];
  float q_sum[M][GROUPS], v_bias[M][GROUPS], top[M], total[M];
  int seen[M], place[M];
  for (int m = 0; m < M; m++) {
    const int query = metal::min(first + 8 * m + row, n_rows - 1);
    seen[m] = WINDOW ? end : metal::min(end, n_tokens - n_queries + query % n_queries + 1);
    if (WINDOW) {
      place[m] = dims[8] + query % n_queries;
      place[m] -= place[m] < dims[6] + dims[9] ? 0 : dims[9];
    }
    top[m] = LOWEST;
    total[m] = 0;
    for (int g = 0; g < GROUPS; g++) {
      float sum = 0;
      for (int j = 0; j < 8; j++) {
        for (int e = 0; e < 2; e++) {
          const float x = scale[0] * float(q[(size_t(head) * n_rows + query) * D + 64 * g + 8 * (column + e) + j]);
          Q[m][8 * g + j].thread_elements()[e] = x;
          O[m][8 * g + j].thread_elements()[e] = 0;
          sum += x;
        }
      }
      q_sum[m][g] = row_sum(sum);
      v_bias[m][g] = 0;
    }
  }

  for (int t0 = block * chunk + sg * 8 * U; t0 < end; t0 += NSG * 8 * U) {
    float weight[M][U][2];
    uint group_word[U][2], v_word[U][GROUPS][2 * VN];
    for (int u = 0; u < U; u++) {
      // Of Kᵀ a lane holds tokens column, column + 1 at index row; of V token row at indices column, column + 1.
      uint k_word[2][GROUPS][KN];
      for (int e = 0; e < 2; e++) {
        const int t = t0 + 8 * u + column + e;
        const device uint* from = ROW_OF(t);
        for (int g = 0; g < GROUPS; g++) {
          load_words<KN, EVEN>(from + (8 * g + row) * KN, t < end, k_word[e][g]);
        }
        load_words<1, false>(from + KW + VW + row, t < end && row < KG + VG, group_word[u] + e);
      }
      const int t = t0 + 8 * u + row;
      for (int g = 0; g < GROUPS; g++) {
        load_words<2 * VN, EVEN>(ROW_OF(t) + KW + (8 * g + column) * VN, t < end, v_word[u][g]);
      }
      for (int m = 0; m < M; m++) {
        weight[m][u][0] = 0;
        weight[m][u][1] = 0;
      }
      for (int g = 0; g < GROUPS; g++) {
        Tile S[M], K;
        for (int m = 0; m < M; m++) {
          S[m].thread_elements()[0] = 0;
          S[m].thread_elements()[1] = 0;
        }
        for (int j = 0; j < 8; j++) {
          K.thread_elements()[0] = code<KB>(k_word[0][g], j);
          K.thread_elements()[1] = code<KB>(k_word[1][g], j);
          for (int m = 0; m < M; m++) {
            simdgroup_multiply_accumulate(S[m], Q[m][8 * g + j], K, S[m]);
          }
        }
        for (int e = 0; e < 2; e++) {
          float k_scale = 1, k_offset = 0;
          if (KB != 16) {                                      // the lane of this column whose row is g has the word
            const uint word = simd_shuffle(group_word[u][e], ushort((lane & 9) | ((g & 4) << 2) | ((g & 3) << 1)));
            k_scale = low_half(word);
            k_offset = high_half(word);
          }
          for (int m = 0; m < M; m++) {
            weight[m][u][e] += k_scale * S[m].thread_elements()[e] + k_offset * q_sum[m][g];
          }
        }
      }
    }
    for (int m = 0; m < M; m++) {                              // the softmax of 8·U tokens, one rescaling for them
      float most = LOWEST;
      for (int u = 0; u < U; u++) {
        for (int e = 0; e < 2; e++) {
          const int t = t0 + 8 * u + column + e;
          if (t >= seen[m] || (WINDOW && !in_window(t, place[m], dims[6], dims[7], dims[9]))) {
            weight[m][u][e] = LOWEST;
          }
          most = metal::max(most, weight[m][u][e]);
        }
      }
      most = metal::max(top[m], row_max(most));
      const float shrink = metal::fast::exp2(top[m] - most);
      top[m] = most;
      total[m] *= shrink;
      for (int g = 0; g < GROUPS; g++) {
        v_bias[m][g] *= shrink;
      }
      for (int j = 0; j < 8 * GROUPS; j++) {
        O[m][j].thread_elements()[0] *= shrink;
        O[m][j].thread_elements()[1] *= shrink;
      }
      for (int u = 0; u < U; u++) {
        for (int e = 0; e < 2; e++) {
          weight[m][u][e] = weight[m][u][e] == LOWEST ? 0.0f : metal::fast::exp2(weight[m][u][e] - most);
          total[m] += weight[m][u][e];
        }
      }
    }
    for (int u = 0; u < U; u++) {
      for (int g = 0; g < GROUPS; g++) {
        Tile P[M], V;
        for (int e = 0; e < 2; e++) {
          float v_scale = 1, v_offset = 0;
          if (VB != 16) {
            const int at = KG + g;
            const uint word = simd_shuffle(group_word[u][e], ushort((lane & 9) | ((at & 4) << 2) | ((at & 3) << 1)));
            v_scale = low_half(word);
            v_offset = high_half(word);
          }
          for (int m = 0; m < M; m++) {
            P[m].thread_elements()[e] = weight[m][u][e] * v_scale;
            v_bias[m][g] += weight[m][u][e] * v_offset;
          }
        }
        for (int j = 0; j < 8; j++) {
          V.thread_elements()[0] = code<VB>(v_word[u][g], j);
          V.thread_elements()[1] = code<VB>(v_word[u][g] + VN, j);
          for (int m = 0; m < M; m++) {
            simdgroup_multiply_accumulate(O[m][8 * g + j], P[m], V, O[m][8 * g + j]);
          }
        }
      }
    }
  }

  // The simdgroups of the threadgroup, one tile of query rows after the other.
  threadgroup float sg_acc[NSG][8][D], sg_top[NSG][8], sg_total[NSG][8];
  for (int m = 0; m < M; m++) {
    const float sum = row_sum(total[m]);
    for (int g = 0; g < GROUPS; g++) {
      const float offset = row_sum(v_bias[m][g]);
      for (int j = 0; j < 8; j++) {
        for (int e = 0; e < 2; e++) {
          sg_acc[sg][row][64 * g + 8 * (column + e) + j] = O[m][8 * g + j].thread_elements()[e] + offset;
        }
      }
    }
    if (column == 0) {
      sg_top[sg][row] = top[m];
      sg_total[sg][row] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = sg * 32 + lane; i < 8 * D; i += NSG * 32) {
      const int r = i / D, d = i % D;
      const int query = first + 8 * m + r;
      if (query < n_rows) {
        float most = LOWEST, value = 0, weights = 0;
        for (int s = 0; s < NSG; s++) {
          most = metal::max(most, sg_top[s][r]);
        }
        for (int s = 0; s < NSG; s++) {
          const float shrink = metal::fast::exp2(sg_top[s][r] - most);
          value += shrink * sg_acc[s][r][d];
          weights += shrink * sg_total[s][r];
        }
        const size_t at = (size_t(head) * n_rows + query) * blocks + block;
        part_o[at * D + d] = value;
        if (d == 0) {
          part_m[at] = most;
          part_l[at] = weights;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
