// The types of the Metal Shading Language, for clang: scalars, vectors and their constructors, traits and limits.
// No header of the C++ library stands behind this: what MSL does not have cannot be used by accident.
#pragma once

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t, uchar;
typedef unsigned short uint16_t, ushort;
typedef unsigned int uint32_t, uint;
typedef unsigned long uint64_t, ulong, size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef double gpu_wide;  // for this folder: the name `double` is poisoned for kernels

#define METAL_FUNC inline __attribute__((always_inline))
// A kernel's line, not the shim's, shall stand in a report: code without debug information takes the caller's line.
#define GPU_FUNC inline __attribute__((always_inline, nodebug))

#define GPU_VECTORS(T)                                   \
  typedef T T##2 __attribute__((ext_vector_type(2)));    \
  typedef T T##3 __attribute__((ext_vector_type(3)));    \
  typedef T T##4 __attribute__((ext_vector_type(4)));
#define GPU_PACKED(T)                                                             \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
GPU_VECTORS(char) GPU_VECTORS(uchar) GPU_VECTORS(short) GPU_VECTORS(ushort) GPU_VECTORS(int) GPU_VECTORS(uint)
GPU_VECTORS(long) GPU_VECTORS(ulong) GPU_VECTORS(half) GPU_VECTORS(bfloat) GPU_VECTORS(float) GPU_VECTORS(bool)
GPU_PACKED(char) GPU_PACKED(uchar) GPU_PACKED(short) GPU_PACKED(ushort) GPU_PACKED(int) GPU_PACKED(uint)
GPU_PACKED(half) GPU_PACKED(bfloat) GPU_PACKED(float)
#undef GPU_VECTORS
#undef GPU_PACKED

namespace metal {

// ── traits ──────────────────────────────────────────────────────────────────────────────────────────────────────────
template <class T, T V> struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct remove_cv { using type = __remove_cv(T); };
template <class T> using remove_cv_t = __remove_cv(T);
template <class T> struct remove_reference { using type = __remove_reference_t(T); };
template <class T> using remove_reference_t = __remove_reference_t(T);
template <class T> struct make_unsigned { using type = __make_unsigned(T); };
template <class T> using make_unsigned_t = __make_unsigned(T);
template <class T> struct make_signed { using type = __make_signed(T); };
template <class T> using make_signed_t = __make_signed(T);
template <class T> T&& declval();
template <class T> struct remove_addrspace { using type = T; };
#define GPU_SPACE(S)                                                                          \
  template <class T> struct remove_addrspace<T __attribute__((S))> { using type = T; };      \
  template <class T> struct remove_addrspace<const T __attribute__((S))> { using type = const T; };
GPU_SPACE(opencl_global) GPU_SPACE(opencl_local) GPU_SPACE(opencl_constant)
#undef GPU_SPACE
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T> struct is_floating_point
    : bool_constant<__is_same(remove_cv_t<T>, float) || __is_same(remove_cv_t<T>, half) ||
                    __is_same(remove_cv_t<T>, bfloat)> {};
#define GPU_TRAIT(NAME, BUILTIN)                                            \
  template <class T> struct NAME : bool_constant<BUILTIN(T)> {};            \
  template <class T> inline constexpr bool NAME##_v = BUILTIN(T);
GPU_TRAIT(is_integral, __is_integral) GPU_TRAIT(is_signed, __is_signed) GPU_TRAIT(is_unsigned, __is_unsigned)
GPU_TRAIT(is_void, __is_void) GPU_TRAIT(is_pointer, __is_pointer) GPU_TRAIT(is_const, __is_const)
GPU_TRAIT(is_enum, __is_enum) GPU_TRAIT(is_class, __is_class)
#undef GPU_TRAIT
template <class T> inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T> inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> inline constexpr bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B> inline constexpr bool is_convertible_v = __is_convertible(A, B);

// ── vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────────
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

template <class T> struct gpu_shape { using element = T; static constexpr int lanes = 1; static constexpr bool is_vector = false; };
template <class T, int N> struct gpu_shape<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int lanes = N;
  static constexpr bool is_vector = true;
};
template <class T> using gpu_element = typename gpu_shape<remove_cv_t<T>>::element;
template <class T> inline constexpr int gpu_lanes = gpu_shape<remove_cv_t<T>>::lanes;
template <class T> inline constexpr bool gpu_is_vector = gpu_shape<remove_cv_t<T>>::is_vector;

