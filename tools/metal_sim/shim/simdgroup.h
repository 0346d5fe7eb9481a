// Barriers, and what the lanes of a simdgroup or a quadgroup tell each other.
#pragma once
#include "calls.h"
#include "math.h"

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
GPU_FUNC mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
GPU_FUNC void threadgroup_barrier(mem_flags flags) { gpu_barrier(0, (uint)flags); }
GPU_FUNC void simdgroup_barrier(mem_flags flags) { gpu_barrier(1, (uint)flags); }

struct simd_vote {
  ulong bits;
  constexpr simd_vote(ulong b = 0) : bits(b) {}
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};

// Reductions halve the lanes five times. Apple's order is not documented: results may differ in the last bits.
#define GPU_REDUCTION(F, EXPR)                                          \
  template <class T> GPU_FUNC T F(T mine) {                             \
    gpu::Meeting<T> all(mine);                                          \
    T t[32];                                                            \
    uint here = all.view.active;                                        \
    for (uint i = 0; i < 32; i++)                                       \
      if (here >> i & 1) t[i] = all.of(i);                              \
    for (uint half_way = 16; half_way; half_way >>= 1)                  \
      for (uint i = 0; i < half_way; i++) {                             \
        if (!(here >> (i + half_way) & 1)) continue;                    \
        if (here >> i & 1) {                                            \
          T x = t[i], y = t[i + half_way];                              \
          t[i] = (T)(EXPR);                                             \
        } else {                                                        \
          t[i] = t[i + half_way];                                       \
          here |= 1u << i;                                              \
        }                                                               \
      }                                                                 \
    return t[0];                                                        \
  }
GPU_REDUCTION(simd_sum, x + y) GPU_REDUCTION(simd_product, x * y) GPU_REDUCTION(simd_max, max(x, y))
GPU_REDUCTION(simd_min, min(x, y)) GPU_REDUCTION(simd_and, x & y) GPU_REDUCTION(simd_or, x | y)
GPU_REDUCTION(simd_xor, x ^ y)
#undef GPU_REDUCTION

template <class T> GPU_FUNC T simd_broadcast(T v, ushort lane) { return gpu::Meeting<T>(v).read(lane); }
template <class T> GPU_FUNC T simd_broadcast_first(T v) {
  gpu::Meeting<T> all(v);
  return all.of(__builtin_ctz(all.view.active));
}
template <class T> GPU_FUNC T simd_shuffle(T v, ushort lane) { return gpu::Meeting<T>(v).read(lane); }
template <class T> GPU_FUNC T simd_shuffle_xor(T v, ushort mask) {
  gpu::Meeting<T> all(v);
  return all.read(all.view.lane ^ mask);
}
// Past either end MSL leaves the value undefined; Apple's GPUs give the lane its own.
template <class T> GPU_FUNC T simd_shuffle_down(T v, ushort by) {
  gpu::Meeting<T> all(v);
  uint from = all.view.lane + by;
  return from < 32 ? all.read(from) : v;
}
template <class T> GPU_FUNC T simd_shuffle_up(T v, ushort by) {
  gpu::Meeting<T> all(v);
  return all.view.lane >= by ? all.read(all.view.lane - by) : v;
}
template <class T> GPU_FUNC T simd_shuffle_rotate_down(T v, ushort by) {
  gpu::Meeting<T> all(v);
  return all.read(all.view.lane + by & 31);
}
template <class T> GPU_FUNC T simd_shuffle_rotate_up(T v, ushort by) {
  gpu::Meeting<T> all(v);
  return all.read(all.view.lane - by & 31);
}
template <class T> struct gpu_pair {
  T value, fill;
};
template <class T> GPU_FUNC T simd_shuffle_and_fill_down(T v, T fill, ushort by) {
  gpu::Meeting<gpu_pair<T>> all({v, fill});
  const uint from = all.view.lane + by;
  return from < 32 ? all.read(from).value : all.read(from - 32).fill;
}
template <class T> GPU_FUNC T simd_shuffle_and_fill_up(T v, T fill, ushort by) {
  gpu::Meeting<gpu_pair<T>> all({v, fill});
  const uint lane = all.view.lane;
  return lane >= by ? all.read(lane - by).value : all.read(32 + lane - by).fill;
}
template <class T> GPU_FUNC T simd_prefix_exclusive_sum(T v) {
  gpu::Meeting<T> all(v);
  T sum = 0;
  for (uint i = 0; i < all.view.lane; i++)
    if (all.has(i)) sum = (T)(sum + all.of(i));
  return sum;
}
template <class T> GPU_FUNC T simd_prefix_inclusive_sum(T v) { return (T)(simd_prefix_exclusive_sum(v) + v); }
GPU_FUNC simd_vote simd_ballot(bool b) {
  gpu::Meeting<bool> all(b);
  ulong bits = 0;
  for (uint i = 0; i < 32; i++)
    if (all.has(i) && all.of(i)) bits |= 1ul << i;
  return bits;
}
GPU_FUNC bool simd_all(bool b) { return !simd_ballot(!b).any(); }
GPU_FUNC bool simd_any(bool b) { return simd_ballot(b).any(); }
GPU_FUNC simd_vote simd_active_threads_mask() { return simd_ballot(true); }
GPU_FUNC bool simd_is_first() {
  gpu::Meeting<bool> all(true);
  return all.view.lane == (uint)__builtin_ctz(all.view.active);
}

template <class T> GPU_FUNC T quad_broadcast(T v, ushort lane) {
  gpu::Meeting<T> all(v);
  return all.read((all.view.lane & ~3u) + lane);
}
template <class T> GPU_FUNC T quad_shuffle(T v, ushort lane) { return quad_broadcast(v, lane); }
template <class T> GPU_FUNC T quad_shuffle_xor(T v, ushort mask) {
  gpu::Meeting<T> all(v);
  return all.read(all.view.lane ^ (mask & 3));
}
#define GPU_QUAD(F, EXPR)                          \
  template <class T> GPU_FUNC T F(T mine) {        \
    gpu::Meeting<T> all(mine);                     \
    uint first = all.view.lane & ~3u;              \
    T x = all.read(first);                         \
    for (uint i = 1; i < 4; i++) {                 \
      T y = all.read(first + i);                   \
      x = (T)(EXPR);                               \
    }                                              \
    return x;                                      \
  }
GPU_QUAD(quad_sum, x + y) GPU_QUAD(quad_max, max(x, y)) GPU_QUAD(quad_min, min(x, y))
#undef GPU_QUAD
}  // namespace metal
