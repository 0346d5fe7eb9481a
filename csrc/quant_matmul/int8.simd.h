// x as integers. In every group, x ≈ step · (first · 128 + second) with two int8 terms (an error of at most
// step / 2 = max |x| / 32512), or step · first with one (max |x| / 254). Then, exactly in int32 within a group,
//   y = Σ over groups of  scale · step · Σ code · q  +  bias · step · Σ q.
#pragma once
#include "quant_matmul/decode.simd.h"

namespace {

// acc + the four products of unsigned bytes w and signed bytes x in every lane.
template <Code C>
MCL_INLINE vi dot(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(w),
                                                  reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  typedef short vs __attribute__((vector_size(4 * MCL_WIDTH)));
  const auto madd = [](vs a, vs b) __attribute__((always_inline)) {
#if defined(__AVX512BW__)
    return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
  };
  if constexpr (C == kEight) {  // pairs of 8-bit products leave 16 bits: even and odd bytes apart
    const vs ws = reinterpret_cast<vs>(w), xs = reinterpret_cast<vs>(x);
    return acc + madd(ws & 255, (xs << 8) >> 8) + madd((ws >> 8) & 255, xs >> 8);
  } else {
#if defined(__AVX512BW__)
    const vs pairs = reinterpret_cast<vs>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#else
    const vs pairs = reinterpret_cast<vs>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#endif
    return acc + madd(pairs, vs{} + 1);
  }
#else
  for (int e = 0; e < 32; e += 8) acc += ((w >> e) & 255) * ((x << (24 - e)) >> 24);
  return acc;
#endif
}

// The bytes of every 64-bit unit, even ones first: the order in which two planes of 4-bit codes leave a word.
MCL_INLINE uint64_t evens_first(uint64_t x) {
  uint64_t even = x & 0x00ff00ff00ff00ff, odd = (x >> 8) & 0x00ff00ff00ff00ff;
  even = (even | even >> 8) & 0x0000ffff0000ffff;
  odd = (odd | odd >> 8) & 0x0000ffff0000ffff;
  return ((even | even >> 16) & 0xffffffff) | (odd | odd >> 16) << 32;
}

// n bytes in the order of the planes: plane p of a word holds its codes p, p + P, p + 2P, p + 3P.
MCL_INLINE void into_planes(int8_t* bytes, int64_t n, int bits) {
  if (bits == 4) {
    for (int64_t i = 0; i < n; i += 8) {
      uint64_t x;
      std::memcpy(&x, bytes + i, 8);
      x = evens_first(x);
      std::memcpy(bytes + i, &x, 8);
    }
  }
}

// Row r of x as integers. False where it is not finite.
bool quant_int8_prepare(const QuantMatmul& s, const QuantRows& to, int64_t r) {
  typedef int8_t vb __attribute__((vector_size(MCL_WIDTH)));
  const float limit = s.terms == 2 ? 16256.0f : 127.0f;
  int8_t* first = to.bytes + r * s.terms * s.depth;
  int8_t* second = first + s.depth;
  bool finite = true;
  for (int64_t g = 0; g < s.groups(); ++g) {
    const float* x = s.x + r * s.depth + g * s.group;
    vf most{}, zero{};
    for (int64_t i = 0; i < s.group; i += W) {
      const vf v = load(x + i);
      most = larger(v < 0 ? -v : v, most);
      zero += v - v;
    }
    const float range = largest(most), inverse = range > 1e-30f ? limit / range : 0.0f;
    finite = finite && sum(zero) == 0;
    vi total{};
    for (int64_t i = 0; i < s.group; i += W) {
      const vi q = reinterpret_cast<vi>(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
      total += q;
      const int64_t at = g * s.group + i;
      if (s.terms == 2) {
        const vi high = (q + 64) >> 7;
        const vb a = __builtin_convertvector(high, vb), b = __builtin_convertvector(q - high * 128, vb);
        std::memcpy(first + at, &a, W);
        std::memcpy(second + at, &b, W);
      } else {
        const vb a = __builtin_convertvector(q, vb);
        std::memcpy(first + at, &a, W);
      }
    }
    int64_t whole = 0;
    for (int l = 0; l < W; ++l) whole += total[l];
    const float step = inverse > 0 ? range / limit : 0.0f;
    to.step[r * to.group_stride + g] = step;
    to.sums[r * to.group_stride + g] = step * static_cast<float>(whole);
  }
  into_planes(first, s.terms * s.depth, s.bits);
  if (to.lanes) {  // [terms][blocks of W words][planes][W], as the planes of W words at a time meet them
    const int64_t planes = 8 / s.bits, words = s.words();
    int32_t* lane = to.lanes;
    for (int t = 0; t < s.terms; ++t)
      for (int64_t w = 0; w < words; w += W)
        for (int64_t p = 0; p < planes; ++p)
          for (int64_t l = 0; l < W; ++l, ++lane) {
            *lane = 0;
            if (w + l < words) std::memcpy(lane, first + t * s.depth + ((w + l) * planes + p) * 4, 4);
          }
  }
  return finite;
}

// One row: 4 outputs at a time (those beyond the last repeat it), every word read once and in order.
template <Code C, int DG, int TERMS>
void int8_row_range(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  constexpr int NO = 4, planes = 8 / bits_of(C);
  constexpr int mask = C == kEight ? -1 : 0x0f0f0f0f;
  const int64_t groups = s.groups(), words = s.words(), term = (words + W - 1) / W * W * planes;
  for (int64_t o = o0; o < o1; o += NO) {
    int64_t out[NO];
#pragma GCC unroll 4
    for (int j = 0; j < NO; ++j) out[j] = o + j < s.outs ? o + j : s.outs - 1;
    vf total[NO] = {};
    for (int64_t g0 = 0; g0 < groups; g0 += kChunk) {
      const int64_t n = groups - g0 < kChunk ? groups - g0 : kChunk;
      float scale[NO][kChunk + W];
      for (int j = 0; j < NO; ++j) {
        const int64_t first = out[j] * groups + g0;
        for (int64_t g = 0; g < n; g += W) {
          const int64_t m = n - g < W ? n - g : W;
          store(&scale[j][g], scales(s.scales, s.scale, first + g, m) * load(x.step + g0 + g));
          total[j] += scales(s.biases, s.scale, first + g, m) * load(x.sums + g0 + g);
        }
        store(&scale[j][(n + W - 1) / W * W], vf{});
      }
      const uint32_t* from[NO];
#pragma GCC unroll 4
      for (int j = 0; j < NO; ++j) from[j] = s.weight + out[j] * words + g0 * DG;
      const uint32_t* value = reinterpret_cast<const uint32_t*>(x.lanes) + g0 * DG * planes;
      const auto block = [&](int64_t t, const vi* word) __attribute__((always_inline)) {
        vi acc[TERMS][NO] = {};
#pragma GCC unroll 2
        for (int p = 0; p < planes; ++p) {
          vi v[TERMS];
#pragma GCC unroll 2
          for (int i = 0; i < TERMS; ++i) v[i] = load_words(value + i * term + t * planes + p * W);
#pragma GCC unroll 4
          for (int j = 0; j < NO; ++j) {
            const vi bytes =
                reinterpret_cast<vi>(reinterpret_cast<vu>(word[j]) >> static_cast<unsigned>(p * bits_of(C))) & mask;
#pragma GCC unroll 2
            for (int i = 0; i < TERMS; ++i) acc[i][j] = dot<C>(acc[i][j], bytes, v[i]);
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < NO; ++j)
          total[j] += to_float(TERMS == 2 ? (acc[0][j] << 7) + acc[TERMS - 1][j] : acc[0][j]) *
                      spread<DG>(&scale[j][t / DG]);
      };
      const int64_t count = n * DG;
      int64_t t = 0;
      for (; t + W <= count; t += W) {
        vi word[NO];
#pragma GCC unroll 4
        for (int j = 0; j < NO; ++j) {
          word[j] = load_words(from[j] + t);
          __builtin_prefetch(from[j] + t + NO * words);  // the next outputs: rows are shorter than prefetchers follow
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
    for (int j = 0; j < NO; ++j)
      if (o + j < o1) s.y[out[j]] = sum(total[j]);
  }
}

template <int TERMS>
MCL_INLINE void int8_row(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    if constexpr (C != kFloat4) {
      if (s.group == 32) int8_row_range<C, 32 / per_word(C), TERMS>(s, x, o0, o1);
      else if (s.group == 64) int8_row_range<C, 64 / per_word(C), TERMS>(s, x, o0, o1);
      else int8_row_range<C, 128 / per_word(C), TERMS>(s, x, o0, o1);
    }
  });
}

// Outputs [o0, o1) of the one row of x, which lies in x.lanes.
void quant_int8_row(const QuantMatmul& s, const QuantRows& x, int64_t o0, int64_t o1) {
  if (s.terms == 2) int8_row<2>(s, x, o0, o1);
  else int8_row<1>(s, x, o0, o1);
}

// MR rows of x (those from `end` on repeat the one before and are not written) by a panel of 2W outputs: `panel`
// [depth / 4][2W] words, `by` and `bias` [groups][2W].
template <Code C, int TERMS, int MR>
MCL_INLINE void int8_block(const QuantMatmul& s, const QuantRows& x, int64_t row, int64_t end, int64_t k0,
                           int64_t depth, const uint32_t* panel, const float* by, const float* bias, float* y,
                           int64_t ldy, bool add) {
  const int8_t* at[MR];
  int64_t in[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    in[i] = row + i < end ? i : end - 1 - row;
    at[i] = x.bytes + (row + in[i]) * TERMS * s.depth + k0;
  }
  vf result[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) result[i][j] = add ? load(y + in[i] * ldy + j * W) : vf{};
  const int64_t groups = depth / s.group, first = k0 / s.group;
  for (int64_t g = 0; g < groups; ++g) {
    vi acc[MR][TERMS][2] = {};
    for (int64_t k = 0; k < s.group; k += 4, panel += 2 * W) {
      const vi w0 = load_words(panel), w1 = load_words(panel + W);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; ++t) {
          int32_t four;
          std::memcpy(&four, at[i] + t * s.depth + k, 4);
          const vi v = vi{} + four;
          acc[i][t][0] = dot<C>(acc[i][t][0], w0, v);
          acc[i][t][1] = dot<C>(acc[i][t][1], w1, v);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      at[i] += s.group;
      const int64_t of = (row + in[i]) * x.group_stride + first + g;
      const float step = x.step[of], sums = x.sums[of];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const vi whole = TERMS == 2 ? (acc[i][0][j] << 7) + acc[i][TERMS - 1][j] : acc[i][0][j];
        result[i][j] += load(bias + (2 * g + j) * W) * sums;
        result[i][j] += to_float(whole) * (load(by + (2 * g + j) * W) * step);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      if (row + i < end) store(y + i * ldy + j * W, result[i][j]);
}

template <Code C, int TERMS>
void int8_rows(const QuantMatmul& s, const QuantRows& x, int64_t r0, int64_t r1, int64_t k0, int64_t depth,
               const uint32_t* panel, const float* by, const float* bias, float* y, int64_t ldy, bool add) {
  constexpr int MR = (W == 16 ? 8 : 4) / TERMS;
  for (int64_t r = r0; r < r1; r += MR)
    int8_block<C, TERMS, MR>(s, x, r, r1, k0, depth, panel, by, bias, y + (r - r0) * ldy, ldy, add);
}

constexpr int64_t kInt8Edge = 64;  // rows of results at the edge that are kept aside at a time

// Rows [r0, r1) of outputs [o0, o1). scratch: a panel of kInt8Depth inputs, its scales and biases, a block of results.
void quant_int8(const QuantMatmul& s, const QuantRows& x, int64_t r0, int64_t r1, int64_t o0, int64_t o1, float* scratch) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    constexpr int planes = per_word(C) / 4;
    constexpr int mask = C == kEight ? -1 : 0x0f0f0f0f;
    if constexpr (C != kFloat4) {
      uint32_t* panel = reinterpret_cast<uint32_t*>(scratch);
      float* by = scratch + mcl::kInt8Depth / 4 * 2 * W;
      float* bias = by + mcl::kInt8Depth / 32 * 2 * W;
      float* edge = bias + mcl::kInt8Depth / 32 * 2 * W;
      for (int64_t o = o0; o < o1; o += 2 * W)
        for (int64_t k0 = 0; k0 < s.depth; k0 += mcl::kInt8Depth) {
          const int64_t depth = s.depth - k0 < mcl::kInt8Depth ? s.depth - k0 : mcl::kInt8Depth;
          const bool add = k0 > 0;
          for (int64_t j = 0; j < 2; ++j) {
            uint32_t* to = panel + j * W;
            for_words(s, o + j * W, k0 / per_word(C), depth / per_word(C), [&](int64_t t, vi w) {
#pragma GCC unroll 2
              for (int p = 0; p < planes; ++p) {
                const vi bytes = reinterpret_cast<vi>(reinterpret_cast<vu>(w) >> static_cast<unsigned>(p * bits_of(C)));
                *reinterpret_cast<vi_any*>(to + (t * planes + p) * 2 * W) = bytes & mask;
              }
            });
            for (int64_t g = 0; g < depth / s.group; ++g) {
              store(by + (2 * g + j) * W, group_column(s, s.scales, o + j * W, k0 / s.group + g));
              store(bias + (2 * g + j) * W, group_column(s, s.biases, o + j * W, k0 / s.group + g));
            }
          }
          const auto rows = [&](int64_t a, int64_t b, float* y, int64_t ldy) {
            if (s.terms == 2) int8_rows<C, 2>(s, x, a, b, k0, depth, panel, by, bias, y, ldy, add);
            else int8_rows<C, 1>(s, x, a, b, k0, depth, panel, by, bias, y, ldy, add);
          };
          const int64_t n = o1 - o;
          if (n >= 2 * W) {
            rows(r0, r1, s.y + r0 * s.outs + o, s.outs);
            continue;
          }
          for (int64_t r = r0; r < r1; r += kInt8Edge) {
            const int64_t m = r1 - r < kInt8Edge ? r1 - r : kInt8Edge;
            float* y = s.y + r * s.outs + o;
            for (int64_t i = 0; add && i < m; ++i) std::memcpy(edge + i * 2 * W, y + i * s.outs, n * sizeof(float));
            rows(r, r + m, edge, 2 * W);
            for (int64_t i = 0; i < m; ++i) std::memcpy(y + i * s.outs, edge + i * 2 * W, n * sizeof(float));
          }
        }
    }
  });
}

}  // namespace
