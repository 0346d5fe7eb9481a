// y = x * r * w with r = 1 / sqrt(mean(x^2) + eps), and its gradients (Zhang & Sennrich 2019; the gradient is ours):
// dx = r * (w dy) - x * r^3 * mean(x w dy), dw = sum over rows of dy * x * r.
#pragma once
#include "simd/vec.h"

namespace {

MCL_INLINE float rms_scale(const float* x, int64_t n, float eps) {
  vf s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const vf a = load(x + i), b = load(x + i + W);
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
  }
  float total = sum(s0 + s1);
  for (; i < n; ++i) total = fma(x[i], x[i], total);
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
}

void rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t n, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += n, y += n) {
    const float r = rms_scale(x, n, eps);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i) * r * load(weight + i));
    for (; i < n; ++i) y[i] = x[i] * r * weight[i];
  }
}

// Adds to dweight.
void rms_norm_grad(const float* x, const float* weight, const float* dy, float* dx, float* dweight, int64_t rows,
                   int64_t n, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += n, dy += n, dx += n) {
    const float r = rms_scale(x, n, eps);
    vf s{};
    int64_t i = 0;
    for (; i + W <= n; i += W) s += load(x + i) * load(weight + i) * load(dy + i);
    float dot = sum(s);
    for (; i < n; ++i) dot += x[i] * weight[i] * dy[i];
    const float back = dot / static_cast<float>(n) * r * r * r;
    for (i = 0; i + W <= n; i += W) {
      const vf xi = load(x + i), di = load(dy + i);
      store(dweight + i, load(dweight + i) + di * xi * r);
      store(dx + i, load(weight + i) * di * r - xi * back);
    }
    for (; i < n; ++i) {
      dweight[i] += dy[i] * x[i] * r;
      dx[i] = weight[i] * dy[i] * r - x[i] * back;
    }
  }
}

}  // namespace
