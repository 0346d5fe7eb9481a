// Many short jobs, nested and from two threads at once: every task must run exactly once.
#include <atomic>
#include <cstdio>
#include <thread>

#include "pool/pool.h"

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

}  // namespace

int main() {
  std::thread other(many, 20000);
  many(20000);
  other.join();
  std::printf("%d threads, %d tasks run too rarely or too often\n", mcl::threads(), wrong.load());
  return wrong != 0;
}
