// Which keys a query sees: starts[i] (0 without documents) to offset + i. Shared by the forward pass and the gradient.
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

// Set the scores that query i must not see to -infinity; scores of keys [k0, k0 + n).
template <class S>
MCL_INLINE void hide(const S& s, int64_t b, int64_t i, int64_t k0, int64_t n, float* row) {
  const float low = -__builtin_inff();
  const int64_t last = s.T - s.L + i, start = s.starts ? s.starts[b * s.L + i] : 0;
  for (int64_t j = last + 1 - k0 > 0 ? last + 1 - k0 : 0; j < n; ++j) row[j] = low;
  for (int64_t j = 0; j < n && j < start - k0; ++j) row[j] = low;
}

// Some query from i0 on does not see all of the keys [k0, k0 + n).
template <class S>
MCL_INLINE bool must_hide(const S& s, int64_t i0, int64_t k0, int64_t n) {
  return s.starts != nullptr || k0 + n - 1 > s.T - s.L + i0;
}

}  // namespace
