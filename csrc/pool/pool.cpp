#include "pool/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <utility>

namespace {

// Cores that a control group allows, rounded up: FILE holds "quota period" (version 2), or quota and PERIOD the period.
// 0: no limit.
int limit_of(const std::string& file, const std::string& period_file) {
  long quota = 0, period = 0;
  if (FILE* f = std::fopen(file.c_str(), "r")) {
    if (std::fscanf(f, "%ld %ld", &quota, &period) < 1) quota = 0;  // "max": none
    std::fclose(f);
  }
  if (FILE* f = period_file.empty() ? nullptr : std::fopen(period_file.c_str(), "r")) {
    if (std::fscanf(f, "%ld", &period) != 1) period = 0;
    std::fclose(f);
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

}  // namespace

// The least limit of this process's control group and those above it. GROUPS is the list of its groups, "id:controllers:path"
// (a container may see paths of the machine that it cannot reach: then the root is its own), ROOT where they are mounted.
extern "C" int mcl_cpu_limit(const char* groups, const char* root) {
  int least = 0;
  const auto look = [&least](const std::string& file, const std::string& period_file) {
    const int limit = limit_of(file, period_file);
    if (limit > 0 && (least == 0 || limit < least)) least = limit;
  };
  FILE* f = std::fopen(groups, "r");
  if (!f) return 0;
  char text[4096];
  while (std::fgets(text, sizeof text, f)) {
    std::string line(text);
    while (!line.empty() && line.back() == '\n') line.pop_back();
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool unified = controllers.empty();
    if (!unified && (',' + controllers + ',').find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    for (;;) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      if (unified) {
        look(root + path + "/cpu.max", "");
      } else {
        for (const std::string& mount : {std::string("cpu"), controllers}) {
          const std::string at = root + ('/' + mount) + path;
          look(at + "/cpu.cfs_quota_us", at + "/cpu.cfs_period_us");
        }
      }
      if (path.empty()) break;
      const size_t cut = path.rfind('/');
      path.resize(cut == std::string::npos ? 0 : cut);
    }
  }
  std::fclose(f);
  return least;
}

namespace mcl {
namespace {

constexpr uint64_t kClosed = 0xffffffff;  // no task has this number: n is below it
constexpr int kSpins = 1000;  // some 20 µs; longer spinning robs other processes

// Cores this process may use, hyper-threads of one core counted once, capped by the quota of its control group.
int physical_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  int cores = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    int first = cpu;
    const std::string path = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
    if (FILE* f = std::fopen(path.c_str(), "r")) {
      if (std::fscanf(f, "%d", &first) != 1) first = cpu;
      std::fclose(f);
    }
    cores += first == cpu || !CPU_ISSET(first, &allowed);
  }
  const int limit = mcl_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup");
  if (limit > 0 && limit < cores) cores = limit;
  return cores < 1 ? 1 : cores;
}

constexpr long kMostThreads = 1024;

int wanted_threads() {
  const char* text = std::getenv("MLX_CODELLAMA_THREADS");
  if (!text || !*text) return physical_cores();
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end == 0 && n >= 1 && n <= kMostThreads) return static_cast<int>(n);
  const int cores = physical_cores();
  std::fprintf(stderr, "mlx_codellama_cpu: MLX_CODELLAMA_THREADS is '%s', not a number from 1 to %ld; using %d\n", text,
               kMostThreads, cores);
  return cores;
}

// The stack of a pool's thread: glibc's own default, also where `ulimit -s` is far smaller or larger. It holds the libraries'
// thread-local memory as well.
constexpr size_t kStackBytes = size_t{2} << 20;

thread_local bool inside_ = false;  // nested parallel regions run inline

// One job at a time. `ticket_` holds the job's number in its upper half and the next task in its lower half, so a worker
// that wakes late can neither take a task of another job nor make anybody wait for it.
class Pool {
 public:
  // As many threads as the system gives (`ulimit -u`, `ulimit -v`, a control group's pids.max); the caller alone works too.
  explicit Pool(int n_threads) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, kStackBytes);
    const auto entry = [](void* self) -> void* {
      inside_ = true;  // and so the thread gets this library's thread-local memory now: glibc ends the process where it cannot
      static_cast<Pool*>(self)->work();
      return nullptr;
    };
    for (pthread_t thread; size_ < n_threads && pthread_create(&thread, &attributes, entry, this) == 0;) ++size_;
    pthread_attr_destroy(&attributes);
  }
  int size() const { return size_; }

  // False when another thread's job is running. Throws what a task threw, once all are done.
  bool run(int64_t n, void (*body)(void*, int64_t), void* context) {
    if (!owner_.try_lock()) return false;
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    left_.store(n, std::memory_order_relaxed);
    n_.store(n, std::memory_order_release);
    {
      std::lock_guard<std::mutex> hold(mutex_);
      ticket_.store(job << 32, std::memory_order_release);
    }
    wake_.notify_all();
    drain(static_cast<uint32_t>(job));
    for (int i = 0; i < kSpins && left_.load(std::memory_order_acquire) != 0; ++i) relax();
    if (left_.load(std::memory_order_acquire) != 0) {
      std::unique_lock<std::mutex> hold(mutex_);
      done_.wait(hold, [this] { return left_.load(std::memory_order_acquire) == 0; });
    }
    // Close the job: a late worker that still looks at its ticket must not take the next job's n for this one's.
    ticket_.store((job << 32) | kClosed, std::memory_order_relaxed);
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    owner_.unlock();
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  void drain(uint32_t job) {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (static_cast<uint32_t>(ticket >> 32) != job) return;
      const int64_t i = static_cast<uint32_t>(ticket);
      if (i >= n_.load(std::memory_order_acquire)) return;
      auto* body = body_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      // Success proves that the job was still open (a closed one has another ticket, written before the next job's n),
      // and so that n, body and context were this job's.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      try {
        body(context, i);
      } catch (...) {  // it must not end the thread; `left_` hands it over to `run`
        if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
      }
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        { std::lock_guard<std::mutex> hold(mutex_); }
        done_.notify_one();
      }
    }
  }

  uint32_t job() const { return static_cast<uint32_t>(ticket_.load(std::memory_order_acquire) >> 32); }

  void work() {
    uint32_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && job() == seen; ++i) relax();
      if (job() == seen) {
        std::unique_lock<std::mutex> hold(mutex_);
        wake_.wait(hold, [&] { return job() != seen; });
      }
      seen = job();
      drain(seen);
    }
  }

  int size_ = 1;
  std::exception_ptr failure_;  // the first of this job
  std::atomic<bool> failed_{false};
  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<void (*)(void*, int64_t)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> n_{0}, left_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
};

std::atomic<Pool*> pool_{nullptr};
std::mutex making_;

// Threads do not survive fork: the child forgets the pool (the memory is given up) and makes its own at first use.
void forget_after_fork() {
  pool_.store(nullptr);
  new (&making_) std::mutex;
}

Pool* pool() {
  if (Pool* p = pool_.load(std::memory_order_acquire)) return p;
  std::lock_guard<std::mutex> hold(making_);
  if (Pool* p = pool_.load()) return p;
  static const int hooked = pthread_atfork(nullptr, nullptr, forget_after_fork);
  (void)hooked;
  Pool* p = new Pool(wanted_threads());  // never freed: its threads may still be waiting when the process ends
  pool_.store(p, std::memory_order_release);
  return p;
}

}  // namespace

int threads() { return pool()->size(); }

void parallel(int64_t n, void (*body)(void*, int64_t), void* context) {
  if (n <= 0) return;
  Pool* p = pool();
  if (n > 1 && p->size() > 1 && !inside_) {
    struct Inside {
      Inside() { inside_ = true; }
      ~Inside() { inside_ = false; }
    } mark;
    if (p->run(n, body, context)) return;
  }
  for (int64_t i = 0; i < n; ++i) body(context, i);
}

}  // namespace mcl
