#include "kv_attention/kv_attention.h"

#include <algorithm>
#include <vector>

#include "pool/pool.h"
#include "pool/scratch.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kScratchFloats = int64_t{16} << 20;  // 64 MB: pairs of (batch, kv head) are done in groups that fit
constexpr int64_t kLeastKeys = 512;                    // of a task, where the keys are divided

int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// The first key that some query of [i0, i1) sees.
int64_t first_seen(const Attention& s, int64_t b, int64_t i0, int64_t i1) {
  if (!s.starts) return 0;
  const int32_t* starts = s.starts + b * s.L;
  return std::max<int64_t>(0, *std::min_element(starts + i0, starts + i1));
}

}  // namespace

Piece packed_rows(const char* rows, Strided strides, const RowLayout& f, int64_t n) {
  const auto part = [&](int bits, int64_t byte, int64_t scale_byte) {
    const Stored type = bits == 16 ? Stored::float16 : bits == 8 ? Stored::codes8 : Stored::codes4;
    return Held{rows + byte, strides, type, bits == 16 ? nullptr : rows + scale_byte, static_cast<int>(f.group())};
  };
  const int64_t k_bytes = f.D * f.k_bits / 8, scales = k_bytes + f.D * f.v_bits / 8;
  return {part(f.k_bits, 0, scales), part(f.v_bits, k_bytes, scales + 4 * f.k_scale_words()), n};
}

AttentionWork::AttentionWork(std::vector<Attention> sequences) : s_(std::move(sequences)) {
  // Several tasks per thread, so that a core taken by another process delays one of them and not half of the work.
  const int64_t wanted = threads() == 1 ? 1 : 4 * threads();
  const auto queries = [](const Attention& s) { return std::max<int64_t>(1, (s.prompt ? kTileRows : kFewQueryRows) / s.share()); };
  int64_t keys = 0, floats = 0;  // keys: of all rows' tasks together
  for (const Attention& s : s_)
    if (s.H > 0) keys += s.B * s.K * ceil_div(s.L, queries(s)) * s.T;
  const int64_t most = std::max(kLeastKeys, ceil_div(keys, wanted));  // of a task
  for (size_t of = 0; of < s_.size(); ++of) {
    const Attention& s = s_[of];
    if (s.B * s.H * s.L == 0) continue;
    const int64_t at_once = queries(s), tiles = ceil_div(s.L, at_once), pairs = s.B * s.K, split = s.split();
    for (int64_t tile = tiles; tile-- > 0;)  // the late tiles are the long ones: first
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t i0 = tile * at_once, i1 = std::min(s.L, i0 + at_once), b = pair / s.K;
        const int64_t end = s.end(i1), first = std::min(first_seen(s, b, i0, i1), end - 1) / split;
        const int64_t splits = ceil_div(end, split) - first, parts = std::min(splits, ceil_div(s.T, most));
        AttentionTask task{b, pair % s.K, i0, i1, first * split, end, nullptr, split};
        if (parts <= 1) {
          tasks_.push_back(task), of_.push_back(of);
          continue;
        }
        merges_.push_back({of, tasks_.size(), 0});
        const bool spans = splits >= 2 * parts * kSpan;  // else what a task leaves is a state for each split
        task.unit = spans ? kSpan * split : split;
        const int64_t u0 = first * split / task.unit, units = ceil_div(end, task.unit) - u0;
        for (int64_t p = 0; p < parts; ++p) {
          task.first = (u0 + units * p / parts) * task.unit;
          task.end = std::min(end, (u0 + units * (p + 1) / parts) * task.unit);
          tasks_.push_back(task), of_.push_back(of);
          ++merges_.back().n;
          floats += task.units() * attention_state_floats(s, task.rows(s));
        }
      }
  }
  if (merges_.empty()) return;
  float* partial = scratch<Scratch::attention>(floats);
  for (const Merge& merge : merges_)
    for (size_t i = merge.first; i < merge.first + merge.n; ++i) {
      const Attention& s = s_[merge.sequence];
      tasks_[i].partial = partial, partial += tasks_[i].units() * attention_state_floats(s, tasks_[i].rows(s));
    }
}

void AttentionWork::run(int64_t i) const {
  const AttentionTask& task = tasks_[static_cast<size_t>(i)];
  const Attention& s = s_[of_[static_cast<size_t>(i)]];
  const int64_t rows = task.rows(s), floats = s.prompt ? attention_tile_floats(s, rows) : attention_few_floats(s, rows);
  float* memory = scratch<Scratch::attention_tile>(floats);
  (s.prompt ? kernels().attention_tile : kernels().attention_few)(s, task, memory);
}

void AttentionWork::merge(int64_t i) const {
  const Merge& m = merges_[static_cast<size_t>(i)];
  const Attention& s = s_[m.sequence];
  const AttentionTask* tasks = &tasks_[m.first];
  float* memory = scratch<Scratch::attention_tile>(2 * attention_state_floats(s, tasks->rows(s)));
  kernels().attention_merge(s, tasks, static_cast<int64_t>(m.n), memory);
}

void attention_forward(const Attention& s) {
  const AttentionWork work({s});
  auto body = [&](int64_t i) { work.run(i); };
  parallel(work.tasks(), body);
  auto merge = [&](int64_t i) { work.merge(i); };
  parallel(work.merges(), merge);
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
