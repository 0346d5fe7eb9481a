// Checked mode: kernels are compiled with the instrumentation of -fsanitize=thread, whose calls end here instead of in
// a sanitizer's runtime. Every byte of the outputs and of threadgroup memory remembers who touched it last and when.
//
// When: an epoch ends at a threadgroup_barrier that names this memory in its mem_flags; within a simdgroup also at such
// a simdgroup_barrier. Two accesses to one byte by different threads, one of them a write and not both atomic, are a race
// where no epoch lies between them. Nothing orders the threadgroups of a launch among themselves.
#include "engine.h"

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

static bool unordered(const Access& before, const Now& now, bool shared_memory) {
  const Access& a = now.access;
  if (!before.group || (before.atomic && a.atomic)) return false;
  if (before.group != a.group) return now.device;
  if (before.spread == 0 && before.thread == a.thread) return false;
  if (before.epoch != a.epoch) return false;
  const bool same_simdgroup = before.spread < 2 && before.thread / LANES == a.thread / LANES;
  (void)shared_memory;
  return !(same_simdgroup && before.lane_epoch != a.lane_epoch);
}

static void note_read(Access& last, const Access& a) {
  const bool together = last.group == a.group && last.epoch == a.epoch;
  const bool same_simdgroup = last.thread / LANES == a.thread / LANES && last.spread < 2;
  uint8_t spread = 0, atomic = a.atomic;
  if (together && !(last.spread == 0 && last.thread == a.thread)) {
    atomic = last.atomic && a.atomic;
    if (!same_simdgroup)
      spread = 2;
    else if (last.lane_epoch == a.lane_epoch)
      spread = 1;
  }
  last = a;
  last.spread = spread;
  last.atomic = atomic;
}

static const char* other(const Access& before, const Access& a, char* text, size_t size);

static bool check(Cell& cell, const Now& now, bool write, bool fresh_is_wrong, uint32_t epoch_group, const char* name,
                  long at, const void* code) {
  char who[64];
  if (!now.device && cell.write.group != epoch_group) cell = {};  // of an earlier threadgroup
  if (write) {
    const bool twice = unordered(cell.write, now, !now.device);
    if (twice || unordered(cell.read, now, !now.device)) {
      find(code, "race: write of '%s' byte %ld, which %s also %s, with no barrier between", name, at,
           other(twice ? cell.write : cell.read, now.access, who, sizeof who), twice ? "writes" : "reads");
      cell.write = now.access;
      return false;
    }
    cell.write = now.access;
    return true;
  }
  if (!cell.write.group && fresh_is_wrong) {
    find(code, "read of '%s' byte %ld, which nobody has written", name, at);
    return false;
  }
  if (unordered(cell.write, now, !now.device)) {
    find(code, "race: read of '%s' byte %ld, which %s also writes, with no barrier between", name, at,
         other(cell.write, now.access, who, sizeof who));
    return false;
  }
  note_read(cell.read, now.access);
  return true;
}

#include <stdio.h>
static const char* other(const Access& before, const Access& a, char* text, size_t size) {
  if (before.group != a.group)
    snprintf(text, size, "another threadgroup");
  else if (before.spread == 0)
    snprintf(text, size, "thread %u", before.thread);
  else
    snprintf(text, size, "several threads");
  return text;
}

static Now now_of(bool device, bool atomic) {
  const Fibre& me = *engine.current;
  const Simdgroup& s = engine.simdgroups[me.index / LANES];
  return {{engine.group, device ? engine.device_epoch : engine.threadgroup_epoch,
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
  const Now now = now_of(false, atomic);
  for (uint32_t k = 0; k < bytes; k++)
    if (!check(engine.threadgroup_cells[at + k - engine.threadgroup_arena], now, write, true, engine.group, inside->name,
               (long)(at + k - inside->base), code))
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
  const Now now = now_of(true, atomic);
  for (uint32_t k = 0; k < bytes; k++)
    if (!check(p.cells[from + k], now, write, !b.initialised, engine.group, b.name, from + k, code)) break;
  return true;
}

static void touch(const void* pointer, uint32_t bytes, bool write, bool atomic, const void* code) {
  if (!engine.current || !engine.checked) return;
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
#define ACCESSES(N)                                                                                  \
  extern "C" void __tsan_read##N(void* p) { touch(p, N, false, false, HERE); }                       \
  extern "C" void __tsan_write##N(void* p) { touch(p, N, true, false, HERE); }                       \
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
extern "C" void gpu_atomic(const void* at, unsigned bytes, unsigned writes) { touch(at, bytes, writes, true, HERE); }
