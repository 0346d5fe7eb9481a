// MSL's mathematics on scalars and, component by component, on vectors. half and bfloat compute in float and round
// once. `metal::`, `metal::fast::` and `metal::precise::` are the same here: Apple's approximations are not imitated.
#pragma once
#include "types.h"

namespace metal {
#define GPU_LIFT1(F)                                                            \
  template <class V, class = enable_if_t<gpu_is_vector<V>>> GPU_FUNC V F(V x) { \
    V r;                                                                        \
    for (int i = 0; i < gpu_lanes<V>; i++) r[i] = F((gpu_element<V>)x[i]);      \
    return r;                                                                   \
  }
#define GPU_LIFT2(F)                                                                                     \
  template <class V, class = enable_if_t<gpu_is_vector<V>>> GPU_FUNC V F(V x, V y) {                     \
    V r;                                                                                                 \
    for (int i = 0; i < gpu_lanes<V>; i++) r[i] = F((gpu_element<V>)x[i], (gpu_element<V>)y[i]);         \
    return r;                                                                                            \
  }
#define GPU_LIFT3(F)                                                                                     \
  template <class V, class = enable_if_t<gpu_is_vector<V>>> GPU_FUNC V F(V x, V y, V z) {                \
    V r;                                                                                                 \
    for (int i = 0; i < gpu_lanes<V>; i++)                                                               \
      r[i] = F((gpu_element<V>)x[i], (gpu_element<V>)y[i], (gpu_element<V>)z[i]);                        \
    return r;                                                                                            \
  }
#define GPU_MATH1_OF(T, F, EXPR) \
  GPU_FUNC T F(T a) {            \
    float x = (float)a;          \
    return (T)(EXPR);            \
  }
#define GPU_MATH2_OF(T, F, EXPR)         \
  GPU_FUNC T F(T a, T b) {               \
    float x = (float)a, y = (float)b;    \
    return (T)(EXPR);                    \
  }
#define GPU_MATH3_OF(T, F, EXPR)                       \
  GPU_FUNC T F(T a, T b, T c) {                        \
    float x = (float)a, y = (float)b, z = (float)c;    \
    return (T)(EXPR);                                  \
  }
#define GPU_TEST_OF(T, F, EXPR) \
  GPU_FUNC bool F(T a) {        \
    float x = (float)a;         \
    return EXPR;                \
  }
#define GPU_MATH1(F, EXPR) \
  GPU_MATH1_OF(float, F, EXPR) GPU_MATH1_OF(half, F, EXPR) GPU_MATH1_OF(bfloat, F, EXPR) GPU_LIFT1(F)
#define GPU_MATH2(F, EXPR) \
  GPU_MATH2_OF(float, F, EXPR) GPU_MATH2_OF(half, F, EXPR) GPU_MATH2_OF(bfloat, F, EXPR) GPU_LIFT2(F)
#define GPU_MATH3(F, EXPR) \
  GPU_MATH3_OF(float, F, EXPR) GPU_MATH3_OF(half, F, EXPR) GPU_MATH3_OF(bfloat, F, EXPR) GPU_LIFT3(F)
#define GPU_TEST(F, EXPR) GPU_TEST_OF(float, F, EXPR) GPU_TEST_OF(half, F, EXPR) GPU_TEST_OF(bfloat, F, EXPR)

#define GPU_MATH                                                                                                       \
  GPU_MATH1(exp, __builtin_expf(x)) GPU_MATH1(exp2, __builtin_exp2f(x)) GPU_MATH1(exp10, __builtin_powf(10.0f, x))     \
  GPU_MATH1(log, __builtin_logf(x)) GPU_MATH1(log2, __builtin_log2f(x)) GPU_MATH1(log10, __builtin_log10f(x))          \
  GPU_MATH1(sin, __builtin_sinf(x)) GPU_MATH1(cos, __builtin_cosf(x)) GPU_MATH1(tan, __builtin_tanf(x))                \
  GPU_MATH1(asin, __builtin_asinf(x)) GPU_MATH1(acos, __builtin_acosf(x)) GPU_MATH1(atan, __builtin_atanf(x))          \
  GPU_MATH1(sinh, __builtin_sinhf(x)) GPU_MATH1(cosh, __builtin_coshf(x)) GPU_MATH1(tanh, __builtin_tanhf(x))          \
  GPU_MATH1(asinh, __builtin_asinhf(x)) GPU_MATH1(acosh, __builtin_acoshf(x)) GPU_MATH1(atanh, __builtin_atanhf(x))    \
  GPU_MATH1(sqrt, __builtin_sqrtf(x)) GPU_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x)) GPU_MATH1(fabs, __builtin_fabsf(x))  \
  GPU_MATH1(floor, __builtin_floorf(x)) GPU_MATH1(ceil, __builtin_ceilf(x)) GPU_MATH1(trunc, __builtin_truncf(x))      \
  GPU_MATH1(round, __builtin_roundf(x)) GPU_MATH1(rint, __builtin_rintf(x))                                            \
  GPU_MATH1(fract, x - __builtin_floorf(x)) GPU_MATH1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f)                       \
  GPU_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))                                                 \
  GPU_MATH2(pow, __builtin_powf(x, y)) GPU_MATH2(powr, __builtin_powf(x, y)) GPU_MATH2(fmod, __builtin_fmodf(x, y))    \
  GPU_MATH2(fmin, __builtin_fminf(x, y)) GPU_MATH2(fmax, __builtin_fmaxf(x, y)) GPU_MATH2(fdim, __builtin_fdimf(x, y)) \
  GPU_MATH2(min, __builtin_fminf(x, y)) GPU_MATH2(max, __builtin_fmaxf(x, y)) GPU_MATH1(abs, __builtin_fabsf(x))       \
  GPU_MATH2(atan2, __builtin_atan2f(x, y)) GPU_MATH2(copysign, __builtin_copysignf(x, y))                              \
  GPU_MATH2(divide, x / y) GPU_MATH2(step, y < x ? 0.0f : 1.0f)                                                        \
  GPU_MATH3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z)) GPU_MATH3(mix, x + (y - x) * z)                          \
  GPU_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }                                    \
  GPU_FUNC half fma(half a, half b, half c) { return (half)__builtin_fma((gpu_wide)a, (gpu_wide)b, (gpu_wide)c); }     \
  GPU_LIFT3(fma)                                                                                                       \
  GPU_TEST(isnan, x != x) GPU_TEST(isinf, __builtin_isinf(x)) GPU_TEST(isfinite, __builtin_isfinite(x))                \
  GPU_FUNC float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }                                              \
  GPU_FUNC float frexp(float x, int& k) { return __builtin_frexpf(x, &k); }                                            \
  GPU_FUNC float modf(float x, float& whole) { return __builtin_modff(x, &whole); }                                    \
  GPU_FUNC float sincos(float x, float& c) {                                                                           \
    c = __builtin_cosf(x);                                                                                             \
    return __builtin_sinf(x);                                                                                          \
  }
