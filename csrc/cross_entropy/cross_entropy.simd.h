// loss = log sum exp(x) - x[target]; gradient = dloss * (softmax(x) - onehot(target)). A negative target is ignored: loss
// and gradient 0. A target beyond the row gives NaN: there is no error channel in a lazy graph.
#pragma once
#include "simd/vec.h"

namespace {

// of: the largest logit, and the logarithm of the sum of exp(x - largest). Their sum would lose the second where logits
// are large, and the gradient with it.
void cross_entropy(const float* logits, int32_t target, int64_t n, float* loss, float* of) {
  if (target < 0) {
    *loss = of[0] = of[1] = 0;
    return;
  }
  const float low = -__builtin_inff();
  vf m0 = all(low), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    m0 = larger(load(logits + i), m0);
    m1 = larger(load(logits + i + W), m1);
  }
  float m = largest(larger(m0, m1));
  for (; i < n; ++i) m = logits[i] > m ? logits[i] : m;
  vf s0{}, s1{};
  for (i = 0; i + 2 * W <= n; i += 2 * W) {
    s0 += exp(load(logits + i) - m);
    s1 += exp(load(logits + i + W) - m);
  }
  for (; i + W <= n; i += W) s0 += exp(load(logits + i) - m);
  if (i < n) s1 += exp(load_part(logits + i, n - i, low) - m);
  of[0] = m, of[1] = __builtin_logf(sum(s0 + s1));
  float rest = of[1];
  if (m == -low) {  // e^(infinity - infinity) has no value, but an infinite sum has a logarithm
    rest = 0;
    for (i = 0; i < n; ++i)
      if (logits[i] != logits[i]) rest = logits[i];
  }
  *loss = target < n ? m - logits[target] + rest : __builtin_nanf("");
}

// dlogits may be logits itself.
void cross_entropy_grad(const float* logits, int32_t target, const float* of, float dloss, float* dlogits,
                        int64_t n) {
  if (target < 0) {
    std::memset(dlogits, 0, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const float most = of[0], rest = of[1];
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dlogits + i, exp(load(logits + i) - most - rest) * dloss);
  if (i < n) store_part(dlogits + i, exp(load_part(logits + i, n - i, 0) - most - rest) * dloss, n - i);
  if (target < n) dlogits[target] -= dloss;
}

}  // namespace
