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
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t ws = reinterpret_cast<int8x16_t>(w), xs = reinterpret_cast<int8x16_t>(x);
  int32x4_t total = reinterpret_cast<int32x4_t>(acc);
  if constexpr (C == kEight) {  // both factors are signed there: w = (w - 128) + 64 + 64
    total = vdotq_s32(total, vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s8(ws), vdupq_n_u8(128))), xs);
    total = vdotq_s32(vdotq_s32(total, vdupq_n_s8(64), xs), vdupq_n_s8(64), xs);
  } else {
    total = vdotq_s32(total, ws, xs);
  }
  return reinterpret_cast<vi>(total);
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

typedef int8_t vb __attribute__((vector_size(MCL_WIDTH)));

// A group of x as integers within ±limit: keep(i, W of them from the i-th on). Returns step and step · Σ q; both are NaN
// where an element is not finite.
template <class F>
MCL_INLINE void group_integers(const float* x, int64_t n, float limit, float& step, float& sums, F&& keep) {
  vf most{}, zero{};
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i);
    most = larger(v < 0 ? -v : v, most);
    zero += v - v;
  }
  const float range = largest(most), inverse = range > 1e-30f ? limit / range : 0.0f;
  vu total{};  // without a sign: NaN becomes any number, and sums of those may overflow
  for (int64_t i = 0; i < n; i += W) {
    const vi q = reinterpret_cast<vi>(fma(load(x + i), inverse, all(12582912.0f))) - 0x4b400000;
    total += reinterpret_cast<vu>(q);
    keep(i, q);
  }
  int64_t whole = 0;
  for (int l = 0; l < W; ++l) whole += static_cast<int32_t>(total[l]);
  step = (inverse > 0 ? range / limit : 0.0f) + sum(zero);
  sums = step * static_cast<float>(whole);
}

constexpr float kLimit[] = {0, 127, 16256};  // by terms: 127 · 128 is the largest whose terms both fit

// As bytes: to[t] gets those of term t, in order.
template <int TERMS>
MCL_INLINE void int8_group(const float* x, int64_t n, int8_t* const (&to)[2], float& step, float& sums) {
  group_integers(x, n, kLimit[TERMS], step, sums, [&](int64_t i, vi q) __attribute__((always_inline)) {
    const vi high = TERMS == 2 ? (q + 64) >> 7 : q;
    const vb a = __builtin_convertvector(high, vb);
    std::memcpy(to[0] + i, &a, W);
    if constexpr (TERMS == 2) {
      const vb b = __builtin_convertvector(q - high * 128, vb);
      std::memcpy(to[1] + i, &b, W);
    }
  });
}

// The same as integers of 16 bits, where the processor multiplies pairs of them.
typedef int16_t vp __attribute__((vector_size(4 * MCL_WIDTH)));  // a pair in every lane
typedef int16_t v8s __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

// acc + the two products in every lane.
MCL_INLINE vi dot(vi acc, vp a, vp b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vi>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
#if defined(__AVX512BW__)
  acc += reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  acc += reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
  asm("" : "+v"(acc));  // else GCC forms all products of a step first, and has no registers for them
  return acc;
#else
  return acc + (reinterpret_cast<vi>(a) << 16 >> 16) * (reinterpret_cast<vi>(b) << 16 >> 16) +
         (reinterpret_cast<vi>(a) >> 16) * (reinterpret_cast<vi>(b) >> 16);
#endif
}

// Both terms of a group in one.
MCL_INLINE void int16_group(const float* x, int64_t n, int16_t* to, float& step, float& sums) {
  group_integers(x, n, kLimit[2], step, sums, [&](int64_t i, vi q) __attribute__((always_inline)) {
    typedef int16_t vs __attribute__((vector_size(2 * MCL_WIDTH)));
    const vs half = __builtin_convertvector(q, vs);
    std::memcpy(to + i, &half, sizeof half);
  });
}

}  // namespace
