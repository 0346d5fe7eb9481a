// Rotate by halves: y[i] = x[i] c[i] - x[i + half] s[i], y[i + half] = x[i + half] c[i] + x[i] s[i]. sign = -1 turns back,
// which is also the gradient.
#pragma once
#include "simd/vec.h"

namespace {

void rope(const float* x, const float* cosine, const float* sine, float* y, int64_t half, float sign) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i) * sign;
    store(y + i, fma(a, c, -(b * s)));
    store(y + half + i, fma(b, c, a * s));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i], c = cosine[i], s = sine[i] * sign;
    y[i] = fma(a, c, -(b * s));
    y[half + i] = fma(b, c, a * s);
  }
}

}  // namespace
