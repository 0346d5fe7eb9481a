// simdgroup_matrix: 8×8, two neighbouring elements of a row in each lane. Which lane holds which is not documented by
// Apple; this is the layout that MLX's own kernels rely on: lane bits 4 3 2 1 0 → row bits 4 2 1, column bits 3 0 and
// the element.
#pragma once
#include "simdgroup.h"

namespace metal {
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "MSL has simdgroup matrices of 8x8 only");
  vec<T, 2> pair;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {  // as MSL: the value on the diagonal
    gpu::Meeting<bool> all(true);
    uint lane = all.view.lane, row = (lane >> 2 & 4) | (lane >> 1 & 3), column = (lane >> 1 & 4) | (lane & 1) << 1;
    pair[0] = row == column ? diagonal : (T)0;
    pair[1] = row == column + 1 ? diagonal : (T)0;
  }
  GPU_FUNC vec<T, 2>& thread_elements() { return pair; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T> GPU_FUNC simdgroup_matrix<T> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T> m;
  m.pair = value;
  return m;
}

GPU_FUNC uint gpu_row(uint lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
GPU_FUNC uint gpu_column(uint lane) { return (lane >> 1 & 4) | (lane & 1) << 1; }
GPU_FUNC uint gpu_holder(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + ((column & 3) >> 1);
}
GPU_FUNC void gpu_need_all(uint active) {
  if (active != 0xffffffffu) gpu_undefined("a simdgroup_matrix operation without all 32 lanes");
}

template <class D, class A, class B, class C>
GPU_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A>& a, simdgroup_matrix<B>& b,
                                            simdgroup_matrix<C>& c) {
  struct Pairs {
    float a[2], b[2];
  };
  gpu::Meeting<Pairs> all(Pairs{{(float)a.pair[0], (float)a.pair[1]}, {(float)b.pair[0], (float)b.pair[1]}});
  gpu_need_all(all.view.active);
  const uint row = gpu_row(all.view.lane), column = gpu_column(all.view.lane);
  float sum[2] = {(float)c.pair[0], (float)c.pair[1]};
  for (uint k = 0; k < 8; k++) {
    const float left = all.of(gpu_holder(row, k)).a[k & 1];
    const Pairs right = all.of(gpu_holder(k, column));
    sum[0] = __builtin_fmaf(left, right.b[0], sum[0]);
    sum[1] = __builtin_fmaf(left, right.b[1], sum[1]);
  }
  d.pair[0] = (D)sum[0];
  d.pair[1] = (D)sum[1];
}
template <class D, class A, class B>
GPU_FUNC void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A>& a, simdgroup_matrix<B>& b) {
  simdgroup_matrix<D> zero = make_filled_simdgroup_matrix((D)0);
  simdgroup_multiply_accumulate(d, a, b, zero);
}
template <class T, class P>
GPU_FUNC void simdgroup_load(simdgroup_matrix<T>& m, P* from, ulong stride = 8, vec<ulong, 2> origin = 0,
                             bool transposed = false) {
  gpu::Meeting<bool> all(true);
  gpu_need_all(all.view.active);
  const ulong row = gpu_row(all.view.lane), column = gpu_column(all.view.lane);
  for (uint e = 0; e < 2; e++) {
    const ulong y = transposed ? column + e : row, x = transposed ? row : column + e;
    m.pair[e] = (T)from[(origin[1] + y) * stride + origin[0] + x];
  }
}
template <class T, class P>
GPU_FUNC void simdgroup_store(simdgroup_matrix<T> m, P* to, ulong stride = 8, vec<ulong, 2> origin = 0,
                              bool transposed = false) {
  gpu::Meeting<bool> all(true);
  gpu_need_all(all.view.active);
  const ulong row = gpu_row(all.view.lane), column = gpu_column(all.view.lane);
  for (uint e = 0; e < 2; e++) {
    const ulong y = transposed ? column + e : row, x = transposed ? row : column + e;
    to[(origin[1] + y) * stride + origin[0] + x] = m.pair[e];
  }
}
}  // namespace metal
