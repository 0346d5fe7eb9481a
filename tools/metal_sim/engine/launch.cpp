// One launch: buffers between guard pages, signals as findings, and the call from Python.
#include "engine.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

void prepare_shadow();
void finish_shadow();

static size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Bytes whose end lies at the end of their last page (but for alignment to 16), with GUARD bytes out of bounds around.
char* map_guarded(size_t bytes, char** mapping, size_t* mapped) {
  const size_t rounded = (bytes + 15) & ~(size_t)15, pages = whole_pages(rounded ? rounded : 1);
  *mapped = pages + 2 * GUARD;
  *mapping = (char*)mmap(nullptr, *mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*mapping == MAP_FAILED || mprotect(*mapping + GUARD, pages, PROT_READ | PROT_WRITE)) {
    find(nullptr, "no address space for %zu bytes", bytes);
    abandon_launch();
  }
  return *mapping + GUARD + pages - rounded;
}

static const void* where(void* context) {
  const ucontext_t* c = (const ucontext_t*)context;
#if defined(__x86_64__)
  return (const void*)(c->uc_mcontext.gregs[REG_RIP] + 1);
#else
  return (const void*)(c->uc_mcontext.pc + 1);
#endif
}

static Finding* explain(int signal_number, const char* at, const void* code) {
  if (signal_number == SIGILL || signal_number == SIGTRAP) return find(code, "out of bounds of an array of this thread");
  if (signal_number == SIGFPE) return find(code, "integer division by zero");
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) {
    const Placed& b = engine.placed[i];
    if (b.mapping && at >= b.mapping && at < b.mapping + b.mapped)
      return find(code, "out of bounds of buffer '%s': byte %ld of %lu", engine.launch->buffers[i].name,
                  (long)(at - b.base), (unsigned long)engine.launch->buffers[i].bytes);
  }
  const char* stack = engine.current->stack;
  if (at < stack && at >= stack - GUARD) return find(code, "stack overflow: recursion, or arrays too large for a thread");
  if (at >= engine.threadgroup_arena - GUARD && at < engine.threadgroup_arena + THREADGROUP_ARENA + GUARD)
    return find(code, "out of bounds of threadgroup memory");
  return find(code, "access to an address that belongs to nothing");
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!engine.current) {  // not a kernel's: let it kill the process
    signal(signal_number, SIG_DFL);
    return;
  }
  Finding* made = explain(signal_number, (const char*)info->si_addr, where(context));
  if (made) made->other = engine.last_call;
  abandon_launch();
}

static void on_time(int, siginfo_t*, void* context) {
  if (!engine.current) return;
  Finding* made =
      find(where(context), "still running after %u ms of CPU time: an endless loop?", engine.launch->cpu_ms);
  if (made) made->other = engine.last_call;
  abandon_launch();
}

static const int FAULTS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
constexpr int N_FAULTS = sizeof FAULTS / sizeof *FAULTS;
struct Handlers {
  struct sigaction before[N_FAULTS], before_time;
  stack_t before_stack;
  itimerval before_timer;
};

static void take_signals(Handlers& kept) {
  static char stack[1 << 17];
  stack_t mine{};
  mine.ss_sp = stack;
  mine.ss_size = sizeof stack;
  sigaltstack(&mine, &kept.before_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < N_FAULTS; i++) sigaction(FAULTS[i], &action, &kept.before[i]);
  action.sa_sigaction = on_time;
  sigaction(SIGVTALRM, &action, &kept.before_time);
  const uint32_t ms = engine.launch->cpu_ms;
  itimerval timer{{0, 0}, {(long)(ms / 1000), (long)(ms % 1000) * 1000}};
  setitimer(ITIMER_VIRTUAL, &timer, &kept.before_timer);
}
static void give_signals_back(const Handlers& kept) {
  setitimer(ITIMER_VIRTUAL, &kept.before_timer, nullptr);
  sigaction(SIGVTALRM, &kept.before_time, nullptr);
  for (int i = 0; i < N_FAULTS; i++) sigaction(FAULTS[i], &kept.before[i], nullptr);
  sigaltstack(&kept.before_stack, nullptr);
}

static void place_buffers() {
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) {
    const Buffer& b = engine.launch->buffers[i];
    Placed& p = engine.placed[i];
    if (!b.present) continue;
    p.base = map_guarded(b.bytes, &p.mapping, &p.mapped);
    memcpy(p.base, b.data, b.bytes);
  }
  if (!engine.threadgroup_arena) {
    char* mapping;
    size_t mapped;
    engine.threadgroup_arena = map_guarded(THREADGROUP_ARENA, &mapping, &mapped);
  }
}
static void take_buffers_back() {
  for (uint32_t i = 0; i < engine.launch->n_buffers; i++) {
    const Buffer& b = engine.launch->buffers[i];
    Placed& p = engine.placed[i];
    if (p.base && b.writable) memcpy(b.data, p.base, b.bytes);
    if (p.mapping) munmap(p.mapping, p.mapped);
    p = {};
  }
}

extern "C" void gpu_launch(Launch* launch) {
  Handlers kept;
  memset(engine.placed, 0, sizeof engine.placed);
  engine.launch = launch;
  engine.checked = launch->checked;
  engine.current = nullptr;
  engine.last_call = nullptr;
  if (!sigsetjmp(engine.abandon, 1)) {
    place_buffers();
    if (engine.checked) prepare_shadow();
    take_signals(kept);
    if (!sigsetjmp(engine.abandon, 1)) run_all_groups();
    give_signals_back(kept);
  }
  engine.current = nullptr;
  if (engine.checked) finish_shadow();
  take_buffers_back();
  engine.launch = nullptr;
}
