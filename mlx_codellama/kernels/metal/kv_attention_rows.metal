// Decode attention over packed rows: a few new queries against all cached tokens, each cached byte read once.
//
// `kv_attention_lanes` attends one block of tokens with R query rows of one key-value head; a simdgroup reads 32 / LPR
// tokens at a time, LPR lanes to a row, so a score costs log2(LPR) shuffles for 32 / LPR tokens at once. Every slot of
// LPR lanes keeps its own running maximum and sum; they meet once, at the end. `kv_attention_merge` joins the blocks.
//
// Scores are kept in units of log2(e): `scale` arrives multiplied by it, and exp2 undoes it.
// Query rows are the G·L queries of a key-value head, in the order of q [B, H, L, D] seen as [B·K, G·L, D].
// header: packed_kv
// variant: kv_attention_lanes_segments of kv_attention_lanes with SEGMENTED

// A score no real one is as low as; finite, so that no infinity is ever subtracted from another.
constant constexpr float LOWEST = -1e30f;

// kernel: kv_attention_lanes
//   T           dtype of q                         D, KB, VB, GS   head size; bits of K and V; values per scale group
//   R           query rows of a threadgroup        LPR             lanes per row: 4, 8 or 16
//   U           tokens of a slot per step          NSG             simdgroups of a threadgroup
//   q           [B·K, n_rows, D]                   rows            [B·K, capacity, W] uint32
//   WINDOW      1 where the rows are a window's places, of which a query does not see all
//   dims        n_tokens, n_queries, capacity, n_rows = G·L, tiles = ceil(n_rows / R), chunk; of a window: sinks, size, own, ring;
//               SEGMENTED: first token and capacity of each piece after the first
//   chunk       tokens of a block: block i has those from i · chunk on
//   scale       one float: softmax scale · log2(e)
//   → part_o [B·K·n_rows, blocks, D], part_m, part_l [B·K·n_rows, blocks]: weighted sum, maximum, sum of weights
//   grid (32, NSG · blocks, B·K · tiles), threadgroup (32, NSG, 1)
  constexpr int N = D / LPR;                                   // values of a lane
  constexpr int SLOTS = 32 / LPR;                              // tokens that a simdgroup reads at once
  constexpr int KW = D * KB / 32, VW = D * VB / 32;            // words of a row: codes of K, of V
  constexpr int KG = KB == 16 ? 0 : D / GS, VG = VB == 16 ? 0 : D / GS;  // and groups
  constexpr int W = KW + VW + KG + VG;
  constexpr int KN = N * KB / 32, VN = N * VB / 32;            // words of a lane
  constexpr bool K_EVEN = W % 2 == 0, V_EVEN = W % 2 == 0 && KW % 2 == 0;
  static_assert(KG + VG <= LPR, "a lane holds at most one group word of a row");

  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int part = lane % LPR, slot = lane / LPR;
  const int block = threadgroup_position_in_grid.y, blocks = threadgroups_per_grid.y;
  const int n_tokens = dims[0], n_queries = dims[1], capacity = dims[2], n_rows = dims[3], tiles = dims[4];
  const int head = int(threadgroup_position_in_grid.z) / tiles;
  const int first = int(threadgroup_position_in_grid.z) % tiles * R;
  const int chunk = dims[5];
  const int end = metal::min(n_tokens, (block + 1) * chunk);
  const size_t base = size_t(head) * capacity;

  float qv[R][N], acc[R][N], q_sum[R], v_bias[R], top[R], total[R];
  int seen[R], place[R];                                       // tokens that a query sees; of a window, its own place
  for (int r = 0; r < R; r++) {
    const int row = metal::min(first + r, n_rows - 1);
    seen[r] = WINDOW ? end : metal::min(end, n_tokens - n_queries + row % n_queries + 1);
    if (WINDOW) {
      place[r] = dims[8] + row % n_queries;
      place[r] -= place[r] < dims[6] + dims[9] ? 0 : dims[9];
    }
    q_sum[r] = 0;
    for (int i = 0; i < N; i++) {
      qv[r][i] = scale[0] * float(q[(size_t(head) * n_rows + row) * D + part * N + i]);
      q_sum[r] += qv[r][i];
      acc[r][i] = 0;
    }
    v_bias[r] = 0;
    top[r] = LOWEST;
    total[r] = 0;
  }

  for (int t0 = block * chunk + sg * SLOTS * U; t0 < end; t0 += NSG * SLOTS * U) {
    float weight[R][U];
    uint group_word[U], v_word[U][VN];
    for (int u = 0; u < U; u++) {
      const int t = t0 + u * SLOTS + slot;
      const bool inside = t < end;
      const device uint* row = ROW_OF(t);
      uint k_word[KN];
      load_words<KN, K_EVEN>(row + part * KN, inside, k_word);
      load_words<VN, V_EVEN>(row + KW + part * VN, inside, v_word[u]);
      load_words<1, false>(row + KW + VW + part, inside && part < KG + VG, group_word + u);
      float k_scale = 1, k_offset = 0;
      if (KB != 16) {
        const uint word = simd_shuffle(group_word[u], ushort(slot * LPR + part * N / GS));
        k_scale = low_half(word);
        k_offset = high_half(word);
      }
      for (int r = 0; r < R; r++) {
        float score = 0;
        for (int i = 0; i < N; i++) {
          score += qv[r][i] * code<KB>(k_word, i);
        }
        score = k_scale * score + k_offset * q_sum[r];
        for (int d = 1; d < LPR; d *= 2) {
          score += simd_shuffle_xor(score, ushort(d));
        }
        const bool sees = t < seen[r] && (!WINDOW || in_window(t, place[r], dims[6], dims[7], dims[9]));
        weight[r][u] = sees ? score : LOWEST;
      }
    }
    for (int r = 0; r < R; r++) {                              // one rescaling for the U tokens
      float most = top[r];
      for (int u = 0; u < U; u++) {
        most = metal::max(most, weight[r][u]);
      }
      const float shrink = metal::fast::exp2(top[r] - most);
      top[r] = most;
      total[r] *= shrink;
      v_bias[r] *= shrink;
      for (int i = 0; i < N; i++) {
        acc[r][i] *= shrink;
      }
      for (int u = 0; u < U; u++) {
        weight[r][u] = weight[r][u] == LOWEST ? 0.0f : metal::fast::exp2(weight[r][u] - most);
        total[r] += weight[r][u];
      }
    }
    for (int u = 0; u < U; u++) {
      float v_scale = 1, v_offset = 0;
      if (VB != 16) {
        const uint word = simd_shuffle(group_word[u], ushort(slot * LPR + KG + part * N / GS));
        v_scale = low_half(word);
        v_offset = high_half(word);
      }
      for (int r = 0; r < R; r++) {
        const float scaled = weight[r][u] * v_scale;
        v_bias[r] += weight[r][u] * v_offset;
        for (int i = 0; i < N; i++) {
          acc[r][i] += scaled * code<VB>(v_word[u], i);
        }
      }
    }
  }

  // The slots of a simdgroup, then the simdgroups of the threadgroup.
  threadgroup float sg_acc[NSG][R][D], sg_top[NSG][R], sg_total[NSG][R];
  for (int r = 0; r < R; r++) {
    float most = top[r];
    for (int d = LPR; d < 32; d *= 2) {
      most = metal::max(most, simd_shuffle_xor(most, ushort(d)));
    }
    const float shrink = metal::fast::exp2(top[r] - most);
    float sum = total[r] * shrink;
    for (int d = LPR; d < 32; d *= 2) {
      sum += simd_shuffle_xor(sum, ushort(d));
    }
    for (int i = 0; i < N; i++) {
      float value = (acc[r][i] + v_bias[r]) * shrink;
      for (int d = LPR; d < 32; d *= 2) {
        value += simd_shuffle_xor(value, ushort(d));
      }
      if (slot == 0) {
        sg_acc[sg][r][part * N + i] = value;
      }
    }
    if (lane == 0) {
      sg_top[sg][r] = most;
      sg_total[sg][r] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = sg * 32 + lane; i < R * D; i += NSG * 32) {
    const int r = i / D, d = i % D;
    if (first + r < n_rows) {
      float most = LOWEST, value = 0, sum = 0;
      for (int s = 0; s < NSG; s++) {
        most = metal::max(most, sg_top[s][r]);
      }
      for (int s = 0; s < NSG; s++) {
        const float shrink = metal::fast::exp2(sg_top[s][r] - most);
        value += shrink * sg_acc[s][r][d];
        sum += shrink * sg_total[s][r];
      }
      const size_t at = (size_t(head) * n_rows + first + r) * blocks + block;
      part_o[at * D + d] = value;
      if (d == 0) {
        part_m[at] = most;
        part_l[at] = sum;
      }
    }
  }

// kernel: kv_attention_merge
//   T dtype of out, D head size; dims: blocks;  part_o, part_m, part_l as above → out [B·K·n_rows, D]
//   grid (D, B·K·n_rows, 1), threadgroup (D, 1, 1)
  const int d = thread_position_in_threadgroup.x;
  const int blocks = dims[0];
  const size_t row = threadgroup_position_in_grid.y;
  float most = LOWEST, value = 0, sum = 0;
  for (int b = 0; b < blocks; b++) {
    most = metal::max(most, part_m[row * blocks + b]);
  }
  for (int b = 0; b < blocks; b++) {
    const float shrink = metal::fast::exp2(part_m[row * blocks + b] - most);
    value += shrink * part_o[(row * blocks + b) * D + d];
    sum += shrink * part_l[row * blocks + b];
  }
  out[row * D + d] = T(value / sum);
