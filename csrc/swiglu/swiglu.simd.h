// y = g * sigmoid(g) * u (Shazeer 2020). dg = dy * u * s * (1 + g * (1 - s)), du = dy * g * s, with s = sigmoid(g).
#pragma once
#include "simd/vec.h"

namespace {

MCL_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

void swiglu(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf g = load(gate + i);
    store(y + i, g * sigmoid(g) * load(up + i));
  }
  if (i < n) {
    const vf g = load_part(gate + i, n - i, 0);
    store_part(y + i, g * sigmoid(g) * load_part(up + i, n - i, 0), n - i);
  }
}

// dgate may be gate itself, dup may be up.
void swiglu_grad(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf g = load(gate + i), u = load(up + i), d = load(dy + i), s = sigmoid(g);
    store(dgate + i, d * u * s * (1.0f + g * (1.0f - s)));
    store(dup + i, d * g * s);
  }
  if (i < n) {
    const int64_t m = n - i;
    const vf g = load_part(gate + i, m, 0), u = load_part(up + i, m, 0), d = load_part(dy + i, m, 0), s = sigmoid(g);
    store_part(dgate + i, d * u * s * (1.0f + g * (1.0f - s)), m);
    store_part(dup + i, d * g * s, m);
  }
}

}  // namespace
