// Packed codes to floats, and groups' scales to vectors.
#pragma once
#include <utility>

#include "quant_matmul/quant_matmul.h"
#include "simd/vec.h"

namespace {

using mcl::QuantMatmul, mcl::QuantRows, mcl::Scale;

typedef uint32_t vu __attribute__((vector_size(4 * MCL_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * MCL_WIDTH)));
typedef int32_t vi_any __attribute__((vector_size(4 * MCL_WIDTH), aligned(4), may_alias));

constexpr int64_t kChunk = 64;  // groups whose scales are kept as floats while a row is read

enum Code { kFour = 4, kEight = 8, kFloat4 = 104 };  // the last: e2m1, sign and magnitude

constexpr int bits_of(Code c) { return c == kFloat4 ? 4 : static_cast<int>(c); }
constexpr int per_word(Code c) { return 32 / bits_of(c); }

MCL_INLINE vi load_words(const uint32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
MCL_INLINE vi load_words(const uint32_t* p, int64_t n) {
  vi x{};
  std::memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
}
MCL_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// What a code is reduced by where sums of code · x are formed: half its range, so that sums stay as small as those of the
// weights themselves. The bias of the group grows by as many scales.
constexpr float centre_of(Code c) { return c == kFloat4 ? 0.0f : static_cast<float>(1 << (bits_of(c) - 1)); }

// The k-th code of every word, less `centre_of` where CENTRED.
template <Code C, bool CENTRED>
MCL_INLINE vf code(vi words, int k) {
  constexpr int bits = bits_of(C);
  constexpr float less = CENTRED ? centre_of(C) : 0.0f;
#if defined(__AVX512F__)
  if constexpr (bits == 4) {  // a permutation reads the low 4 bits of its index: no masking, no conversion
    __m512 table;
    if constexpr (C == kFloat4)
      table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    else
      table = _mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_ps(less));
    const vu index = reinterpret_cast<vu>(words) >> static_cast<unsigned>(bits * k);
    return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), table));
  }
#endif
  const vi c = reinterpret_cast<vi>(reinterpret_cast<vu>(words) >> static_cast<unsigned>(bits * k)) & ((1 << bits) - 1);
  if constexpr (C == kFloat4)  // as a denormal times 2^126, then the sign
    return reinterpret_cast<vf>(reinterpret_cast<vi>(reinterpret_cast<vf>((c & 7) << 22) * 8.50705917302346158658e37f) |
                                ((c & 8) << 28));
  else
    return CENTRED ? to_float(c - static_cast<int>(less)) : to_float(c);
}

// n <= W scales from p[first] on, 0 beyond n. Not inlined, like `group_column`: seldom called and long.
__attribute__((noinline)) vf scales(const void* p, Scale type, int64_t first, int64_t n) {
  if (type == Scale::float32) {
    const float* at = static_cast<const float*>(p) + first;
    return n == W ? load(at) : load_part(at, n, 0);
  }
  if (type == Scale::e8m0) {
    vi exponent{};
    for (int64_t i = 0; i < n; ++i) exponent[i] = static_cast<const uint8_t*>(p)[first + i];
    const vi bits = exponent << 23;
    const vi subnormal = exponent == 0, nan = exponent == 255;
    vi r = (bits & ~subnormal & ~nan) | (0x00400000 & subnormal) | (0x7fc00000 & nan);
    for (int64_t i = n; i < W; ++i) r[i] = 0;
    return reinterpret_cast<vf>(r);
  }
  vh half{};
  std::memcpy(&half, static_cast<const uint16_t*>(p) + first, static_cast<size_t>(n) * 2);
  const vi x = __builtin_convertvector(half, vi);
  if (type == Scale::bfloat16) return reinterpret_cast<vf>(x << 16);
  const vi magnitude = (x & 0x7fff) << 13, special = magnitude >= 0x0f800000;
  const vf finite = reinterpret_cast<vf>(magnitude) * 5.19229685853482762853e33f;  // 2^112 moves the exponent's offset
  const vi bits = (reinterpret_cast<vi>(finite) & ~special) | ((magnitude | 0x7f800000) & special);
  return reinterpret_cast<vf>(bits | ((x & 0x8000) << 16));
}

