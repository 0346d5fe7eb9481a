// The words of Metal that kernels shared with CUDA use, for NVRTC. The kernels themselves are translated from metal/*.metal when
// they are loaded (kernels/gpu/dialect.py). MLX puts this at file scope, after its own utils.cuh.

typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;

#define METAL_FUNC __device__ __forceinline__

// Metal's attributes of a thread, as locals. A simdgroup is a warp: threadgroups are 32 threads wide.
#define METAL_ATTRIBUTES                                                               \
  const uint thread_index_in_simdgroup = threadIdx.x;                                  \
  const uint simdgroup_index_in_threadgroup = threadIdx.y;                             \
  const uint3 thread_position_in_threadgroup = threadIdx;                              \
  const uint3 threadgroup_position_in_grid = blockIdx;                                 \
  const dim3 threadgroups_per_grid = gridDim;                                          \
  (void)thread_index_in_simdgroup;                                                     \
  (void)simdgroup_index_in_threadgroup;                                                \
  (void)thread_position_in_threadgroup;                                                \
  (void)threadgroup_position_in_grid;                                                  \
  (void)threadgroups_per_grid;

enum class mem_flags { mem_threadgroup };

METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename X>
METAL_FUNC X simd_shuffle(X x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <typename X>
METAL_FUNC X simd_shuffle_xor(X x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

namespace metal {
METAL_FUNC int min(int a, int b) {
  return a < b ? a : b;
}
METAL_FUNC int max(int a, int b) {
  return a < b ? b : a;
}
METAL_FUNC float min(float a, float b) {
  return fminf(a, b);
}
METAL_FUNC float max(float a, float b) {
  return fmaxf(a, b);
}
METAL_FUNC float clamp(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}
METAL_FUNC float rint(float x) {
  return rintf(x);
}
namespace fast {
METAL_FUNC float exp2(float x) {
  return exp2f(x);
}
} // namespace fast
} // namespace metal

METAL_FUNC float simd_min(float x) {
  for (int d = 16; d > 0; d /= 2) {
    x = fminf(x, __shfl_xor_sync(0xffffffffu, x, d));
  }
  return x;
}
METAL_FUNC float simd_max(float x) {
  for (int d = 16; d > 0; d /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  }
  return x;
}
