// A few rows of x: every word of the weights is read once, in order, and its codes multiplied where they lie. Lane l of
// a vector of words belongs to group l · per_word / group.
#pragma once
#include "quant_matmul/decode.simd.h"

namespace {

// Row r of x as [blocks][per_word][W], and its sums over groups. False where the sum is not finite.
bool quant_rows_prepare(const QuantMatmul& s, const QuantRows& to, int64_t r) {
  const float* x = s.x + r * s.depth;
  float* values = to.values + r * to.value_stride;
  const int64_t per = 32 / s.bits, words = s.words(), groups = s.groups();
  for (int64_t t = 0; t < words; t += W, values += per * W) {
    const int64_t n = words - t < W ? words - t : W;
    for (int64_t k = 0; k < per; ++k)
      for (int64_t l = 0; l < W; ++l) values[k * W + l] = l < n ? x[(t + l) * per + k] : 0.0f;
  }
  float* sums = to.sums + r * to.group_stride;
  float whole = 0;
  for (int64_t g = 0; g < to.group_stride; ++g) {
    vf total{};
    if (g < groups)
      for (int64_t i = 0; i < s.group; i += W) total += load(x + g * s.group + i);
    sums[g] = sum(total);
    whole += sums[g] - sums[g];  // 0, or NaN
  }
  return whole == 0;
}

// R rows and NO outputs at a time; those beyond the last repeat it and are not written.
template <Code C, int R, int NO>
void rows_of(const QuantMatmul& s, const QuantRows& x, int64_t row, int64_t o) {
  constexpr int per = per_word(C);
  const GroupLanes of(s.group / per);
  const int64_t groups = s.groups(), words = s.words();
  int64_t out[NO], in[R];
#pragma GCC unroll 4
  for (int j = 0; j < NO; ++j) out[j] = o + j < s.outs ? o + j : s.outs - 1;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) in[r] = row + r < s.rows ? row + r : s.rows - 1;
  vf total[R][NO] = {};
  for (int64_t g0 = 0; g0 < groups; g0 += kChunk) {
    const int64_t n = groups - g0 < kChunk ? groups - g0 : kChunk;
    float scale[NO][kChunk + W];
#pragma GCC unroll 4
    for (int j = 0; j < NO; ++j) {
      const int64_t first = out[j] * groups + g0;
      for (int64_t g = 0; g < n; g += W) {
        const int64_t m = n - g < W ? n - g : W;
        const vf by = scales(s.scales, s.scale, first + g, m);
        store(&scale[j][g], by);
        if constexpr (C != kFloat4) {
          const vf bias = fma(by, centre_of(C), scales(s.biases, s.scale, first + g, m));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) total[r][j] = fma(bias, load(x.sums + in[r] * x.group_stride + g0 + g), total[r][j]);
        }
      }
      store(&scale[j][(n + W - 1) / W * W], vf{});
    }
    const uint32_t* from[NO];
#pragma GCC unroll 4
    for (int j = 0; j < NO; ++j) from[j] = s.weight + out[j] * words + (g0 << of.shift);
    const float* value[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) value[r] = x.values + in[r] * x.value_stride + (g0 << of.shift) * per;
    const int64_t count = n << of.shift;
    for (int64_t t = 0; t < count; t += W) {
      vi word[NO];
      vf part[R][NO] = {};
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j) {
        word[j] = t + W <= count ? load_words(from[j] + t) : load_words(from[j] + t, count - t);
        __builtin_prefetch(from[j] + t + NO * words);  // the next outputs: rows are shorter than what prefetchers follow
      }
#pragma GCC unroll 16
      for (int k = 0; k < per; ++k) {
        vf v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[r] = load(value[r] + t * per + k * W);
#pragma GCC unroll 4
        for (int j = 0; j < NO; ++j) {
          const vf c = code<C, true>(word[j], k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) part[r][j] = fma(c, v[r], part[r][j]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j) {
        const vf by = of.spread(scale[j], t);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][j] = fma(part[r][j], by, total[r][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NO; ++j)
      if (row + r < s.rows && o + j < s.outs) s.y[in[r] * s.outs + out[j]] = sum(total[r][j]);
}

// Outputs [o0, o1) of all rows (at most kFewRows).
void quant_rows(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    if (s.rows == 1)
      for (int64_t o = o0; o < o1; o += 4) rows_of<C, 1, 4>(s, x, 0, o);
    else
      for (int64_t o = o0; o < o1; o += 2)
        for (int64_t r = 0; r < s.rows; r += 4) rows_of<C, 4, 2>(s, x, r, o);
  });
}

}  // namespace
