#include "pool/stages.h"

#include <algorithm>
#include <exception>

namespace mcl {
namespace {

constexpr int kSpins = 1000;  // as in pool.cpp

// What is left of a thread's part: the stage's number in 16 bits, so that a thread that read it long ago cannot take
// from a later stage, then first and end in 24 bits each.
constexpr uint64_t pack(int stage, int64_t first, int64_t end) {
  return static_cast<uint64_t>(stage & 0xffff) << 48 | static_cast<uint64_t>(first) << 24 | static_cast<uint64_t>(end);
}

struct alignas(64) Part {
  std::atomic<uint64_t> left{pack(0xffff, 0, 0)};
};

class Run {
 public:
  Run(int stages, StageWork& work, int threads) : work_(work), stages_(stages), threads_(threads) {}

  void take_part(int me) {
    if (!started_.exchange(true, std::memory_order_acq_rel)) next(-1);
    for (int stage; (stage = now_.load(std::memory_order_acquire)) < stages_;) {
      if (stage >= 0)
        for (int64_t a, b; take(stage, me, a, b);) {
          if (!failed_.load(std::memory_order_relaxed)) tried([&] { work_.run(stage, a, b); });
          if (left_.fetch_sub(b - a, std::memory_order_acq_rel) == b - a) next(stage);
        }
      const Over over(now_, stage);
      if (!over) work_.wait(stage, me, threads_, over);
      for (int i = 0; i < kSpins && !over; ++i) relax();
      if (!over) now_.wait(stage, std::memory_order_acquire);
    }
  }

  // Once all threads are through: throw what a stage threw.
  void check() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // Whoever threw alone would leave the others waiting for its units: all go on, and do nothing more.
  template <class F>
  void tried(F&& f) {
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
    }
  }

  // After all work of `stage`: get the next one ready that has any.
  void next(int stage) {
    int64_t units = 0;
    tried([&] {
      do ++stage;
      while (stage < stages_ && !failed_.load(std::memory_order_relaxed) && (units = work_.begin(stage)) == 0);
    });
    if (failed_.load(std::memory_order_relaxed)) stage = stages_;
    if (stage < stages_) {
      left_.store(units, std::memory_order_relaxed);
      for (int i = 0; i < threads_; ++i)
        parts_[i].left.store(pack(stage, units * i / threads_, units * (i + 1) / threads_), std::memory_order_release);
    }
    now_.store(stage, std::memory_order_release);
    now_.notify_all();
  }

  // Some units of a thread's own part from its front, or of another's from its end.
  bool take(int stage, int me, int64_t& a, int64_t& b) {
    const int64_t grain = work_.grain(stage);
    for (int i = 0; i < threads_; ++i) {
      std::atomic<uint64_t>& part = parts_[(me + i) % threads_].left;
      uint64_t left = part.load(std::memory_order_acquire);
      for (;;) {
        const int64_t first = left >> 24 & 0xffffff, end = left & 0xffffff, n = std::min(grain, end - first);
        if (static_cast<int>(left >> 48) != (stage & 0xffff) || n <= 0) break;
        a = i ? end - n : first, b = a + n;
        if (part.compare_exchange_weak(left, i ? pack(stage, first, a) : pack(stage, b, end), std::memory_order_acq_rel,
                                       std::memory_order_acquire))
          return true;
      }
    }
    return false;
  }

  StageWork& work_;
  const int stages_, threads_;
  std::atomic<bool> started_{false}, failed_{false};
  std::exception_ptr failure_;  // the first
  std::atomic<int64_t> left_{0};  // units of this stage that are not done
  alignas(64) std::atomic<int> now_{-1};
  Part parts_[kMostStageThreads];
};

}  // namespace

void run_stages(int stages, StageWork& work) {
  const int n = std::min(threads(), kMostStageThreads);
  Run run(stages, work, n);
  auto body = [&](int64_t i) { run.take_part(static_cast<int>(i)); };
  parallel(n, body);
  run.check();
}

}  // namespace mcl
