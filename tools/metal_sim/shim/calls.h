// What a compiled kernel calls in the engine, and how the engine hands it its arguments.
#pragma once
#include "place.h"
#include "types.h"

extern "C" {
// Hand `bytes` (at most 64) to the other lanes of the simdgroup that reach this very call, and see theirs.
__attribute__((convergent, nodebug)) void gpu_exchange(const void* value, unsigned bytes, gpu_lanes_view* seen);
// scope 0: all threads of the threadgroup; 1: the simdgroup. `flags` are the bits of metal::mem_flags.
__attribute__((convergent, nodebug)) void gpu_barrier(unsigned scope, unsigned flags);
// The threadgroup's variable number `key`, made by the first thread that asks for it.
__attribute__((nodebug)) void* gpu_threadgroup(const char* name, unsigned key, unsigned bytes);
// The kernel did what MSL leaves undefined.
__attribute__((nodebug)) void gpu_undefined(const char* what);
// An atomic access: not a race with other atomic ones.
__attribute__((nodebug)) void gpu_atomic_load(const void* at, void* value, unsigned bytes);
__attribute__((nodebug)) void gpu_atomic_store(void* at, const void* value, unsigned bytes);
}

namespace gpu {
struct Buffer {
  void* at;
  template <class P> operator P*() const { return (P*)at; }
};
struct Reference {
  void* at;
  template <class R> operator R&() const { return *(R*)at; }
};
struct Number {
  const unsigned* at;
  operator uint() const { return at[0]; }
  operator ushort() const { return (ushort)at[0]; }
};
struct Triple {
  const unsigned* at;
  operator uint() const { return at[0]; }
  operator ushort() const { return (ushort)at[0]; }
  operator uint2() const { return metal::vec_of<uint, 2>(at[0], at[1]); }
  operator uint3() const { return metal::vec_of<uint, 3>(at[0], at[1], at[2]); }
  operator ushort2() const { return metal::vec_of<ushort, 2>(at[0], at[1]); }
  operator ushort3() const { return metal::vec_of<ushort, 3>(at[0], at[1], at[2]); }
};

// One meeting of the lanes of a simdgroup: every lane's value of a T, until the simdgroup's next meeting.
template <class T> struct Meeting {
  gpu_lanes_view view;
  explicit GPU_FUNC Meeting(T mine) {
    static_assert(sizeof(T) <= 64, "a lane hands over at most 64 bytes");
    gpu_exchange(&mine, sizeof(T), &view);
  }
  GPU_FUNC bool has(uint lane) const { return lane < 32 && (view.active >> lane & 1); }
  GPU_FUNC T of(uint lane) const {
    T value;
    __builtin_memcpy(&value, view.values + 64 * lane, sizeof(T));
    return value;
  }
  GPU_FUNC T read(uint lane) const {
    if (has(lane)) return of(lane);
    gpu_undefined("a lane is read that takes no part in this simdgroup operation");
    return T{};
  }
};
}  // namespace gpu
