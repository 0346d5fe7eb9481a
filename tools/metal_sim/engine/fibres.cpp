// Threads of a threadgroup as fibres; meetings and barriers between them.
#include "engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Save the callee-saved registers on this stack, go on with another one.
extern "C" void gpu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl gpu_switch
.type gpu_switch, @function
gpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED_WORDS = 6;  // below the return address
#elif defined(__aarch64__)
asm(R"(
.text
.globl gpu_switch
.type gpu_switch, %function
gpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "metal_sim knows how to switch stacks on x86-64 and aarch64"
#endif

Engine engine;

static void go_home() {
  Fibre* me = engine.current;
  engine.launch->meetings++;
  gpu_switch(&me->stack_pointer, engine.home);
}

static void begin() {
  void* arguments[MAX_BUFFERS];
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) arguments[i] = engine.placed[i].base;
  engine.launch->entry(arguments, &engine.current->place);
  engine.current->state = DONE;
  go_home();
  abort();
}

static void make_ready(Fibre& fibre, uint32_t index) {
  if (!fibre.stack) {
    char* mapping;
    size_t mapped;
    fibre.stack = map_guarded(STACK, &mapping, &mapped);
  }
  void** top = (void**)(fibre.stack + STACK);
#if defined(__x86_64__)
  *--top = nullptr;  // keeps the stack as a call would leave it
  *--top = (void*)begin;
  for (int i = 0; i < SAVED_WORDS; i++) *--top = nullptr;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (void*)begin;  // x30
#endif
  fibre.stack_pointer = top;
  fibre.state = READY;
  fibre.index = index;
}

// ── what kernels call ───────────────────────────────────────────────────────────────────────────────────────────────
extern "C" __attribute__((noinline)) void gpu_exchange(const void* value, unsigned bytes, gpu_lanes_view* seen) {
  Fibre* me = engine.current;
  me->value = value;
  me->bytes = bytes;
  me->site = engine.last_call = __builtin_return_address(0);
  me->state = MEETING;
  go_home();
  seen->values = engine.simdgroups[me->index / LANES].values;
  seen->active = me->active;
  seen->lane = me->index % LANES;
}
extern "C" __attribute__((noinline)) void gpu_barrier(unsigned scope, unsigned flags) {
  Fibre* me = engine.current;
  me->flags = flags;
  me->site = engine.last_call = __builtin_return_address(0);
  me->state = scope ? SIMD_BARRIER : GROUP_BARRIER;
  go_home();
}
extern "C" void gpu_undefined(const char* what) { find(__builtin_return_address(0), "%s", what); }

extern "C" void* gpu_threadgroup(const char* name, unsigned key, unsigned bytes) {
  for (uint32_t i = 0; i < engine.n_variables; i++)
    if (engine.variables[i].key == key) return engine.variables[i].base;
  engine.variables_bytes = ((engine.variables_bytes + 15) & ~15u) + bytes;
  if (engine.variables_bytes > engine.launch->threadgroup_bytes) engine.launch->threadgroup_bytes = engine.variables_bytes;
  if (engine.variables_bytes > THREADGROUP_LIMIT)
    find(__builtin_return_address(0), "threadgroup memory over %u bytes: %u at '%s'", THREADGROUP_LIMIT,
         engine.variables_bytes, name);
  if (engine.n_variables == MAX_VARIABLES || engine.variables_top + bytes + VARIABLE_GAP > THREADGROUP_ARENA) {
    find(__builtin_return_address(0), "more threadgroup variables than the simulator holds, at '%s'", name);
    abandon_launch();
  }
  Variable& made = engine.variables[engine.n_variables++];
  made = {name, engine.threadgroup_arena + engine.variables_top, key, bytes};
  engine.variables_top += ((bytes + 15) & ~15u) + VARIABLE_GAP;
  memset(made.base, 0xff, bytes);
  return made.base;
}

