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
    decode_rows(s.k, t.b, t.kv, k0 + p, have, s.D, rows, depth);
    if (depth > s.D)
      for (int64_t j = 0; j < have; ++j)
        std::memset(rows + j * depth + s.D, 0, static_cast<size_t>(depth - s.D) * sizeof(float));
    if (have < kPanel)
      std::memset(rows + have * depth, 0, static_cast<size_t>((kPanel - have) * depth) * sizeof(float));
    transpose_panel(rows, depth, depth, to);
    transpose_panel(rows + W * depth, depth, depth, to + W);
  }
}

// Values [k0, k0 + n) as [depth / 2W][kTileKeys][2W].
void value_panels(const Attention& s, const AttentionTask& t, int64_t k0, int64_t n, float* rows, float* to) {
  const int64_t depth = s.depth();
  for (int64_t p = 0; p < n; p += kPanel) {
    const int64_t have = n - p < kPanel ? n - p : kPanel;
    decode_rows(s.v, t.b, t.kv, k0 + p, have, s.D, rows, depth);
    for (int64_t j = 0; j < have; ++j) {
      float* row = rows + j * depth;
      if (depth > s.D) std::memset(row + s.D, 0, static_cast<size_t>(depth - s.D) * sizeof(float));
      for (int64_t d = 0; d < depth; d += kPanel) {
        float* panel = to + d * kTileKeys + (p + j) * kPanel;
        store(panel, load(row + d));
        store(panel + W, load(row + d + W));
      }
    }
  }
}

void attention_tile(const Attention& s, const AttentionTask& t, float* scratch) {
  constexpr int MR = W == 16 ? 8 : 4;
  const int64_t rows = t.rows(s), padded = (rows + 15) / 16 * 16, depth = s.depth(), share = s.share();
  float* q = scratch;
  float* sums = q + padded * depth;
  float* most = sums + padded * depth;
  float* total = most + padded;
  float* k_panels = total + padded;
  float* v_panels = k_panels + kTileKeys * depth;
  float* scores = v_panels + kTileKeys * depth;
  float* plain = scores + kStrip * kTileKeys;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = s.q + t.b * s.qs.batch + (t.kv * share + r % share) * s.qs.head + (t.i0 + r / share) * s.qs.row;
    for (int64_t d = 0; d < s.D; ++d) q[r * depth + d] = from[d] * s.scale;
    for (int64_t d = s.D; d < depth; ++d) q[r * depth + d] = 0;
  }
  std::memset(q + rows * depth, 0, static_cast<size_t>((padded - rows) * depth) * sizeof(float));
  std::memset(sums, 0, static_cast<size_t>(padded * depth) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) most[r] = -__builtin_inff(), total[r] = 0;

  for (int64_t k0 = t.first; k0 < t.end; k0 += kTileKeys) {
    const int64_t keys = t.end - k0 < kTileKeys ? t.end - k0 : kTileKeys;
    if (all_hidden(s, t.i0, t.i1, k0, keys)) continue;
    key_panels(s, t, k0, keys, plain, k_panels);
    value_panels(s, t, k0, keys, plain, v_panels);
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
        const float shrink = soften(row, n, panels * kPanel, most[r0 + r], total[r0 + r]);
        if (shrink != 1) {
          float* sum = sums + (r0 + r) * depth;
          for (int64_t d = 0; d < depth; d += W) store(sum + d, load(sum + d) * shrink);
        }
      }
      for (int64_t d = 0; d < depth; d += kPanel)
        column<2>(m, n, scores, kTileKeys, 1, v_panels + d * kTileKeys, kPanel, sums + r0 * depth + d, depth, true);
    }
  }
  finish(s, t, sums, most, total);
}

}  // namespace
