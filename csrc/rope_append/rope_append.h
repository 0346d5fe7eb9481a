// The layout of packed rows of K and V: see mlx_codellama/kernels/packed_kv.py.
#pragma once
#include <cstdint>

namespace mcl {

constexpr int64_t kMostRowDepth = 256;

struct RowLayout {
  int64_t D;
  int k_bits, v_bits;  // 4, 8 or 16

  int64_t group() const { return D % 64 == 0 ? 64 : 32; }
  int64_t k_scale_words() const { return k_bits == 16 ? 0 : D / group(); }
  int64_t v_scale_words() const { return v_bits == 16 ? 0 : D / group(); }
  int64_t words() const { return D * (k_bits + v_bits) / 32 + k_scale_words() + v_scale_words(); }
  bool operator==(const RowLayout&) const = default;
};

}  // namespace mcl
