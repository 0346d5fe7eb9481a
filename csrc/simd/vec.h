// Vectors of MCL_WIDTH floats, written once and compiled once per instruction set (kernels.cmake). Everything here has
// internal linkage: the linker must never merge a function compiled for AVX-512 with one compiled for SSE2.
#pragma once
#if defined(__AVX2__) || defined(__FMA__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own undefined vectors
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifndef MCL_WIDTH
#define MCL_WIDTH 4
#endif

namespace {

constexpr int W = MCL_WIDTH;
typedef float vf __attribute__((vector_size(4 * MCL_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * MCL_WIDTH)));
typedef float vf_any __attribute__((vector_size(4 * MCL_WIDTH), aligned(4), may_alias));

#define MCL_INLINE static inline __attribute__((always_inline))

MCL_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
MCL_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
MCL_INLINE vf all(float x) { return x - vf{}; }  // x - 0 keeps every value, -0 and NaN included
MCL_INLINE vf load_part(const float* p, int64_t n, float fill) {
  vf x = all(fill);
  std::memcpy(&x, p, static_cast<size_t>(n) * sizeof(float));
  return x;
}
MCL_INLINE void store_part(float* p, vf x, int64_t n) { std::memcpy(p, &x, static_cast<size_t>(n) * sizeof(float)); }

// a b + c with one rounding where the processor has that, two elsewhere. Kernels say where: the compiler forms none by
// itself (-ffp-contract=off), since what it forms may differ between two copies of one line, and with it a result's bits.
MCL_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vf>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__ARM_NEON) && MCL_WIDTH == 4
  return reinterpret_cast<vf>(
      vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
MCL_INLINE vf fma(vf a, float b, vf c) { return fma(a, all(b), c); }
MCL_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger of the two; b where either is NaN.
MCL_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// Lane l gets x[l ^ S].
template <int S, size_t... L>
MCL_INLINE vf swapped(vf x, std::index_sequence<L...>) {
  return __builtin_shufflevector(x, x, (static_cast<int>(L) ^ S)...);
}

template <int S = W / 2>
MCL_INLINE float sum(vf x) {
  if constexpr (S == 0) return x[0];
  else return sum<S / 2>(x + swapped<S>(x, std::make_index_sequence<W>{}));
}

// The largest of the lanes; NaN counts where it is met first.
template <int S = W / 2>
MCL_INLINE float largest(vf x) {
  if constexpr (S == 0) return x[0];
  else return largest<S / 2>(larger(swapped<S>(x, std::make_index_sequence<W>{}), x));
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, polynomial in r. 0 below -87.3 (denormals count as 0), infinity
// above 88.7, NaN for NaN.
MCL_INLINE vf exp(vf x) {
  const vf low = all(-87.33654f), high = all(88.72283f);
  vf c = x < low ? low : x;
  c = c > high ? high : c;
  const vf shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits
  const vf t = fma(c, all(1.44269504f), shifter);
  const vf n = t - shifter;
  vf r = fma(n, all(-0.693145751953125f), c);
  r = fma(n, all(-1.42860682030941723212e-6f), r);
  vf p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  // 2^n in two halves, for n reaches 128.
  const vi e = reinterpret_cast<vi>(t) - 0x4b400000;
  const vi half = e >> 1;
  const vf y = p * reinterpret_cast<vf>((half + 127) << 23) * reinterpret_cast<vf>((e - half + 127) << 23);
  const vf inf = all(__builtin_inff());
  const vf z = x < low ? vf{} : y;
  return x > high ? inf : z;
}

// C[m][n] (+)= sum over k of A[m][k] B[k][n]. A is read one float at a time at a[m * am + k * ak]; rows of B and C lie
// along n, with n a multiple of W. MR x NV vectors of C stay in registers.
template <int MR, int NV>
MCL_INLINE void block(const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, int64_t depth, float* c,
                      int64_t ldc, bool add) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? load(c + i * ldc + j * W) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float s = a[i * am + k * ak];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(row[j], s, acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

template <int NV>
MCL_INLINE void column(int64_t m, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                       float* c, int64_t ldc, bool add) {
  constexpr int MR = W == 16 ? 8 : 4;
  int64_t i = 0;
  for (; i + MR <= m; i += MR) block<MR, NV>(a + i * am, am, ak, b, ldb, depth, c + i * ldc, ldc, add);
  for (; i < m; ++i) block<1, NV>(a + i * am, am, ak, b, ldb, depth, c + i * ldc, ldc, add);
}

// The whole product, B row-major.
MCL_INLINE void multiply(int64_t m, int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                         int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) column<2>(m, depth, a, am, ak, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += W) column<1>(m, depth, a, am, ak, b + j, ldb, c + j, ldc, add);
}

// The same, B in panels of 2W columns: panel p is [depth][2W], contiguous.
MCL_INLINE void multiply_panels(int64_t m, int64_t panels, int64_t depth, const float* a, int64_t am, const float* b,
                                float* c, int64_t ldc) {
  for (int64_t p = 0; p < panels; ++p)
    column<2>(m, depth, a, am, 1, b + p * depth * 2 * W, 2 * W, c + p * 2 * W, ldc, false);
}

}  // namespace
