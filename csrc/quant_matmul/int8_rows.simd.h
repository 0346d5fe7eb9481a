// A few rows of x as integers: every word of the weights is read once, in order, and its codes multiplied where they lie.
#pragma once
#include "quant_matmul/int8.simd.h"

namespace {

// n bytes in order → [blocks of W words][planes][W words]: as the planes of W words at a time meet them, zeros at the end.
MCL_INLINE void to_lanes(const int8_t* from, int64_t n, int bits, int8_t* to) {
  typedef int16_t vs __attribute__((vector_size(4 * MCL_WIDTH)));
  typedef int8_t vh __attribute__((vector_size(2 * MCL_WIDTH)));
  const int64_t block = 32 / bits * W;
  for (int64_t i = 0; i < n; i += block, from += block, to += block) {
    int8_t last[8 * W];
    const int8_t* in = from;
    if (n - i < block) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, from, static_cast<size_t>(n - i));
      in = last;
    }
    if (bits == 8) {
      std::memcpy(to, in, 4 * W);
      continue;
    }
    for (int h = 0; h < 2; ++h) {
      vs pairs;
      std::memcpy(&pairs, in + h * 4 * W, sizeof pairs);
      const vh even = __builtin_convertvector(pairs, vh), odd = __builtin_convertvector(pairs >> 8, vh);
      std::memcpy(to + h * 2 * W, &even, sizeof even);
      std::memcpy(to + (2 + h) * 2 * W, &odd, sizeof odd);
    }
  }
}

// Row r of x as lanes. False where it is not finite.
bool quant_int8_rows_prepare(const QuantMatmul& s, const QuantRows& to, int64_t r) {
  int8_t bytes[2][mcl::kInt8Piece];
  int8_t* const at[2] = {bytes[0], bytes[1]};
  float *step = to.step + r * to.group_stride, *sums = to.sums + r * to.group_stride;
  float whole = 0;
  const int64_t term = to.byte_stride / s.terms;
  for (int64_t k = 0; k < s.depth; k += mcl::kInt8Piece) {
    const int64_t n = s.depth - k < mcl::kInt8Piece ? s.depth - k : mcl::kInt8Piece;
    for (int64_t i = 0; i < n; i += s.group, ++step, ++sums) {
      int8_t* const here[2] = {at[0] + i, at[1] + i};
      const float* x = s.x + r * s.depth + k + i;
      if (s.terms == 2) int8_group<2>(x, s.group, here, *step, *sums);
      else int8_group<1>(x, s.group, here, *step, *sums);
      whole += *step - *step;
    }
    for (int t = 0; t < s.terms; ++t) to_lanes(at[t], n, s.bits, to.bytes + r * to.byte_stride + t * term + k);
  }
  for (int64_t g = s.groups(); g < to.group_stride; ++g) *step++ = *sums++ = 0;
  return whole == 0;
}

// R rows and NO outputs at a time: neighbours, or where rows of weights lie whole pages apart, and so compete for the
// same lines of the first cache, NO runs of neighbours. Those beyond the last repeat it and are not written.
template <Code C, int TERMS, int R, int NO>
void int8_rows_of(const QuantMatmul& s, const QuantRows& x, int64_t row, int64_t o0, int64_t o1) {
  constexpr int planes = 8 / bits_of(C);
  constexpr int mask = C == kEight ? -1 : 0x0f0f0f0f;
  const GroupLanes of(s.group / per_word(C));
  const int64_t groups = s.groups(), words = s.words(), term = x.byte_stride / TERMS / 4;
  int64_t in[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) in[r] = row + r < s.rows ? row + r : s.rows - 1;
  const bool pages = words % 1024 == 0;
  const int64_t steps = (o1 - o0 + NO - 1) / NO, apart = pages ? steps : 1, step = pages ? 1 : NO;
  const int64_t ahead = pages ? 512 : NO * words;  // words; rows are shorter than what prefetchers follow
  for (int64_t i = 0, o = o0; i < steps; ++i, o += step) {
    int64_t out[NO];
#pragma GCC unroll 4
    for (int j = 0; j < NO; ++j) out[j] = o + j * apart < o1 ? o + j * apart : o1 - 1;
    vf total[R][NO] = {};
    for (int64_t g0 = 0; g0 < groups; g0 += kChunk) {
      const int64_t n = groups - g0 < kChunk ? groups - g0 : kChunk;
      float scale[NO][R][kChunk + W];
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j) {
        const int64_t first = out[j] * groups + g0;
        for (int64_t g = 0; g < n; g += W) {
          const int64_t m = n - g < W ? n - g : W;
          const vf by = scales_of(s.scales, s.scale, first + g, m), bias = scales_of(s.biases, s.scale, first + g, m);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            store(&scale[j][r][g], by * load(x.step + in[r] * x.group_stride + g0 + g));
            total[r][j] += bias * load(x.sums + in[r] * x.group_stride + g0 + g);
          }
        }
        if (n % W) for (int r = 0; r < R; ++r) store(&scale[j][r][(n + W - 1) / W * W], vf{});
      }
      const uint32_t* from[NO];
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j) from[j] = s.weight + out[j] * words + (g0 << of.shift);
      const uint32_t* value[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        value[r] = reinterpret_cast<const uint32_t*>(x.bytes + in[r] * x.byte_stride) + (g0 << of.shift) * planes;
      const auto block = [&](int64_t t, const vi* word) __attribute__((always_inline)) {
        vi acc[R][NO] = {};
#pragma GCC unroll 2
        for (int i = 0; i < TERMS; ++i) {
          if (i) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
              for (int j = 0; j < NO; ++j) acc[r][j] <<= 7;
          }
#pragma GCC unroll 2
          for (int p = 0; p < planes; ++p) {
            vi v[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) v[r] = load_words(value[r] + i * term + t * planes + p * W);
#pragma GCC unroll 4
            for (int j = 0; j < NO; ++j) {
              const vi bytes =
                  reinterpret_cast<vi>(reinterpret_cast<vu>(word[j]) >> static_cast<unsigned>(p * bits_of(C))) & mask;
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r) acc[r][j] = dot<C>(acc[r][j], bytes, v[r]);
            }
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < NO; ++j)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) total[r][j] += to_float(acc[r][j]) * of.spread(scale[j][r], t);
      };
      const int64_t count = n << of.shift;
      int64_t t = 0;
      for (; t + W <= count; t += W) {
        vi word[NO];
#pragma GCC unroll 4
        for (int j = 0; j < NO; ++j) {
          word[j] = load_words(from[j] + t);
          __builtin_prefetch(from[j] + t + ahead);
        }
        block(t, word);
      }
      if (t < count) {
        vi word[NO];
        for (int j = 0; j < NO; ++j) word[j] = load_words(from[j] + t, count - t);
        block(t, word);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j)
        if (row + r < s.rows && o + j * apart < o1) s.y[in[r] * s.outs + out[j]] = sum(total[r][j]);
  }
}

template <int TERMS>
MCL_INLINE void int8_rows(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    if constexpr (C != kFloat4) {
      if (s.rows == 1) return int8_rows_of<C, TERMS, 1, 4>(s, x, 0, o0, o1);
      for (int64_t r = 0; r < s.rows; r += 2) int8_rows_of<C, TERMS, 2, 4>(s, x, r, o0, o1);
    }
  });
}

// Outputs [o0, o1) of all rows (at most kFewRows).
void quant_int8_rows(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  if (s.terms == 2) int8_rows<2>(s, x, o0, o1);
  else int8_rows<1>(s, x, o0, o1);
}

}  // namespace
