// Which keys a query sees: starts[i] (0 without documents) to offset + i. Shared by the forward pass and the gradient.
// The forward pass also has windows.
#pragma once
#include "kv_attention/kv_attention.h"
#include "simd/vec.h"

namespace {

struct Span {
  int64_t first, end;  // keys
};

// Keys that some query of rows [i0, i1) sees.
template <class S>
MCL_INLINE Span seen(const S& s, int64_t b, int64_t i0, int64_t i1) {
  const int64_t offset = s.T - s.L;
  int64_t first = 0;
  if (s.starts) {
    const int32_t* starts = s.starts + b * s.L;
    first = starts[i0];
    for (int64_t i = i0 + 1; i < i1; ++i) first = starts[i] < first ? starts[i] : first;
    if (first < 0) first = 0;
  }
  return {first, offset + i1};
}

template <class S>
concept Windowed = requires(const S& s) { s.window; };

// A query whose own key lies at place p does not see places (p, p + ring - size] and [sinks, p - size]. Set their scores,
// of the keys [k0, k0 + n), to -infinity.
MCL_INLINE void hide_outside(const mcl::Window& w, int64_t p, int64_t k0, int64_t n, float* row) {
  const float low = -__builtin_inff();
  const int64_t newer = p + 1 - k0, older = p + 1 + w.ring - w.size - k0, gap = w.sinks - k0, kept = p + 1 - w.size - k0;
  for (int64_t j = newer > 0 ? newer : 0; j < older && j < n; ++j) row[j] = low;
  for (int64_t j = gap > 0 ? gap : 0; j < kept && j < n; ++j) row[j] = low;
}

// None of the queries [i0, i1) sees any of the keys [k0, k0 + n): true only where that is told with little work.
template <class S>
MCL_INLINE bool all_hidden(const S& s, int64_t i0, int64_t i1, int64_t k0, int64_t n) {
  if constexpr (Windowed<S>) {
    const mcl::Window& w = s.window;
    if (w.size == 0) return false;
    const int64_t first = w.place(i0), last = w.place(i1 - 1);
    if (last < first) return false;
    return (k0 >= w.sinks && k0 + n <= first + 1 - w.size) || (k0 > last && k0 + n <= first + 1 + w.ring - w.size);
  }
  return false;
}

// Set the scores that query i must not see to -infinity; scores of keys [k0, k0 + n).
template <class S>
MCL_INLINE void hide(const S& s, int64_t b, int64_t i, int64_t k0, int64_t n, float* row) {
  if constexpr (Windowed<S>)
    if (s.window.size != 0) return hide_outside(s.window, s.window.place(i), k0, n, row);
  const float low = -__builtin_inff();
  const int64_t last = s.T - s.L + i, start = s.starts ? s.starts[b * s.L + i] : 0;
  for (int64_t j = last + 1 - k0 > 0 ? last + 1 - k0 : 0; j < n; ++j) row[j] = low;
  for (int64_t j = 0; j < n && j < start - k0; ++j) row[j] = low;
}

// Some query from i0 on does not see all of the keys [k0, k0 + n).
template <class S>
MCL_INLINE bool must_hide(const S& s, int64_t i0, int64_t k0, int64_t n) {
  if constexpr (Windowed<S>)
    if (s.window.size != 0) return true;
  return s.starts != nullptr || k0 + n - 1 > s.T - s.L + i0;
}

}  // namespace
