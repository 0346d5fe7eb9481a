#include "kv_attention/kv_attention.h"

#include <algorithm>

#include "pool/pool.h"
#include "pool/scratch.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kScratchFloats = int64_t{16} << 20;  // 64 MB: pairs of (batch, kv head) are done in groups that fit

template <class F>
void in_groups(AttentionShape& s, bool backward, F&& f) {
  const int64_t pairs = s.B * s.K, floats = attention_slot_floats(s, backward);
  const int64_t group = std::min(pairs, std::max<int64_t>(kScratchFloats / floats, threads()));
  s.scratch = scratch<Scratch::attention>(group * floats);
  for (int64_t first = 0; first < pairs; first += group) f(first, std::min(group, pairs - first));
}

}  // namespace

void attention_forward(AttentionShape s) {
  if (s.B * s.H * s.L == 0) return;
  const Kernels& run = kernels();
  in_groups(s, false, [&](int64_t first, int64_t n) {
    auto pack = [&](int64_t i) { run.attention_pack(s, first + i, i, false); };
    parallel(n, pack);
    const int64_t tiles = (s.L + kQueryTile - 1) / kQueryTile, share = s.H / s.K;
    auto body = [&](int64_t i) {  // the late tiles are the long ones: first
      const int64_t tile = tiles - 1 - i / (n * share), slot = i % (n * share) / share, pair = first + slot;
      run.attention(s, pair / s.K, pair % s.K * share + i % share, tile, slot);
    };
    parallel(n * share * tiles, body);
  });
}

void attention_backward(AttentionShape s) {
  if (s.B * s.K * s.T == 0) return;
  const Kernels& run = kernels();
  in_groups(s, true, [&](int64_t first, int64_t n) {
    auto body = [&](int64_t i) {
      run.attention_pack(s, first + i, i, true);
      run.attention_grad(s, (first + i) / s.K, (first + i) % s.K, i);
    };
    parallel(n, body);
  });
}

}  // namespace mcl
