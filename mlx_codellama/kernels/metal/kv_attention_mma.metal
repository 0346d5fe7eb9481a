// Decode attention over packed rows for five query rows and more of one key-value head, with CUDA's 16 x 8 x 8 products.
// Same inputs, outputs and units as kv_attention_lanes, and the same merge. Metal has kv_attention_tiles for this; the Metal
// text of this kernel is what CUDA's is translated from, and what the simulator runs.
//
// A simdgroup takes 8 tokens and 16 query rows: S = Q·Kᵀ, then O += P·V. As in the tiles, inner axes are dealt out as they lie in
// memory (matrix.metal has the layout; high = lane / 4, low = lane % 4):
//   Q·Kᵀ  inner index low, low + 4 of product i of group g is value 64·g + 16·low + 2·i, and the next one
//   P·V   inner index low, low + 4 is token 2·low, 2·low + 1, as S comes out; column n of product j is value 64·g + 8·n + j
// Codes enter as whole numbers and queries as they are: both are exact in the 11 bits that the products take. Weights, with V's
// scale, are rounded to them.
// header: packed_kv
// variant: kv_attention_mma_segments of kv_attention_mma with SEGMENTED
// header: matrix

constant constexpr float LOWEST = -1e30f;

// Adds up, or takes the maximum of, the values of the four lanes that hold one row.
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(2));
}
METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(2)));
}

