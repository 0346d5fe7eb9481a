#include "kv_attention/kv_attention.h"

#include <algorithm>
#include <vector>

#include "pool/pool.h"
#include "pool/scratch.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kScratchFloats = int64_t{16} << 20;  // 64 MB: pairs of (batch, kv head) are done in groups that fit
constexpr int64_t kLeastKeys = 512;                    // of a part, where the keys are split

int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// The first key that some query of [i0, i1) sees.
int64_t first_seen(const Attention& s, int64_t b, int64_t i0, int64_t i1) {
  if (!s.starts) return 0;
  const int32_t* starts = s.starts + b * s.L;
  return std::max<int64_t>(0, *std::min_element(starts + i0, starts + i1));
}

}  // namespace

void attention_forward(const Attention& s) {
  if (s.B * s.H * s.L == 0) return;
  const Kernels& run = kernels();
  const int64_t share = s.share(), pairs = s.B * s.K;
  const bool few = share * s.L <= kFewQueries;
  const int64_t queries = few ? s.L : std::max<int64_t>(1, kTileRows / share);
  const int64_t tiles = ceil_div(s.L, queries), least = few ? kFewKeys : kTileKeys;
  // Several tasks per thread, so that a core taken by another process delays one of them and not half of the work.
  const int64_t wanted = threads() == 1 ? 1 : 4 * threads();
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(wanted, pairs * tiles), s.T / kLeastKeys));
  std::vector<AttentionTask> tasks;
  tasks.reserve(static_cast<size_t>(pairs * tiles * parts));
  for (int64_t tile = tiles; tile-- > 0;)  // the late tiles are the long ones: first
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t i0 = tile * queries, i1 = std::min(s.L, i0 + queries), b = pair / s.K;
      const int64_t first = std::min(first_seen(s, b, i0, i1) / least, ceil_div(s.T, least));
      const int64_t blocks = std::max<int64_t>(0, ceil_div(s.end(i1), least) - first);
      for (int64_t p = 0; p < parts; ++p)
        tasks.push_back({b, pair % s.K, i0, i1, (first + blocks * p / parts) * least,
                         std::min(s.end(i1), (first + blocks * (p + 1) / parts) * least), nullptr});
    }
  if (parts > 1) {
    const int64_t floats = attention_partial_floats(s, queries * share);
    float* partial = scratch<Scratch::attention>(static_cast<int64_t>(tasks.size()) * floats);
    for (auto& task : tasks) task.partial = partial, partial += floats;
  }
  auto body = [&](int64_t i) {
    const AttentionTask& task = tasks[static_cast<size_t>(i)];
    if (few) run.attention_few(s, task);
    else run.attention_tile(s, task, scratch<Scratch::attention_tile>(attention_tile_floats(s, task.rows(s))));
  };
  parallel(static_cast<int64_t>(tasks.size()), body);
  if (parts == 1) return;
  auto merge = [&](int64_t i) { run.attention_merge(s, &tasks[static_cast<size_t>(i * parts)], parts); };
  parallel(pairs * tiles, merge);
}

void attention_backward(AttentionGrad s) {
  if (s.B * s.K * s.T == 0) return;
  const Kernels& run = kernels();
  const int64_t pairs = s.B * s.K, floats = attention_slot_floats(s);
  const int64_t group = std::min(pairs, std::max<int64_t>(kScratchFloats / floats, threads()));
  s.scratch = scratch<Scratch::attention>(group * floats);
  for (int64_t first = 0; first < pairs; first += group) {
    auto body = [&](int64_t i) {
      run.attention_pack(s, first + i, i);
      run.attention_grad(s, (first + i) / s.K, (first + i) % s.K, i);
    };
    parallel(std::min(group, pairs - first), body);
  }
}

}  // namespace mcl
