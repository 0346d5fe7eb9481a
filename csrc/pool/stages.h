// Several stages of work in one launch of the pool: each begins when all of the one before is done.
#pragma once
#include <atomic>
#include <cstdint>

#include "pool/pool.h"

namespace mcl {

// Whether a stage is over.
class Over {
 public:
  Over(const std::atomic<int>& now, int stage) : now_(now), stage_(stage) {}
  explicit operator bool() const { return now_.load(std::memory_order_relaxed) != stage_; }

 private:
  const std::atomic<int>& now_;
  const int stage_;
};

constexpr int kMostStageThreads = 64;

class StageWork {
 public:
  virtual ~StageWork() = default;
  // One thread alone gets a stage ready, when all earlier work is done. → its units, at most 2^24; 0 leaves it out.
  virtual int64_t begin(int stage) = 0;
  // Do units [a, b).
  virtual void run(int stage, int64_t a, int64_t b) = 0;
  // Units that a thread takes at a time. It is asked only after `begin`.
  virtual int64_t grain(int stage) const = 0;
  // (stage, me, threads, over): what thread `me` may do while others are busy with `stage`, -1 before the first; it should
  // look at `over` every microsecond or so. Its part of a later stage will begin at units * me / threads.
  virtual void wait(int, int, int, const Over&) {}
};

// Every thread goes through its own part of a stage's units in order, as far as possible one run of memory, and then
// takes from the ends of others' parts. A thread that comes late, or never, is missed only for what it took.
// What `begin` or `run` throws ends the stages and is thrown here.
MCL_API void run_stages(int stages, StageWork& work);

}  // namespace mcl
