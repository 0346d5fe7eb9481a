// Stands in for MLX's header of this name, whose constructors are qualified by address space: clang's C++ cannot spell
// that. What utils.h needs is a type of this name with two components.
#pragma once
template <class T> struct complex_t {
  using value_type = T;
  T real = 0, imag = 0;
  complex_t() = default;
  constexpr complex_t(T re, T im = 0) : real(re), imag(im) {}
};
using complex64_t = complex_t<float>;
template <class T> constexpr bool is_complex_v = false;
template <class T> constexpr bool is_complex_v<complex_t<T>> = true;
