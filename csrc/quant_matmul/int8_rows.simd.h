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

// Whether two terms are one integer of 15 bits: an instruction then does half as many products, but both terms at once, and
// sums need not be widened first as those of bytes. Sums are exact, so results are the same.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// n integers in order → [blocks of W words][planes][W pairs]: as the planes of W words at a time meet them, zeros at the end.
// Pair p of a word has its codes p and p + half of their number.
MCL_INLINE void to_pair_lanes(const int16_t* from, int64_t n, int bits, int32_t* to) {
  const int64_t per = 32 / bits, block = per * W;
  for (int64_t i = 0; i < n; i += block, from += block, to += block / 2) {
    int16_t last[8 * W];
    const int16_t* in = from;
    if (n - i < block) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, from, static_cast<size_t>(n - i) * 2);
      in = last;
    }
    for (int64_t l = 0; l < W; l += 4, in += 4 * per) {  // four words
      v4i r[4];
#pragma GCC unroll 4
      for (int k = 0; k < per / 2; ++k) {
        v8s eight;
        std::memcpy(&eight, in + 8 * k, sizeof eight);
        r[k] = reinterpret_cast<v4i>(bits == 4 ? __builtin_shufflevector(eight, eight, 0, 4, 1, 5, 2, 6, 3, 7)
                                               : __builtin_shufflevector(eight, eight, 0, 2, 4, 6, 1, 3, 5, 7));
      }
      if (bits == 8) {
        const v4i first = __builtin_shufflevector(r[0], r[1], 0, 1, 4, 5), second = __builtin_shufflevector(r[0], r[1], 2, 3, 6, 7);
        std::memcpy(to + l, &first, sizeof first);
        std::memcpy(to + W + l, &second, sizeof second);
        continue;
      }
      const v4i a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const v4i c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      const v4i planes[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                             __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
      for (int p = 0; p < 4; ++p) std::memcpy(to + p * W + l, &planes[p], sizeof planes[p]);
    }
  }
}