// ── scheduling ──────────────────────────────────────────────────────────────────────────────────────────────────────
static uint32_t random_bits;
static uint32_t draw(uint32_t below) {
  random_bits ^= random_bits << 13;
  random_bits ^= random_bits >> 17;
  random_bits ^= random_bits << 5;
  return random_bits % below;
}
static void arrange(uint32_t* order, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) order[i] = engine.launch->order == 1 ? n - 1 - i : i;
  if (engine.launch->order != 2) return;
  for (uint32_t i = n; i > 1; i--) {
    const uint32_t j = draw(i), kept = order[j];
    order[j] = order[i - 1];
    order[i - 1] = kept;
  }
}

// The lanes of a simdgroup all wait, some of them at simdgroup operations: let the first of these happen.
static void meet(uint32_t first, uint32_t end) {
  Fibre *pick = nullptr, *elsewhere = nullptr, *at_barrier = nullptr;
  uint32_t mask = 0, live = 0;
  for (uint32_t i = first; i < end; i++) {
    Fibre& fibre = engine.fibres[i];
    if (fibre.state == DONE) continue;
    live++;
    if (fibre.state == GROUP_BARRIER) {
      at_barrier = &fibre;
    } else if (!pick || (fibre.site == pick->site && fibre.state == pick->state)) {
      if (!pick) pick = &fibre;
      mask |= 1u << (i - first);
    } else {
      elsewhere = &fibre;
    }
  }
  engine.current = pick;
  const uint32_t taking_part = (uint32_t)__builtin_popcount(mask);
  if (at_barrier)
    find(pick->site, "simdgroup operation of %u lanes while %u wait at a threadgroup_barrier", taking_part, live - taking_part);
  else if (elsewhere)
    find(pick->site, "simdgroup operation in divergent control flow: %u of %u lanes", taking_part, live);
  engine.current = nullptr;
  Simdgroup& group = engine.simdgroups[first / LANES];
  if (pick->state == SIMD_BARRIER) {
    if (pick->flags & 2) group.threadgroup_epoch = ++engine.next_epoch;
    if (pick->flags & 1) group.device_epoch = ++engine.next_epoch;
  }
  const bool values = pick->state == MEETING;
  for (uint32_t i = first; i < end; i++) {
    if (!(mask >> (i - first) & 1)) continue;
    Fibre& fibre = engine.fibres[i];
    if (values) memcpy(group.values + 64 * (i - first), fibre.value, fibre.bytes);
    fibre.active = mask;
    fibre.state = READY;
  }
}

// Run one simdgroup until each of its threads has returned or waits for the threadgroup.
static void run_simdgroup(uint32_t s) {
  const uint32_t first = s * LANES, end = first + LANES < engine.n_threads ? first + LANES : engine.n_threads;
  uint32_t order[LANES];
  for (;;) {
    arrange(order, end - first);
    for (uint32_t i = 0; i < end - first; i++) {
      Fibre& fibre = engine.fibres[first + order[i]];
      if (fibre.state != READY) continue;
      engine.current = &fibre;
      gpu_switch(&engine.home, fibre.stack_pointer);
      engine.current = nullptr;
    }
    bool meeting = false;
    for (uint32_t i = first; i < end; i++)
      meeting |= engine.fibres[i].state == MEETING || engine.fibres[i].state == SIMD_BARRIER;
    if (!meeting) return;
    meet(first, end);
  }
}

// Every thread has returned or waits at a threadgroup_barrier. → false when all have returned
static bool pass_barrier() {
  Fibre *pick = nullptr, *elsewhere = nullptr;
  uint32_t waiting = 0;
  for (uint32_t i = 0; i < engine.n_threads; i++) {
    Fibre& fibre = engine.fibres[i];
    if (fibre.state == DONE) continue;
    waiting++;
    if (!pick) pick = &fibre;
    if (fibre.site != pick->site) elsewhere = &fibre;
  }
  if (!pick) return false;
  engine.current = pick;
  if (waiting < engine.n_threads)
    find(pick->site, "threadgroup_barrier reached by %u of %u threads; the others returned", waiting, engine.n_threads);
  if (elsewhere) find(pick->site, "threads of one threadgroup wait at different threadgroup_barriers");
  engine.current = nullptr;
  if (pick->flags & 2) engine.threadgroup_epoch = ++engine.next_epoch;
  if (pick->flags & 1) engine.device_epoch = ++engine.next_epoch;
  for (uint32_t i = 0; i < engine.n_threads; i++)
    if (engine.fibres[i].state == GROUP_BARRIER) engine.fibres[i].state = READY;
  return true;
}