GPU_MATH
namespace fast { GPU_MATH }
namespace precise { GPU_MATH }

#define GPU_INTEGER(T)                                                                            \
  GPU_FUNC T min(T a, T b) { return b < a ? b : a; }                                              \
  GPU_FUNC T max(T a, T b) { return a < b ? b : a; }                                              \
  GPU_FUNC T clamp(T x, T a, T b) { return min(max(x, a), b); }                                   \
  GPU_FUNC T popcount(T x) { return (T)__builtin_popcountll((make_unsigned_t<T>)x); }             \
  GPU_FUNC T ctz(T x) { return x ? (T)__builtin_ctzll((make_unsigned_t<T>)x) : (T)(8 * sizeof(T)); } \
  GPU_FUNC T clz(T x) {                                                                           \
    return x ? (T)(__builtin_clzll((make_unsigned_t<T>)x) - (64 - 8 * (int)sizeof(T))) : (T)(8 * sizeof(T)); \
  }
GPU_INTEGER(char) GPU_INTEGER(signed char) GPU_INTEGER(uchar) GPU_INTEGER(short) GPU_INTEGER(ushort)
GPU_INTEGER(int) GPU_INTEGER(uint) GPU_INTEGER(long) GPU_INTEGER(ulong)
GPU_FUNC int abs(int x) { return x < 0 ? -x : x; }
GPU_FUNC short abs(short x) { return x < 0 ? -x : x; }
GPU_FUNC long abs(long x) { return x < 0 ? -x : x; }
GPU_FUNC uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
GPU_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
GPU_FUNC uint rotate(uint x, uint k) { return __builtin_rotateleft32(x, k); }
GPU_FUNC uint extract_bits(uint x, uint from, uint count) { return count ? x >> from & 0xffffffffu >> (32 - count) : 0; }

template <class T> GPU_FUNC enable_if_t<!gpu_is_vector<T>, T> select(T no, T yes, bool c) { return c ? yes : no; }
template <class V, class C>
GPU_FUNC enable_if_t<gpu_is_vector<V> && gpu_is_vector<C>, V> select(V no, V yes, C c) {
  V r;
  for (int i = 0; i < gpu_lanes<V>; i++) r[i] = c[i] ? yes[i] : no[i];
  return r;
}
template <class V> GPU_FUNC enable_if_t<gpu_is_vector<V>, gpu_element<V>> dot(V a, V b) {
  gpu_element<V> sum = a[0] * b[0];
  for (int i = 1; i < gpu_lanes<V>; i++) sum += a[i] * b[i];
  return sum;
}
template <class V> GPU_FUNC gpu_element<V> length(V a) { return (gpu_element<V>)__builtin_sqrtf((float)dot(a, a)); }
template <class V> GPU_FUNC enable_if_t<gpu_is_vector<V>, bool> any(V a) {
  bool r = false;
  for (int i = 0; i < gpu_lanes<V>; i++) r |= (bool)a[i];
  return r;
}
template <class V> GPU_FUNC enable_if_t<gpu_is_vector<V>, bool> all(V a) {
  bool r = true;
  for (int i = 0; i < gpu_lanes<V>; i++) r &= (bool)a[i];
  return r;
}
#undef GPU_MATH
#undef GPU_INTEGER
}  // namespace metal
