// [B, heads, L, D] arrays as attention meets them: usually a transposed view of [B, L, heads, D].
#pragma once
#include "binding/native.h"
#include "kv_attention/kv_attention.h"
#include "rope_append/rope_append.h"

namespace mcl {

template <class T>
struct HeadsOf {
  const T* data;
  Strided strides;
  int64_t last;  // stride within a row; 1 unless the array is an unusual view
  int64_t B, N, L, D;

  explicit HeadsOf(const mx::array& x)
      : data(x.data<T>()),
        strides{x.strides(0), x.strides(1), x.strides(2)},
        last(x.shape(3) == 1 ? 1 : x.strides(3)),
        B(x.shape(0)),
        N(x.shape(1)),
        L(x.shape(2)),
        D(x.shape(3)) {}

  // Make rows contiguous; `store` holds the copy where one is needed.
  void straighten(std::vector<T>& store) {
    if (last == 1) return;
    store.resize(static_cast<size_t>(B * N * L * D));
    T* to = store.data();
    for (int64_t b = 0; b < B; ++b)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t l = 0; l < L; ++l)
          for (int64_t d = 0; d < D; ++d)
            *to++ = data[b * strides.batch + n * strides.head + l * strides.row + d * last];
    data = store.data();
    strides = {N * L * D, L * D, D};
    last = 1;
  }
};
using Heads = HeadsOf<float>;

// Refuse what is no layout of packed rows.
void require_rows(const char* op, const RowLayout& layout);

// Allocate out [B, N, L, D] with the memory order of `like`: [B, L, N, D] when its tokens are further apart than its
// heads, so that the reshape that follows in a model is a view and not a copy.
inline Strided allocate_like(const mx::array& like, mx::array& out) {
  const int64_t N = out.shape(1), L = out.shape(2), D = out.shape(3);
  if (like.strides(1) >= like.strides(2) || N == 1 || L == 1) {
    allocate(out);
    return {N * L * D, L * D, D};
  }
  mx::Strides strides{L * N * D, D, N * D, 1};
  mx::array::Flags flags{};
  flags.contiguous = true;
  flags.row_contiguous = false;
  flags.col_contiguous = false;
  out.set_data(checked_malloc(out.nbytes()), out.size(), strides, flags);
  return {L * N * D, D, N * D};
}

}  // namespace mcl
