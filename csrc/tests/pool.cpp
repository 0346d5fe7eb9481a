// Many short jobs, nested and from two threads at once: every task must run exactly once. And jobs in stages: every unit
// once, and none before all of the stage before is done. What a task or a stage throws reaches the caller, whoever ran it.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "pool/pool.h"
#include "pool/stages.h"

namespace {

std::atomic<int> wrong{0};

void many(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = 1 + round % 37;
    std::atomic<int> counts[37] = {};
    auto inner = [&](int64_t) {};
    auto body = [&](int64_t i) {
      counts[i].fetch_add(1, std::memory_order_relaxed);
      if (round % 11 == 0) mcl::parallel(3, inner);
    };
    mcl::parallel(n, body);
    for (int64_t i = 0; i < 37; ++i) wrong += counts[i] != (i < n);
  }
}

// Units of stage s write s + 1 where they find s; their number is not the same in any two stages that follow each other.
class Steps : public mcl::StageWork {
 public:
  explicit Steps(int round) : round_(round) {}
  int64_t begin(int stage) override {
    for (int i = 0; i < kMost; ++i) wrong += at_[i].exchange(stage) != (stage == 0 ? 0 : stage - 1 + (i < units(stage - 1)));
    return units(stage);
  }
  void run(int stage, int64_t a, int64_t b) override {
    for (int64_t i = a; i < b; ++i) wrong += at_[i].fetch_add(1, std::memory_order_relaxed) != stage;
    wrong += b - a > grain(stage);
  }
  int64_t grain(int stage) const override { return 1 + (stage + round_) % 3; }
  void wait(int stage, int me, int threads, const mcl::Over& over) override {
    wrong += me < 0 || me >= threads || stage < -1;
    while (round_ % 2 && !over) mcl::relax();
  }
  static void finished(const Steps& s, int stages) {
    for (int i = 0; i < kMost; ++i) wrong += s.at_[i] != stages - 1 + (i < s.units(stages - 1));
  }

 private:
  static constexpr int kMost = 29;
  int64_t units(int stage) const { return (round_ + 7 * stage) % (kMost + 1); }  // sometimes none
  const int round_;
  std::atomic<int> at_[kMost] = {};
};

void stages(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Steps work(round);
    mcl::run_stages(5, work);
    Steps::finished(work, 5);
  }
}

// Some tasks throw, and some stages, first or late, in `begin` or in `run`: the caller gets it, and the next job is as ever.
class Failing : public mcl::StageWork {
 public:
  explicit Failing(int round) : round_(round) {}
  int64_t begin(int stage) override {
    if (round_ % 4 == 0 && stage == round_ % 3) throw std::runtime_error("begin");
    return 17;
  }
  void run(int stage, int64_t a, int64_t) override {
    if (round_ % 4 != 0 && stage == round_ % 3 && a % 5 == round_ % 5) throw std::runtime_error("run");
  }
  int64_t grain(int) const override { return 1; }

 private:
  const int round_;
};

void failing(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ran{0}, thrown{0};
    auto body = [&](int64_t i) {
      ran.fetch_add(1, std::memory_order_relaxed);
      if (i % 3 == round % 3) throw std::runtime_error("task");
    };
    try {
      mcl::parallel(9, body);
    } catch (const std::runtime_error&) {
      ++thrown;
    }
    wrong += thrown != 1 || ran > 9;
    Failing work(round);
    try {
      mcl::run_stages(3, work);
    } catch (const std::runtime_error&) {
      ++thrown;
    }
    wrong += thrown != 2;
  }
}

}  // namespace

int main() {
  std::thread other(many, 20000);
  many(20000);
  other.join();
  std::thread beside(many, 20000);  // so that some of these find the pool busy, and run on their own thread
  stages(20000);
  beside.join();
  std::thread another(failing, 2000);
  failing(2000);
  many(2000);
  another.join();
  std::printf("%d threads, %d tasks run too rarely or too often\n", mcl::threads(), wrong.load());
  return wrong != 0;
}
