// The gradient of causal attention over float32, tiled as the forward pass is. Scores are computed again from the stored
// log-sum-exp: P = exp(S - lse), dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)) scale, dQ = dS K, dK = dS^T Q.
#pragma once
#include "kv_attention/mask.simd.h"

namespace {

using mcl::AttentionGrad, mcl::kKeyTile, mcl::kMaxDepth, mcl::kQueryTile;

struct Slot {
  float *k_panels, *v_rows, *v_panels, *k_rows, *dk, *dv;
};

MCL_INLINE Slot slot_of(const AttentionGrad& s, int64_t slot) {
  const int64_t part = mcl::attention_keys(s) * mcl::attention_depth(s);
  float* p = s.scratch + slot * mcl::attention_slot_floats(s);
  return {p, p + part, p + 2 * part, p + 3 * part, p + 4 * part, p + 5 * part};
}

// [T, D] → [keys / 2W][depth][2W], zero beyond T; rows beyond D are never read.
void pack_panels(const float* x, int64_t row, int64_t T, int64_t D, int64_t keys, int64_t depth, float* out) {
  constexpr int64_t N = 2 * W;
  for (int64_t p = 0; p < keys / N; ++p, out += depth * N)
    for (int64_t j = 0; j < N; ++j) {
      const int64_t t = p * N + j;
      if (t < T)
        for (int64_t d = 0; d < D; ++d) out[d * N + j] = x[t * row + d];
      else
        for (int64_t d = 0; d < D; ++d) out[d * N + j] = 0;
    }
}

// [n, D] → [padded, depth], zero beyond n and D.
void pack_rows(const float* x, int64_t row, int64_t n, int64_t D, int64_t padded, int64_t depth, float* out) {
  for (int64_t t = 0; t < padded; ++t, out += depth) {
    const int64_t have = t < n ? D : 0;
    if (have) std::memcpy(out, x + t * row, static_cast<size_t>(have) * sizeof(float));
    if (have < depth) std::memset(out + have, 0, static_cast<size_t>(depth - have) * sizeof(float));
  }
}

void attention_pack(const AttentionGrad& s, int64_t pair, int64_t slot) {
  const int64_t b = pair / s.K, g = pair % s.K, keys = mcl::attention_keys(s), depth = mcl::attention_depth(s);
  const float* k = s.k + b * s.ks.batch + g * s.ks.head;
  const float* v = s.v + b * s.vs.batch + g * s.vs.head;
  const Slot to = slot_of(s, slot);
  pack_panels(k, s.ks.row, s.T, s.D, keys, s.D, to.k_panels);
  pack_rows(v, s.vs.row, s.T, s.D, keys, depth, to.v_rows);
  pack_panels(v, s.vs.row, s.T, s.D, keys, s.D, to.v_panels);
  pack_rows(k, s.ks.row, s.T, s.D, keys, depth, to.k_rows);
  std::memset(to.dk, 0, static_cast<size_t>(2 * keys * depth) * sizeof(float));
}

void unpack_rows(const float* x, int64_t n, int64_t D, int64_t depth, float* out, int64_t row) {
  for (int64_t t = 0; t < n; ++t) std::memcpy(out + t * row, x + t * depth, static_cast<size_t>(D) * sizeof(float));
}

void attention_grad(const AttentionGrad& s, int64_t b, int64_t kv_head, int64_t slot) {
  alignas(64) float q[kQueryTile * kMaxDepth], d_o[kQueryTile * kMaxDepth], dq[kQueryTile * kMaxDepth];
  alignas(64) float p[kQueryTile * kKeyTile], ds[kQueryTile * kKeyTile];
  float delta[kQueryTile];
  const int64_t depth = mcl::attention_depth(s), share = s.H / s.K;
  const Slot in = slot_of(s, slot);
  for (int64_t h = kv_head * share; h < (kv_head + 1) * share; ++h) {
    const float* lse = s.lse + (b * s.H + h) * s.L;
    for (int64_t i0 = 0; i0 < s.L; i0 += kQueryTile) {
      const int64_t i1 = i0 + kQueryTile < s.L ? i0 + kQueryTile : s.L, n = i1 - i0;
      pack_rows(s.q + b * s.qs.batch + h * s.qs.head + i0 * s.qs.row, s.qs.row, n, s.D, n, depth, q);
      pack_rows(s.d_o + b * s.dos.batch + h * s.dos.head + i0 * s.dos.row, s.dos.row, n, s.D, n, depth, d_o);
      std::memset(dq, 0, static_cast<size_t>(n * depth) * sizeof(float));
      for (int64_t i = 0; i < n; ++i) {
        const float* o = s.o + b * s.os.batch + h * s.os.head + (i0 + i) * s.os.row;
        float t = 0;
        int64_t d = 0;
        vf v{};
        for (; d + W <= s.D; d += W) v += load(o + d) * load(d_o + i * depth + d);
        for (; d < s.D; ++d) t += o[d] * d_o[i * depth + d];
        delta[i] = t + sum(v);
      }
      const Span span = seen(s, b, i0, i1);
      for (int64_t k0 = span.first / kKeyTile * kKeyTile; k0 < span.end; k0 += kKeyTile) {
        const int64_t want = span.end - k0 < kKeyTile ? span.end - k0 : kKeyTile;
        const int64_t panels = (want + 2 * W - 1) / (2 * W), width = panels * 2 * W;
        multiply_panels(n, panels, s.D, q, depth, in.k_panels + k0 * s.D, p, kKeyTile);
        multiply_panels(n, panels, s.D, d_o, depth, in.v_panels + k0 * s.D, ds, kKeyTile);
        const bool hidden = must_hide(s, i0, k0, kKeyTile);
        for (int64_t i = 0; i < n; ++i) {
          float *row = p + i * kKeyTile, *d_row = ds + i * kKeyTile;
          if (hidden) hide(s, b, i0 + i, k0, kKeyTile, row);
          for (int64_t j = 0; j < width; j += W) {
            const vf e = exp(fma(load(row + j), s.scale, all(-lse[i0 + i])));
            store(row + j, e);
            store(d_row + j, e * (load(d_row + j) - delta[i]) * s.scale);
          }
        }
        multiply(want, depth, n, p, 1, kKeyTile, d_o, depth, in.dv + k0 * depth, depth, true);
        multiply(want, depth, n, ds, 1, kKeyTile, q, depth, in.dk + k0 * depth, depth, true);
        multiply(n, depth, want, ds, kKeyTile, 1, in.k_rows + k0 * depth, depth, dq, depth, true);
      }
      unpack_rows(dq, n, s.D, depth, s.dq + b * s.dqs.batch + h * s.dqs.head + i0 * s.dqs.row, s.dqs.row);
    }
  }
  unpack_rows(in.dk, s.T, s.D, depth, s.dk + b * s.dks.batch + kv_head * s.dks.head, s.dks.row);
  unpack_rows(in.dv, s.T, s.D, depth, s.dv + b * s.dvs.batch + kv_head * s.dvs.head, s.dvs.row);
}

}  // namespace