// Row r of x as lanes. False where it is not finite.
bool quant_int8_rows_prepare(const QuantMatmul& s, const QuantRows& to, int64_t r) {
  if (kPairs && s.terms == 2) {
    int16_t integers[mcl::kInt8Piece];
    float *step = to.step + r * to.group_stride, *sums = to.sums + r * to.group_stride, whole = 0;
    int32_t* lanes = reinterpret_cast<int32_t*>(to.bytes + r * to.byte_stride);
    for (int64_t k = 0; k < s.depth; k += mcl::kInt8Piece, lanes += mcl::kInt8Piece / 2) {
      const int64_t n = s.depth - k < mcl::kInt8Piece ? s.depth - k : mcl::kInt8Piece;
      for (int64_t i = 0; i < n; i += s.group, ++step, ++sums) {
        int16_group(s.x + r * s.depth + k + i, s.group, integers + i, *step, *sums);
        whole += *step - *step;
      }
      to_pair_lanes(integers, n, s.bits, lanes);
    }
    for (int64_t g = s.groups(); g < to.group_stride; ++g) *step++ = *sums++ = 0;
    return whole == 0;
  }
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

constexpr int64_t kWeightsAhead = 3072, kScalesAhead = 256;  // bytes that are fetched ahead, past the end of a row too

// In a register from here on: what is used twice the compiler would load at each use, and loads are what bounds.
MCL_INLINE vi kept(vi x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// The sums of all lanes of a and of b, each in the order of `sum`: in the first lane, and in the one W / 2 further on.
template <size_t... L>
MCL_INLINE vf sums_of_two(vf a, vf b, std::index_sequence<L...>) {
  constexpr int H = W / 2;
  const vf outer = __builtin_shufflevector(a, b, (static_cast<int>(L) < H ? static_cast<int>(L) : static_cast<int>(W + L))...);
  const vf inner = __builtin_shufflevector(a, b, (static_cast<int>(L) + H)...);
  vf x = outer + inner;
  if constexpr (H > 4) x += swapped<4>(x, std::index_sequence<L...>{});
  if constexpr (H > 2) x += swapped<2>(x, std::index_sequence<L...>{});
  return x + swapped<1>(x, std::index_sequence<L...>{});
}

// Outputs a + i of one product and b + i of the other, for each i below n, of rows [row, row + R) of x: two streams of
// weights far apart, each read in order, share what is loaded of x. Scales stay in registers: what is stored a vector at
// a time cannot be loaded across two of them before both have left the queue of stores.
template <Code C, int TERMS, int R>
__attribute__((noinline)) void int8_pairs(const QuantMatmul* const (&s)[2], const QuantRows& x, int64_t row, int64_t a,
                                          int64_t b, int64_t n) {
  constexpr bool PAIRS = kPairs && TERMS == 2;
  constexpr int planes = (PAIRS ? 16 : 8) / bits_of(C);
  constexpr int mask = PAIRS ? (C == kEight ? 0x00ff00ff : 0x000f000f) : C == kEight ? -1 : 0x0f0f0f0f;
  const Scale type = s[0]->scale;
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(s[0]->group / per_word(C)));
  const int64_t groups = s[0]->groups(), words = s[0]->words(), half = type == Scale::float32 ? 4 : 2;
  const int64_t stride = x.byte_stride / 4, term = stride / TERMS;
  const uint32_t* const values = reinterpret_cast<const uint32_t*>(x.bytes) + row * stride;
  const float *const step = x.step + row * x.group_stride, *const sums = x.sums + row * x.group_stride;
  vi first{};
  for (int l = 0; l < W; ++l) first[l] = l;
  for (int64_t i = 0; i < n; ++i) {
    const bool both = b + i < s[1]->outs;
    const int64_t o[2] = {a + i, both ? b + i : s[1]->outs - 1};
    const uint32_t* from[2] = {s[0]->weight + o[0] * words, s[1]->weight + o[1] * words};
    const uint32_t* value = values;
    vf total[2][R] = {};
    for (int64_t g = 0; g < groups; g += W) {
      const int64_t m = groups - g < W ? groups - g : W;
      vf scale[2][R];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t at = o[j] * groups + g;
        __builtin_prefetch(static_cast<const char*>(s[j]->scales) + at * half + kScalesAhead);
        __builtin_prefetch(static_cast<const char*>(s[j]->biases) + at * half + kScalesAhead);
        const vf by = scales_of(s[j]->scales, type, at, m), bias = scales_of(s[j]->biases, type, at, m);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          scale[j][r] = by * load(step + r * x.group_stride + g);
          total[j][r] = fma(bias, load(sums + r * x.group_stride + g), total[j][r]);
        }
      }
      vi group = first;  // of every word, times its words
      const auto block = [&](vi one, vi other) __attribute__((always_inline)) {
        vi bytes[2][planes], lanes = group >> shift;
#pragma GCC unroll 4
        for (int p = 0; p < planes; ++p) {
          bytes[0][p] = reinterpret_cast<vi>(reinterpret_cast<vu>(one) >> static_cast<unsigned>(p * bits_of(C))) & mask;
          bytes[1][p] = reinterpret_cast<vi>(reinterpret_cast<vu>(other) >> static_cast<unsigned>(p * bits_of(C))) & mask;
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          vi acc[2] = {};
#pragma GCC unroll 2
          for (int k = 0; k < (PAIRS ? 1 : TERMS); ++k) {
            if (k) acc[0] <<= 7, acc[1] <<= 7;
#pragma GCC unroll 4
            for (int p = 0; p < planes; ++p) {
              const vi v = kept(load_words(value + r * stride + k * term + p * W));
              if constexpr (PAIRS) {
                acc[0] = dot(acc[0], reinterpret_cast<vp>(bytes[0][p]), reinterpret_cast<vp>(v));
                acc[1] = dot(acc[1], reinterpret_cast<vp>(bytes[1][p]), reinterpret_cast<vp>(v));
              } else {
                acc[0] = dot<C>(acc[0], bytes[0][p], v);
                acc[1] = dot<C>(acc[1], bytes[1][p], v);
              }
            }
          }
          total[0][r] = fma(to_float(acc[0]), __builtin_shuffle(scale[0][r], lanes), total[0][r]);
          total[1][r] = fma(to_float(acc[1]), __builtin_shuffle(scale[1][r], lanes), total[1][r]);
        }
        group += W;
        value += planes * W;
      };
      const int64_t count = m << shift;
      int64_t t = 0;
      for (; t + W <= count; t += W, from[0] += W, from[1] += W) {
        __builtin_prefetch(reinterpret_cast<const char*>(from[0]) + kWeightsAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(from[1]) + kWeightsAhead);
        block(kept(load_words(from[0])), kept(load_words(from[1])));
      }
      if (t < count) block(load_words(from[0], count - t), load_words(from[1], count - t));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf y = sums_of_two(total[0][r], total[1][r], std::make_index_sequence<W>{});
      s[0]->y[(row + r) * s[0]->outs + o[0]] = y[0];
      if (both) s[1]->y[(row + r) * s[1]->outs + o[1]] = y[W / 2];
    }
  }
}

// All rows of x meet a pair of outputs before the next pair is read.
template <Code C, int TERMS>
void int8_all_rows(const QuantMatmul* const (&s)[2], const QuantRows& x, int64_t a, int64_t b, int64_t n) {
  const int64_t rows = s[0]->rows, at_once = rows > 4 ? 1 : n;
  if (kPairs && rows == 8) return int8_pairs<C, TERMS, 8>(s, x, 0, a, b, n);  // sums lie in memory anyway
  for (int64_t i = 0; i < n; i += at_once)
    for (int64_t r = 0; r < rows; r += 4) {
      if (rows - r >= 4) int8_pairs<C, TERMS, 4>(s, x, r, a + i, b + i, at_once);
      else if (rows - r == 3) int8_pairs<C, TERMS, 3>(s, x, r, a + i, b + i, at_once);
      else if (rows - r == 2) int8_pairs<C, TERMS, 2>(s, x, r, a + i, b + i, at_once);
      else int8_pairs<C, TERMS, 1>(s, x, r, a + i, b + i, at_once);
    }
}

// Outputs [a, a + n) of one product and [b, b + n) of another, or of the same one further on; those beyond the second's
// last are left out. Both have one format. All rows (at most kFewRows).
void quant_int8_rows(const QuantMatmul& one, const QuantMatmul& other, const QuantRows& x, int64_t a, int64_t b, int64_t n) {
  const QuantMatmul* const s[2] = {&one, &other};
  with_code(one, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    if constexpr (C != kFloat4) {
      if (one.terms == 2) int8_all_rows<C, 2>(s, x, a, b, n);
      else int8_all_rows<C, 1>(s, x, a, b, n);
    }
  });
}

}  // namespace