// kernel: kv_attention_mma
//   as kv_attention_lanes, with GS = 64, R = 16 query rows, U times 8 tokens per step
  constexpr int GROUPS = D / 64;
  constexpr int KW = D * KB / 32, VW = D * VB / 32;
  constexpr int KG = KB == 16 ? 0 : GROUPS, VG = VB == 16 ? 0 : GROUPS;
  constexpr int W = KW + VW + KG + VG;
  constexpr int KN = 16 * KB / 32, VN = 8 * VB / 32;           // words of a lane's 16 values of K, and 8 of V
  constexpr bool EVEN = W % 2 == 0;                            // KW is even: D is a multiple of 64
  static_assert(D % 64 == 0 && KG + VG <= 4, "shape");

  const ushort lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int high = lane / 4, low = lane % 4;
  const int block = threadgroup_position_in_grid.y, blocks = threadgroups_per_grid.y;
  const int n_tokens = dims[0], n_queries = dims[1], capacity = dims[2], n_rows = dims[3], tiles = dims[4];
  const int head = int(threadgroup_position_in_grid.z) / tiles;
  const int first = int(threadgroup_position_in_grid.z) % tiles * 16;
  const int chunk = dims[5];
  const int end = metal::min(n_tokens, (block + 1) * chunk);
  const size_t base = size_t(head) * capacity;

  // Of everything [2] is for the rows high and high + 8.
  float Q[2][GROUPS][16], O[GROUPS][8][4], q_sum[2][GROUPS], v_bias[2][GROUPS], top[2], total[2];
  int seen[2], place[2];
  for (int h = 0; h < 2; h++) {
    const int query = metal::min(first + 8 * h + high, n_rows - 1);
    seen[h] = WINDOW ? end : metal::min(end, n_tokens - n_queries + query % n_queries + 1);
    if (WINDOW) {
      place[h] = dims[8] + query % n_queries;
      place[h] -= place[h] < dims[6] + dims[9] ? 0 : dims[9];
    }
    top[h] = LOWEST;
    total[h] = 0;
    for (int g = 0; g < GROUPS; g++) {
      float sum = 0;
      for (int i = 0; i < 16; i++) {
        Q[h][g][i] = float(q[(size_t(head) * n_rows + query) * D + 64 * g + 16 * low + i]);
        sum += Q[h][g][i];
      }
      q_sum[h][g] = row_sum(sum);
      v_bias[h][g] = 0;
    }
  }
  for (int g = 0; g < GROUPS; g++) {
    for (int j = 0; j < 8; j++) {
      for (int i = 0; i < 4; i++) {
        O[g][j][i] = 0;
      }
    }
  }

  for (int t0 = block * chunk + sg * 8 * U; t0 < end; t0 += NSG * 8 * U) {
    float weight[U][2][2];                                     // of rows high, high + 8 and tokens 2 low, 2 low + 1
    uint group_word[U], v_word[U][GROUPS][2][VN];
    for (int u = 0; u < U; u++) {
      const int t = t0 + 8 * u + high;
      const device uint* row = ROW_OF(t);
      uint k_word[GROUPS][KN];
      for (int g = 0; g < GROUPS; g++) {
        load_words<KN, EVEN>(row + (4 * g + low) * KN, t < end, k_word[g]);
      }
      load_words<1, false>(row + KW + VW + low, t < end && low < KG + VG, group_word + u);
      for (int e = 0; e < 2; e++) {
        const int from = t0 + 8 * u + 2 * low + e;
        for (int g = 0; g < GROUPS; g++) {
          load_words<VN, EVEN>(ROW_OF(from) + KW + (8 * g + high) * VN, from < end, v_word[u][g][e]);
        }
        weight[u][0][e] = 0;
        weight[u][1][e] = 0;
      }
      for (int g = 0; g < GROUPS; g++) {
        float S[4] = {0, 0, 0, 0};
        for (int i = 0; i < 16; i += 2) {
          multiply_16x8x8(S, Q[0][g][i], Q[1][g][i], Q[0][g][i + 1], Q[1][g][i + 1], code<KB>(k_word[g], i),
                          code<KB>(k_word[g], i + 1), lane);
        }
        for (int e = 0; e < 2; e++) {
          float k_scale = 1, k_offset = 0;
          if (KB != 16) {
            const uint word = simd_shuffle(group_word[u], ushort(4 * (2 * low + e) + g));
            k_scale = low_half(word);
            k_offset = high_half(word);
          }
          for (int h = 0; h < 2; h++) {
            weight[u][h][e] += k_scale * S[2 * h + e] + k_offset * q_sum[h][g];
          }
        }
      }
    }
    for (int h = 0; h < 2; h++) {                              // the softmax of 8·U tokens, one rescaling for them
      float most = LOWEST;
      for (int u = 0; u < U; u++) {
        for (int e = 0; e < 2; e++) {
          const int t = t0 + 8 * u + 2 * low + e;
          const bool sees = t < seen[h] && (!WINDOW || in_window(t, place[h], dims[6], dims[7], dims[9]));
          weight[u][h][e] = sees ? scale[0] * weight[u][h][e] : LOWEST;
          most = metal::max(most, weight[u][h][e]);
        }
      }
      most = metal::max(top[h], row_max(most));
      const float shrink = metal::fast::exp2(top[h] - most);
      top[h] = most;
      total[h] *= shrink;
      for (int g = 0; g < GROUPS; g++) {
        v_bias[h][g] *= shrink;
        for (int j = 0; j < 8; j++) {
          O[g][j][2 * h] *= shrink;
          O[g][j][2 * h + 1] *= shrink;
        }
      }
      for (int u = 0; u < U; u++) {
        for (int e = 0; e < 2; e++) {
          weight[u][h][e] = weight[u][h][e] == LOWEST ? 0.0f : metal::fast::exp2(weight[u][h][e] - most);
          total[h] += weight[u][h][e];
        }
      }
    }
    for (int u = 0; u < U; u++) {
      for (int g = 0; g < GROUPS; g++) {
        float P[2][2];
        for (int e = 0; e < 2; e++) {
          float v_scale = 1, v_offset = 0;
          if (VB != 16) {
            const uint word = simd_shuffle(group_word[u], ushort(4 * (2 * low + e) + KG + g));
            v_scale = low_half(word);
            v_offset = high_half(word);
          }
          for (int h = 0; h < 2; h++) {
            P[h][e] = to_tf32(weight[u][h][e] * v_scale);
            v_bias[h][g] += weight[u][h][e] * v_offset;
          }
        }
        for (int j = 0; j < 8; j++) {
          multiply_16x8x8(O[g][j], P[0][0], P[1][0], P[0][1], P[1][1], code<VB>(v_word[u][g][0], j),
                          code<VB>(v_word[u][g][1], j), lane);
        }
      }
    }
  }

  // The simdgroups of the threadgroup, eight query rows after the other.
  threadgroup float sg_acc[NSG][8][D], sg_top[NSG][8], sg_total[NSG][8];
  for (int h = 0; h < 2; h++) {
    const float sum = row_sum(total[h]);
    for (int g = 0; g < GROUPS; g++) {
      const float offset = row_sum(v_bias[h][g]);
      for (int j = 0; j < 8; j++) {
        for (int e = 0; e < 2; e++) {
          sg_acc[sg][high][64 * g + 8 * (2 * low + e) + j] = O[g][j][2 * h + e] + offset;
        }
      }
    }
    if (low == 0) {
      sg_top[sg][high] = top[h];
      sg_total[sg][high] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = sg * 32 + lane; i < 8 * D; i += NSG * 32) {
      const int r = i / D, d = i % D;
      const int query = first + 8 * h + r;
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
