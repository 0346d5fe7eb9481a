// The thread pool that every kernel and the BLAS share, so that they never compete for cores.
#pragma once
#include <cstdint>

#define MCL_API __attribute__((visibility("default")))

extern "C" MCL_API int mcl_cpu_limit(const char* groups, const char* root);  // see pool.cpp; 0: no limit

namespace mcl {

// A moment of waiting in a loop.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that work at once, the caller included: MLX_CODELLAMA_THREADS, or the physical cores this process may use; fewer
// where the system does not give so many.
MCL_API int threads();

// Run body(context, i) for i in [0, n), in any order, on up to threads() threads; returns when all are done.
// Tasks must not wait for each other: a call made while the pool is busy (or from inside a task) runs on the caller alone.
// What a task throws is thrown here, when no task runs any more; of several exceptions the first.
MCL_API void parallel(int64_t n, void (*body)(void* context, int64_t i), void* context);

template <class F>
void parallel(int64_t n, F& f) {
  parallel(n, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, static_cast<void*>(&f));
}

// Cut [0, n) into pieces of at least `grain` and run f(begin, end) on each; several pieces per thread, so that a core
// taken by another process delays one piece and not half of the work.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  int64_t pieces = n / (grain > 0 ? grain : 1);
  const int64_t most = threads() == 1 ? 1 : 4 * threads();
  if (pieces > most) pieces = most;
  if (pieces < 1) pieces = 1;
  auto body = [&](int64_t i) { f(n * i / pieces, n * (i + 1) / pieces); };
  parallel(pieces, body);
}

}  // namespace mcl