static void place(Fibre& fibre, const uint32_t at[3], const uint32_t size[3], const uint32_t groups[3]) {
  const Launch& launch = *engine.launch;
  const uint32_t i = fibre.index, n = engine.n_threads;
  const uint32_t position[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
  const uint32_t full = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2];
  gpu_place& p = fibre.place;
  memset(&p, 0, sizeof p);
  p.dispatch_quadgroups_per_threadgroup[0] = (full + 3) / 4;
  p.dispatch_simdgroups_per_threadgroup[0] = (full + LANES - 1) / LANES;
  p.quadgroup_index_in_threadgroup[0] = i / 4;
  p.quadgroups_per_threadgroup[0] = (n + 3) / 4;
  p.simdgroup_index_in_threadgroup[0] = i / LANES;
  p.simdgroups_per_threadgroup[0] = (n + LANES - 1) / LANES;
  p.thread_execution_width[0] = p.threads_per_simdgroup[0] = LANES;
  p.thread_index_in_quadgroup[0] = i % 4;
  p.thread_index_in_simdgroup[0] = i % LANES;
  p.thread_index_in_threadgroup[0] = i;
  for (int d = 0; d < 3; d++) {
    p.dispatch_threads_per_threadgroup[d] = launch.threadgroup[d];
    p.grid_size[d] = p.threads_per_grid[d] = launch.grid[d];
    p.thread_position_in_threadgroup[d] = position[d];
    p.thread_position_in_grid[d] = at[d] * launch.threadgroup[d] + position[d];
    p.threadgroup_position_in_grid[d] = at[d];
    p.threadgroups_per_grid[d] = groups[d];
    p.threads_per_threadgroup[d] = size[d];
  }
}

static void run_group(uint64_t number, const uint32_t groups[3]) {
  const Launch& launch = *engine.launch;
  const uint32_t at[3] = {(uint32_t)(number % groups[0]), (uint32_t)(number / groups[0] % groups[1]),
                          (uint32_t)(number / groups[0] / groups[1])};
  uint32_t size[3], n = 1;  // dispatchThreads makes the threadgroups at the edge smaller
  for (int d = 0; d < 3; d++) {
    const uint32_t left = launch.grid[d] - at[d] * launch.threadgroup[d];
    size[d] = left < launch.threadgroup[d] ? left : launch.threadgroup[d];
    n *= size[d];
  }
  engine.n_threads = n;
  engine.group++;
  engine.threadgroup_epoch = ++engine.next_epoch;
  engine.device_epoch = ++engine.next_epoch;
  engine.n_variables = engine.variables_bytes = engine.variables_top = 0;
  for (uint32_t i = 0; i < n; i++) {
    make_ready(engine.fibres[i], i);
    place(engine.fibres[i], at, size, groups);
  }
  uint32_t order[MAX_THREADS / LANES];
  const uint32_t simdgroups = (n + LANES - 1) / LANES;
  do {
    arrange(order, simdgroups);
    for (uint32_t s = 0; s < simdgroups; s++) run_simdgroup(order[s]);
  } while (pass_barrier());
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

void run_all_groups() {
  const Launch& launch = *engine.launch;
  uint32_t groups[3];
  for (int d = 0; d < 3; d++) groups[d] = (launch.grid[d] + launch.threadgroup[d] - 1) / launch.threadgroup[d];
  const uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
  random_bits = launch.seed * 2654435761u + 1;
  uint64_t stride = 1, start = 0;
  if (launch.order == 2 && total > 2) {
    start = draw((uint32_t)total);
    do stride = 1 + draw((uint32_t)total - 1);
    while (greatest_common_divisor(stride, total) != 1);
  }
  for (uint64_t g = 0; g < total; g++)
    run_group(launch.order == 1 ? total - 1 - g : (start + g * stride) % total, groups);
}
