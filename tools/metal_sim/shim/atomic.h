// Atomics of MSL. One thread runs at a time here, so plain accesses do; the engine is told that they are atomic.
#pragma once
#include "calls.h"
#include "math.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

template <class T> GPU_FUNC T gpu_fetch(const void* at) {
  T value;
  gpu_atomic_load(at, &value, sizeof(T));
  return value;
}
template <class T> GPU_FUNC void gpu_put(void* at, T value) { gpu_atomic_store(at, &value, sizeof(T)); }
#define GPU_ATOMIC_IN(SPACE, F, EXPR)                                                              \
  template <class T, class U> GPU_FUNC T F(__attribute__((SPACE)) atomic<T>* at, U operand, memory_order) { \
    T x = gpu_fetch<T>((const void*)at), y = (T)operand;                                           \
    gpu_put<T>((void*)at, (T)(EXPR));                                                              \
    return x;                                                                                      \
  }
#define GPU_ATOMIC(F, EXPR) GPU_ATOMIC_IN(opencl_global, F, EXPR) GPU_ATOMIC_IN(opencl_local, F, EXPR)
GPU_ATOMIC(atomic_fetch_add_explicit, x + y) GPU_ATOMIC(atomic_fetch_sub_explicit, x - y)
GPU_ATOMIC(atomic_fetch_max_explicit, max(x, y)) GPU_ATOMIC(atomic_fetch_min_explicit, min(x, y))
GPU_ATOMIC(atomic_fetch_or_explicit, x | y) GPU_ATOMIC(atomic_fetch_and_explicit, x & y)
GPU_ATOMIC(atomic_fetch_xor_explicit, x ^ y) GPU_ATOMIC(atomic_exchange_explicit, y)
#define GPU_ATOMIC_PLAIN(SPACE)                                                                            \
  template <class T> GPU_FUNC T atomic_load_explicit(const __attribute__((SPACE)) atomic<T>* at, memory_order) { \
    return gpu_fetch<T>((const void*)at);                                                                  \
  }                                                                                                        \
  template <class T, class U>                                                                              \
  GPU_FUNC void atomic_store_explicit(__attribute__((SPACE)) atomic<T>* at, U v, memory_order) {           \
    gpu_put<T>((void*)at, (T)v);                                                                           \
  }                                                                                                        \
  template <class T, class U>                                                                              \
  GPU_FUNC bool atomic_compare_exchange_weak_explicit(__attribute__((SPACE)) atomic<T>* at, T* expected, U v, \
                                                      memory_order, memory_order) {                        \
    T x = gpu_fetch<T>((const void*)at);                                                                   \
    const bool same = __builtin_memcmp(&x, expected, sizeof(T)) == 0;                                      \
    if (same) gpu_put<T>((void*)at, (T)v);                                                                 \
    *expected = x;                                                                                         \
    return same;                                                                                           \
  }
GPU_ATOMIC_PLAIN(opencl_global) GPU_ATOMIC_PLAIN(opencl_local)
#undef GPU_ATOMIC
#undef GPU_ATOMIC_IN
#undef GPU_ATOMIC_PLAIN
}  // namespace metal