// The same, short where whole vectors are asked for or vectors have masks.
MCL_INLINE vf scales_of(const void* p, Scale type, int64_t first, int64_t n) {
#if defined(__AVX512F__)
  if (type <= Scale::bfloat16) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    if (type == Scale::float32)
      return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + first));
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + first);
    if (type == Scale::float16) return reinterpret_cast<vf>(_mm512_cvtph_ps(half));
    return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
#elif defined(__AVX2__)
  if (n == W && type <= Scale::bfloat16) {
    if (type == Scale::float32) return load(static_cast<const float*>(p) + first);
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + first));
    if (type == Scale::float16) return reinterpret_cast<vf>(_mm256_cvtph_ps(half));
    return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
#endif
  return scales(p, type, first, n);
}

MCL_INLINE float scale_at(const void* p, Scale type, int64_t i) {
  return type == Scale::float32 ? static_cast<const float*>(p)[i] : scales(p, type, i, 1)[0];
}

// Which group a word belongs to, where one is `words` words (a power of two).
struct GroupLanes {
  int shift;
  vi lanes;
  explicit GroupLanes(int64_t words) : shift(__builtin_ctzll(static_cast<unsigned long long>(words))), lanes{} {
    for (int l = 0; l < W; ++l) lanes[l] = l >> shift;
  }
  // What `each` has for the groups of words t … t + W - 1. Reads W floats from the first of them on.
  __attribute__((always_inline)) vf spread(const float* each, int64_t t) const {
    return __builtin_shuffle(load(each + (t >> shift)), lanes);
  }
};

// W rows of W words, transposed in place: one round swaps squares of S by S.
template <int S, size_t... L>
MCL_INLINE void swap_squares(vi& a, vi& b, std::index_sequence<L...>) {
  const vi low = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L - S) : static_cast<int>(L))...);
  b = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L) : static_cast<int>(L + S))...);
  a = low;
}
template <int S>
MCL_INLINE void transpose_from(vi (&r)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & S)) swap_squares<S>(r[i], r[i + S], std::make_index_sequence<W>{});
    transpose_from<2 * S>(r);
  }
}

// n <= W words from t on of W outputs, transposed: to[t][output].
__attribute__((noinline)) void transposed(const uint32_t* const* from, int64_t t, int64_t n, vi* to) {
  vi r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = n == W ? load_words(from[i] + t) : load_words(from[i] + t, n);
  transpose_from<1>(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) to[i] = r[i];
}

// Words [t0, t0 + n) of outputs o … o + W - 1 (those at `outs` and beyond repeat the last): f(t - t0, one of each).
template <class F>
MCL_INLINE void for_words(const QuantMatmul& s, int64_t o, int64_t t0, int64_t n, F&& f) {
  const uint32_t* from[W];
  for (int i = 0; i < W; ++i) from[i] = s.weight + (o + i < s.outs ? o + i : s.outs - 1) * s.words() + t0;
  for (int64_t t = 0; t < n; t += W) {
    const int64_t m = n - t < W ? n - t : W;
    vi r[W];
    transposed(from, t, m, r);
    for (int64_t i = 0; i < m; ++i) f(t + i, r[i]);
  }
}

// Scale (and bias) of group g of outputs o … o + W - 1.
__attribute__((noinline)) vf group_column(const QuantMatmul& s, const void* from, int64_t o, int64_t g) {
  vf r{};
  if (!from) return r;
  float lanes[W];
  for (int i = 0; i < W; ++i)
    lanes[i] = scale_at(from, s.scale, (o + i < s.outs ? o + i : s.outs - 1) * s.groups() + g);
  return load(lanes);
}

// f(an integral_constant of Code) for the code of s.
template <class F>
MCL_INLINE void with_code(const QuantMatmul& s, F&& f) {
  if (s.scale == Scale::e8m0) f(std::integral_constant<Code, kFloat4>{});
  else if (s.bits == 4) f(std::integral_constant<Code, kFour>{});
  else f(std::integral_constant<Code, kEight>{});
}

}  // namespace