template <class V> GPU_FUNC constexpr void gpu_fill(V&, int) {}
template <class V, class A, class... Rest> GPU_FUNC constexpr void gpu_fill(V& to, int at, A first, Rest... rest) {
  if constexpr (gpu_is_vector<A>) {
    for (int i = 0; i < gpu_lanes<A>; i++) to[at + i] = (gpu_element<V>)first[i];
  } else {
    to[at] = (gpu_element<V>)first;
  }
  gpu_fill(to, at + gpu_lanes<A>, rest...);
}
// float4(x), float4(xyz, w), float4(half4), …: one scalar fills all, else the components must add up to N.
template <class T, int N, class... A> GPU_FUNC constexpr vec<T, N> vec_of(A... parts) {
  vec<T, N> to = (T)0;
  if constexpr (sizeof...(A) == 1 && (gpu_lanes<A> + ...) == 1) {
    ((to = (T)parts), ...);
  } else {
    static_assert(sizeof...(A) == 0 || (gpu_lanes<A> + ... + 0) == N, "wrong number of components for this vector");
    gpu_fill(to, 0, parts...);
  }
  return to;
}

// ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────
template <class T> struct numeric_limits;
#define GPU_INTEGER(T, LOW, HIGH)                                                                  \
  template <> struct numeric_limits<T> {                                                           \
    static constexpr bool is_specialized = true, has_infinity = false, is_integer = true;          \
    static constexpr bool is_signed = (T)-1 < (T)0;                                                \
    static constexpr int digits = 8 * sizeof(T) - is_signed;                                       \
    static constexpr T min() { return (T)(LOW); }                                                  \
    static constexpr T lowest() { return (T)(LOW); }                                               \
    static constexpr T max() { return (T)(HIGH); }                                                 \
  };
GPU_INTEGER(bool, 0, 1) GPU_INTEGER(char, -128, 127) GPU_INTEGER(signed char, -128, 127) GPU_INTEGER(uchar, 0, 255)
GPU_INTEGER(short, -32768, 32767) GPU_INTEGER(ushort, 0, 65535) GPU_INTEGER(int, -2147483647 - 1, 2147483647)
GPU_INTEGER(uint, 0, 4294967295u) GPU_INTEGER(long, -9223372036854775807l - 1, 9223372036854775807l)
GPU_INTEGER(ulong, 0, 18446744073709551615ul)
#define GPU_FLOAT(T, MIN, MAX, EPSILON, DIGITS)                                                    \
  template <> struct numeric_limits<T> {                                                           \
    static constexpr bool is_specialized = true, has_infinity = true, is_integer = false;          \
    static constexpr bool is_signed = true;                                                        \
    static constexpr int digits = DIGITS;                                                          \
    static constexpr T min() { return (T)(MIN); }                                                  \
    static constexpr T max() { return (T)(MAX); }                                                  \
    static constexpr T lowest() { return (T)(-(MAX)); }                                            \
    static constexpr T epsilon() { return (T)(EPSILON); }                                          \
    static constexpr T infinity() { return (T)__builtin_inff(); }                                  \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }                               \
  };
GPU_FLOAT(float, __FLT_MIN__, __FLT_MAX__, __FLT_EPSILON__, 24)
GPU_FLOAT(half, 0x1p-14f, 65504.0f, 0x1p-10f, 11)
GPU_FLOAT(bfloat, 0x1p-126f, 0x1.FEp127f, 0x1p-7f, 8)
#undef GPU_INTEGER
#undef GPU_FLOAT

template <class T, class S> GPU_FUNC constexpr T gpu_bits(S s) {
  static_assert(sizeof(T) == sizeof(S), "as_type between types of different sizes");
  return __builtin_bit_cast(T, s);
}
}  // namespace metal

template <class T, class S> GPU_FUNC constexpr T as_type(S s) { return metal::gpu_bits<T>(s); }
GPU_FUNC constexpr half operator""h(long double x) { return (half)x; }
GPU_FUNC constexpr half operator""h(unsigned long long x) { return (half)x; }
GPU_FUNC constexpr bfloat operator""bf(long double x) { return (bfloat)(float)x; }
GPU_FUNC constexpr bfloat operator""bf(unsigned long long x) { return (bfloat)(float)x; }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX ((half)65504.0f)
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX 4294967295u
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define __METAL_VERSION__ 310
