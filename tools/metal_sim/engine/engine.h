// The engine runs a compiled kernel as a GPU would, one thread after the other: every GPU thread is a fibre, a
// simdgroup operation is a meeting of 32 fibres, a barrier one of all of a threadgroup. No C++ library is used, so any
// clang builds it within a second.
#pragma once
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#include "../shim/place.h"

constexpr uint32_t LANES = 32, MAX_THREADS = 1024, MAX_BUFFERS = 31, MAX_VARIABLES = 64, MAX_FINDINGS = 64;
constexpr uint32_t THREADGROUP_LIMIT = 32768;        // bytes; what every Apple GPU has
constexpr size_t PAGE = 65536;                       // a multiple of the page size of x86-64 and of aarch64
constexpr size_t GUARD = 16 << 20, STACK = 256 << 10;  // bytes
constexpr size_t THREADGROUP_ARENA = 1 << 20, VARIABLE_GAP = 256;

// ── what Python fills in and reads (launch.py has the same structures) ───────────────────────────────────────────────
struct Buffer {
  const char* name;
  char* data;             // the caller's memory
  uint64_t bytes;
  uint32_t present, writable, initialised, unused;
  uint32_t* reads;        // checked mode, inputs: [bytes] how often each byte was read, or null
  uint32_t* groups;       // checked mode, inputs: [bytes] how many threadgroups read it, or null
  uint64_t read, written;  // bytes requested
};
struct Finding {
  char text[256];
  const void* code;   // the return address of the call that reports, 0 where unknown
  const void* other;  // of the access that a race is with, or the last call before a signal
  uint32_t group[3], thread, located, count;
};
using Entry = void (*)(void* const* buffers, const gpu_place* place);
struct Launch {
  Entry entry;
  Buffer* buffers;
  uint32_t n_buffers, grid[3], threadgroup[3];
  uint32_t order, seed, checked, cpu_ms;  // order 0 forward, 1 backward, 2 shuffled; cpu_ms 0 for no limit
  Finding* findings;                      // [MAX_FINDINGS], one for each place and kind
  uint32_t n_findings, threadgroup_bytes;
  uint64_t meetings;
};

// ── the state of the launch that runs ───────────────────────────────────────────────────────────────────────────────
enum State : uint32_t { READY, MEETING, SIMD_BARRIER, GROUP_BARRIER, DONE };
struct Fibre {
  void* stack_pointer;
  char* stack;  // its lowest byte; GUARD bytes below it are out of bounds
  State state;
  const void* site;   // the call at which it waits
  const void* value;  // MEETING: what it hands over
  uint32_t bytes, flags, active, index;
  gpu_place place;
};
struct Access {  // the last access of one kind to one byte
  const void* code;
  uint32_t group, epoch, lane_epoch;
  uint16_t thread;
  uint8_t spread;  // 0 one thread, 1 several of one simdgroup, 2 several of the threadgroup
  uint8_t atomic;
};
struct Cell {
  Access write, read;
};
struct Placed {  // a buffer between guards
  char *mapping, *base;
  size_t mapped;
  Cell* cells;           // outputs of checked mode
  uint32_t* last_group;  // inputs of checked mode
};
struct Variable {  // of the threadgroup
  const char* name;
  char* base;
  uint32_t key, bytes;
};
struct Simdgroup {
  unsigned char values[64 * LANES];
  uint32_t threadgroup_epoch, device_epoch;
};
struct Engine {
  Launch* launch;
  void* home;  // stack pointer of the scheduler
  Fibre* current;
  const void* last_call;  // of the kernel into the engine
  uint32_t n_threads, group, threadgroup_epoch, device_epoch, next_epoch;
  uint32_t n_variables, variables_bytes, variables_top;
  bool checked;
  Fibre fibres[MAX_THREADS];
  Simdgroup simdgroups[MAX_THREADS / LANES];
  Variable variables[MAX_VARIABLES];
  Placed placed[MAX_BUFFERS];
  char* threadgroup_arena;   // THREADGROUP_ARENA bytes between guards
  Cell* threadgroup_cells;   // one for each of its bytes, in checked mode
  sigjmp_buf abandon;
};
extern Engine engine;

// fibres.cpp
void run_all_groups();
// findings.cpp
__attribute__((format(printf, 2, 3))) Finding* find(const void* code, const char* format, ...);
[[noreturn]] void abandon_launch();
// launch.cpp
char* map_guarded(size_t bytes, char** mapping, size_t* mapped);
