// Many query rows: softmax(scale Q K^T + mask) V in tiles with a running maximum and sum (Milakov & Gimelshein 2018; Dao
// et al. 2022), so scores never leave the caches. A tile of 128 keys becomes floats in panels once for all rows of the
// task, whatever it is stored as; a strip of 64 rows is scored, softened and multiplied by the values at a time. Panels
// beyond the diagonal, and tiles before the first document that a task's queries see, are skipped.
#pragma once
#include "kv_attention/few.simd.h"

namespace {

using mcl::kStrip, mcl::kTileKeys;

constexpr int64_t kPanel = 2 * W;

// W rows of floats from x on, W apart in `to`, transposed: to[d][row], d in [0, D) with D a multiple of W.
MCL_INLINE void transpose_panel(const float* x, int64_t stride, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += W) {
    vi r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = reinterpret_cast<vi>(load(x + i * stride + d));
    transpose_from<1>(r);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(to + (d + i) * kPanel, reinterpret_cast<vf>(r[i]));
  }
}

// Keys [k0, k0 + n) as [panels][depth][2W], zero beyond n; rows: [2W][depth] to work in.
void key_panels(const Attention& s, const AttentionTask& t, int64_t k0, int64_t n, float* rows, float* to) {
  const int64_t depth = s.depth();
  for (int64_t p = 0; p < n; p += kPanel, to += depth * kPanel) {
    const int64_t have = n - p < kPanel ? n - p : kPanel;
    decode_rows(s, &mcl::Piece::k, t.b, t.kv, k0 + p, have, rows, depth);
    if (depth > s.D)
      for (int64_t j = 0; j < have; ++j)
        std::memset(rows + j * depth + s.D, 0, static_cast<size_t>(depth - s.D) * sizeof(float));
    if (have < kPanel)
      std::memset(rows + have * depth, 0, static_cast<size_t>((kPanel - have) * depth) * sizeof(float));
    transpose_panel(rows, depth, depth, to);
    transpose_panel(rows + W * depth, depth, depth, to + W);
  }
}

// Values [k0, k0 + n) as [depth / 2W][kTileKeys][2W]. Whether all are finite.
bool value_panels(const Attention& s, const AttentionTask& t, int64_t k0, int64_t n, float* rows, float* to) {
  const int64_t depth = s.depth();
  vf whole{};
  for (int64_t p = 0; p < n; p += kPanel) {
    const int64_t have = n - p < kPanel ? n - p : kPanel;
    decode_rows(s, &mcl::Piece::v, t.b, t.kv, k0 + p, have, rows, depth);
    for (int64_t j = 0; j < have; ++j) {
      float* row = rows + j * depth;
      if (depth > s.D) std::memset(row + s.D, 0, static_cast<size_t>(depth - s.D) * sizeof(float));
      for (int64_t d = 0; d < depth; d += kPanel) {
        float* panel = to + d * kTileKeys + (p + j) * kPanel;
        const vf a = load(row + d), b = load(row + d + W);
        store(panel, a);
        store(panel + W, b);
        whole = fma(a, 0.0f, fma(b, 0.0f, whole));
      }
    }
  }
  return sum(whole) == 0;
}

void attention_tile(const Attention& s, const AttentionTask& t, float* scratch) {
  constexpr int MR = W == 16 ? 8 : 4;
  const int64_t rows = t.rows(s), padded = (rows + 15) / 16 * 16, depth = s.depth(), share = s.share();
  float* const memory = scratch;
  float* const q = memory + 3 * mcl::attention_state_floats(s, padded);
  float* const k_panels = q + padded * depth;
  float* const v_panels = k_panels + kTileKeys * depth;
  float* const scores = v_panels + kTileKeys * depth;
  float* const plain = scores + kStrip * kTileKeys;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = s.q + t.b * s.qs.batch + (t.kv * share + r % share) * s.qs.head + (t.i0 + r / share) * s.qs.row;
    for (int64_t d = 0; d < s.D; ++d) q[r * depth + d] = from[d] * s.scale;
    for (int64_t d = s.D; d < depth; ++d) q[r * depth + d] = 0;
  }
  std::memset(q + rows * depth, 0, static_cast<size_t>((padded - rows) * depth) * sizeof(float));

  join_splits(s, t, padded, memory, [&](int64_t first, int64_t end, const States& to) {
    for (int64_t k0 = first; k0 < end; k0 += kTileKeys) {
      const int64_t keys = end - k0 < kTileKeys ? end - k0 : kTileKeys;
      if (all_hidden(s, t.i0, t.i1, k0, keys)) continue;
      key_panels(s, t, k0, keys, plain, k_panels);
      const bool finite = value_panels(s, t, k0, keys, plain, v_panels);
      for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
        const int64_t count = rows - r0 < kStrip ? rows - r0 : kStrip, m = (count + MR - 1) / MR * MR;
        const int64_t i0 = t.i0 + r0 / share, i1 = t.i0 + (r0 + count - 1) / share + 1;
        const int64_t last = s.end(i1);
        const int64_t n = last - k0 < keys ? last - k0 : keys;
        if (n <= 0) continue;
        const int64_t panels = (n + kPanel - 1) / kPanel;
        multiply_panels(m, panels, depth, q + r0 * depth, depth, k_panels, scores, kTileKeys);
        const bool hidden = must_hide(s, i0, k0, n);
        for (int64_t r = 0; r < count; ++r) {
          float* row = scores + r * kTileKeys;
          if (hidden) hide(s, t.b, t.i0 + (r0 + r) / share, k0, n, row);
          const float shrink = soften(row, n, panels * kPanel, to.most(r0 + r), to.total(r0 + r));
          if (shrink != 1) to.shrink(r0 + r, shrink);
        }
        const auto add = [&](int64_t r, int64_t rows_of_it, int64_t seen) {
          for (int64_t d = 0; d < depth; d += kPanel)
            column<2>(rows_of_it, seen, scores + r * kTileKeys, kTileKeys, 1, v_panels + d * kTileKeys, kPanel,
                      to.sums(r0 + r) + d, to.stride(), true);
        };
        if (finite || !hidden) {
          add(0, m, n);
          continue;
        }
        for (int64_t r = 0; r < count; ++r) {  // a weight of 0 times what is not finite would be NaN
          const int64_t seen = s.end(t.i0 + (r0 + r) / share + 1) - k0;
          if (seen > 0) add(r, 1, seen < n ? seen : n);
        }
      }
    }
  });
}

}  // namespace
