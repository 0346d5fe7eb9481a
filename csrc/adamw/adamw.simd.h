// One step of AdamW with decoupled decay (Loshchilov & Hutter 2019):
// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p = p (1 - rate decay) - (rate c1) m / (sqrt(v) sqrt(c2) + eps),
// where nothing overflows that the result does not.
#pragma once
#include "simd/kernels.h"
#include "simd/vec.h"

namespace {

MCL_INLINE vf root(vf x) {
  vf y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

MCL_INLINE void adamw_vector(const mcl::AdamW& how, float scale, vf& p, vf g, vf& m, vf& v) {
  g = g * scale;
  m = m * how.beta1 + g * (1.0f - how.beta1);
  v = v * how.beta2 + g * g * (1.0f - how.beta2);
  p = p * (1.0f - how.rate * how.decay) - how.rate * how.correct1 * m / (root(v) * __builtin_sqrtf(how.correct2) + how.eps);
}

// Outputs may be the inputs themselves.
void adamw(const mcl::AdamW& how, float grad_scale, const float* p, const float* g, const float* m, const float* v,
           float* p_out, float* m_out, float* v_out, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf pi = load(p + i), mi = load(m + i), vi_ = load(v + i);
    adamw_vector(how, grad_scale, pi, load(g + i), mi, vi_);
    store(p_out + i, pi);
    store(m_out + i, mi);
    store(v_out + i, vi_);
  }
  if (i < n) {
    const int64_t r = n - i;
    vf pi = load_part(p + i, r, 0), mi = load_part(m + i, r, 0), vi_ = load_part(v + i, r, 0);
    adamw_vector(how, grad_scale, pi, load_part(g + i, r, 0), mi, vi_);
    store_part(p_out + i, pi, r);
    store_part(m_out + i, mi, r);
    store_part(v_out + i, vi_, r);
  }
}

// For the norm of a gradient: float32 within blocks of 4096, double across them.
double sum_squares(const float* x, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {
    const int64_t end = start + 4096 < n ? start + 4096 : n;
    vf s{};
    int64_t i = start;
    for (; i + W <= end; i += W) s += load(x + i) * load(x + i);
    if (i < end) {
      const vf rest = load_part(x + i, end - i, 0);
      s += rest * rest;
    }
    total += sum(s);
  }
  return total;
}

}  // namespace
