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

void hold_rows(Attention& a, const char* rows, Strided strides, const RowLayout& f) {
  const auto part = [&](int bits, int64_t byte, int64_t scale_byte) {
    const Stored type = bits == 16 ? Stored::float16 : bits == 8 ? Stored::codes8 : Stored::codes4;
    return Held{rows + byte, strides, type, bits == 16 ? nullptr : rows + scale_byte, static_cast<int>(f.group())};
  };
  const int64_t k_bytes = f.D * f.k_bits / 8, scales = k_bytes + f.D * f.v_bits / 8;
  a.k = part(f.k_bits, 0, scales);
  a.v = part(f.v_bits, k_bytes, scales + 4 * f.k_scale_words());
}

AttentionWork::AttentionWork(const Attention& s) : s_(s), few_(s.share() * s.L <= kFewQueries), parts_(1) {
  if (s.B * s.H * s.L == 0) return;
  const int64_t share = s.share(), pairs = s.B * s.K;
  const int64_t queries = few_ ? s.L : std::max<int64_t>(1, kTileRows / share);
  const int64_t tiles = ceil_div(s.L, queries), least = few_ ? kFewKeys : kTileKeys;
  // Several tasks per thread, so that a core taken by another process delays one of them and not half of the work.
  const int64_t wanted = threads() == 1 ? 1 : 4 * threads();
  parts_ = std::max<int64_t>(1, std::min(ceil_div(wanted, pairs * tiles), s.T / kLeastKeys));
  tasks_.reserve(static_cast<size_t>(pairs * tiles * parts_));
  for (int64_t tile = tiles; tile-- > 0;)  // the late tiles are the long ones: first
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t i0 = tile * queries, i1 = std::min(s.L, i0 + queries), b = pair / s.K;
      const int64_t first = std::min(first_seen(s, b, i0, i1) / least, ceil_div(s.T, least));
      const int64_t blocks = std::max<int64_t>(0, ceil_div(s.end(i1), least) - first);
      for (int64_t p = 0; p < parts_; ++p)
        tasks_.push_back({b, pair % s.K, i0, i1, (first + blocks * p / parts_) * least,
                          std::min(s.end(i1), (first + blocks * (p + 1) / parts_) * least), nullptr});
    }
  if (parts_ > 1) {
    const int64_t floats = attention_partial_floats(s, queries * share);
    float* partial = scratch<Scratch::attention>(tasks() * floats);
    for (auto& task : tasks_) task.partial = partial, partial += floats;
  }
}

void AttentionWork::run(int64_t i) const {
  const AttentionTask& task = tasks_[static_cast<size_t>(i)];
  if (few_) kernels().attention_few(s_, task);
  else kernels().attention_tile(s_, task, scratch<Scratch::attention_tile>(attention_tile_floats(s_, task.rows(s_))));
}

void AttentionWork::merge(int64_t i) const {
  kernels().attention_merge(s_, &tasks_[static_cast<size_t>(i * parts_)], parts_);
}

void attention_forward(const Attention& s) {
  const AttentionWork work(s);
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
