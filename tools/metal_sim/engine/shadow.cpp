// Checked mode: kernels are compiled with the instrumentation of -fsanitize=thread, whose calls end here instead of in
// a sanitizer's runtime. Every byte of the outputs and of threadgroup memory remembers who touched it last and when.
//
// When: an epoch ends at a threadgroup_barrier that names this memory in its mem_flags; within a simdgroup also at such
// a simdgroup_barrier. Two accesses to one byte by different threads, one of them a write and not both atomic, are a race
// where no epoch lies between them. Nothing orders the threadgroups of a launch among themselves.
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void prepare_shadow() {
  if (!engine.threadgroup_cells) engine.threadgroup_cells = (Cell*)calloc(THREADGROUP_ARENA, sizeof(Cell));
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) {
    Buffer& b = engine.launch->buffers[i];
    Placed& p = engine.placed[i];
    if (!b.present) continue;
    if (b.writable)
      p.cells = (Cell*)calloc(b.bytes ? b.bytes : 1, sizeof(Cell));
    else if (b.reads)
      p.last_group = (uint32_t*)calloc(b.bytes ? b.bytes : 1, sizeof(uint32_t));
  }
}

// Report outputs that nobody wrote; free.
void finish_shadow() {
  const bool whole = engine.launch->n_findings == 0;
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) {
    const Buffer& b = engine.launch->buffers[i];
    Placed& p = engine.placed[i];
    uint64_t missing = 0, first = 0;
    if (p.cells && !b.initialised && whole)
      for (uint64_t k = b.bytes; k-- > 0;)
        if (!p.cells[k].write.group) missing++, first = k;
    if (missing)
      find(nullptr, "output '%s': %lu of %lu bytes were never written, the first is byte %lu", b.name,
           (unsigned long)missing, (unsigned long)b.bytes, (unsigned long)first);
    free(p.cells);
    free(p.last_group);
    p.cells = nullptr;
    p.last_group = nullptr;
  }
}

struct Now {  // the access that happens
  Access access;
  bool device;
};

static bool unordered(const Access& before, const Now& now) {
  const Access& a = now.access;
  if (!before.group || (before.atomic && a.atomic)) return false;
  if (before.group != a.group) return now.device;
  if (before.spread == 0 && before.thread == a.thread) return false;
  if (before.epoch != a.epoch) return false;
  const bool same_simdgroup = before.spread < 2 && before.thread / LANES == a.thread / LANES;
  return !(same_simdgroup && before.lane_epoch != a.lane_epoch);
}

// The reads of one epoch are kept as one: by a thread, by several of a simdgroup, by several of the threadgroup.
static void note_read(Access& last, const Access& a) {
  uint8_t spread = 0, atomic = a.atomic;
  if (last.group == a.group && last.epoch == a.epoch && !(last.spread == 0 && last.thread == a.thread)) {
    atomic = last.atomic && a.atomic;
    if (last.spread == 2 || last.thread / LANES != a.thread / LANES)
      spread = 2;
    else if (last.lane_epoch == a.lane_epoch)
      spread = 1;
  }
  last = a;
  last.spread = spread;
  last.atomic = atomic;
}

static bool race(const Access& before, const Now& now, const char* did, const char* does, const char* name, long at) {
  char who[64];
  if (before.group != now.access.group)
    snprintf(who, sizeof who, "another threadgroup");
  else if (before.spread)
    snprintf(who, sizeof who, "several threads");
  else
    snprintf(who, sizeof who, "thread %u", before.thread);
  Finding* made = find(now.access.code, "race: %s of '%s' byte %ld, which %s also %s, with no barrier between", does, name,
                       at, who, did);
  if (made) made->other = before.code;
  return false;
}

// → whether the access is in order; the first byte that is not is enough
static bool check(Cell& cell, const Now& now, bool write, bool fresh_is_wrong, const char* name, long at) {
  if (!now.device && cell.write.group != now.access.group) cell = {};  // of an earlier threadgroup
  if (write) {
    const Access before = cell.write;
    cell.write = now.access;
    if (unordered(before, now)) return race(before, now, "writes", "write", name, at);
    return !unordered(cell.read, now) || race(cell.read, now, "reads", "write", name, at);
  }
  if (!cell.write.group && fresh_is_wrong) {
    find(now.access.code, "read of '%s' byte %ld, which nobody has written", name, at);
    return false;
  }
  if (unordered(cell.write, now)) return race(cell.write, now, "writes", "read", name, at);
  note_read(cell.read, now.access);
  return true;
}

static Now now_of(bool device, bool atomic, const void* code) {
  const Fibre& me = *engine.current;
  const Simdgroup& s = engine.simdgroups[me.index / LANES];
  return {{code, engine.group, device ? engine.device_epoch : engine.threadgroup_epoch,
           device ? s.device_epoch : s.threadgroup_epoch, (uint16_t)me.index, 0, atomic},
          device};
}

static void touch_threadgroup(char* at, uint32_t bytes, bool write, bool atomic, const void* code) {
  const Variable *inside = nullptr, *before = nullptr;
  for (uint32_t i = 0; i < engine.n_variables; i++) {
    const Variable& v = engine.variables[i];
    if (at >= v.base && at + bytes <= v.base + v.bytes) inside = &v;
    if (at >= v.base) before = &v;
  }
  if (!inside) {
    find(code, "out of bounds in threadgroup memory: %s of %u bytes, byte %ld of '%s'", write ? "write" : "read", bytes,
         before ? (long)(at - before->base) : 0l, before ? before->name : "nothing");
    return;
  }
  const Now now = now_of(false, atomic, code);
  for (uint32_t k = 0; k < bytes; k++)
    if (!check(engine.threadgroup_cells[at + k - engine.threadgroup_arena], now, write, true, inside->name,
               (long)(at + k - inside->base)))
      return;
}

static bool touch_buffer(uint32_t i, char* at, uint32_t bytes, bool write, bool atomic, const void* code) {
  Placed& p = engine.placed[i];
  if (!p.mapping || at < p.mapping || at >= p.mapping + p.mapped) return false;
  Buffer& b = engine.launch->buffers[i];
  const long from = (long)(at - p.base);
  if (from < 0 || (uint64_t)from + bytes > b.bytes) {
    find(code, "out of bounds of buffer '%s': %s of %u bytes at byte %ld of %lu", b.name, write ? "write" : "read", bytes,
         from, (unsigned long)b.bytes);
    return true;
  }
  (write ? b.written : b.read) += bytes;
  if (write && !b.writable) {
    find(code, "write to input '%s' byte %ld", b.name, from);
    return true;
  }
  if (p.last_group)
    for (uint32_t k = 0; k < bytes; k++) {
      b.reads[from + k]++;
      if (p.last_group[from + k] != engine.group) b.groups[from + k]++, p.last_group[from + k] = engine.group;
    }
  if (!p.cells) return true;
  const Now now = now_of(true, atomic, code);
  for (uint32_t k = 0; k < bytes; k++)
    if (!check(p.cells[from + k], now, write, !b.initialised, b.name, from + k)) break;
  return true;
}

static void touch(const void* pointer, uint32_t bytes, bool write, bool atomic, const void* code) {
  if (!engine.current || !engine.checked) return;
  engine.last_call = code;
  char* at = (char*)pointer;
  if (at >= engine.threadgroup_arena && at < engine.threadgroup_arena + THREADGROUP_ARENA)
    return touch_threadgroup(at, bytes, write, atomic, code);
  static uint32_t last;
  if (last < engine.launch->n_buffers && touch_buffer(last, at, bytes, write, atomic, code)) return;
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++)
    if (i != last && touch_buffer(i, at, bytes, write, atomic, code)) {
      last = i;
      return;
    }
  // a thread's own stack, or a constant of the program
}

// ── the instrumentation's calls ─────────────────────────────────────────────────────────────────────────────────────
#define HERE __builtin_return_address(0)
// What the compiler takes to be aligned (to 8 bytes at least, or to its size) comes through the calls without
// `unaligned`; wider types have their exact test in undefined.cpp.
static void aligned(const void* p, uint32_t bytes, const void* code) {
  const uint32_t need = bytes < 8 ? bytes : 8;
  if (engine.current && ((uintptr_t)p & (need - 1))) find(code, "misaligned access of %u bytes", bytes);
}
#define ACCESSES(N)                                                                                  \
  extern "C" void __tsan_read##N(void* p) {                                                          \
    aligned(p, N, HERE);                                                                             \
    touch(p, N, false, false, HERE);                                                                 \
  }                                                                                                  \
  extern "C" void __tsan_write##N(void* p) {                                                         \
    aligned(p, N, HERE);                                                                             \
    touch(p, N, true, false, HERE);                                                                  \
  }                                                                                                  \
  extern "C" void __tsan_unaligned_read##N(void* p) { touch(p, N, false, false, HERE); }             \
  extern "C" void __tsan_unaligned_write##N(void* p) { touch(p, N, true, false, HERE); }             \
  extern "C" void __tsan_read_write##N(void* p) {                                                    \
    touch(p, N, false, false, HERE);                                                                 \
    touch(p, N, true, false, HERE);                                                                  \
  }                                                                                                  \
  extern "C" void __tsan_unaligned_read_write##N(void* p) {                                          \
    touch(p, N, false, false, HERE);                                                                 \
    touch(p, N, true, false, HERE);                                                                  \
  }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void* __tsan_memset(void* to, int value, size_t n) {
  touch(to, (uint32_t)n, true, false, HERE);
  return memset(to, value, n);
}
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t n) {
  touch(from, (uint32_t)n, false, false, HERE);
  touch(to, (uint32_t)n, true, false, HERE);
  return memcpy(to, from, n);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t n) {
  touch(from, (uint32_t)n, false, false, HERE);
  touch(to, (uint32_t)n, true, false, HERE);
  return memmove(to, from, n);
}
extern "C" void gpu_atomic_load(const void* at, void* value, unsigned bytes) {
  touch(at, bytes, false, true, HERE);
  memcpy(value, at, bytes);
}
extern "C" void gpu_atomic_store(void* at, const void* value, unsigned bytes) {
  touch(at, bytes, true, true, HERE);
  memcpy(at, value, bytes);
}
