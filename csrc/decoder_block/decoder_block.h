// Layers of a decoder, one after the other, for a few tokens after a cache, in one launch of the pool. Each:
//   h = x + out(attention(rope(q), cache)),  q, k, v = qkv(norm(x)), k turned and v appended to the cache
//   y = h + down(silu(gate) · up),           gate, up = gate_up(norm(h))
#pragma once
#include <vector>

#include "kv_attention/kv_attention.h"
#include "quant_matmul/quant_matmul.h"
#include "rope_append/rope_append.h"

namespace mcl {

// Weights, formats and norms of a layer; x, y, rows and residuals are filled in by the launch.
struct DecoderLayer {
  QuantLinear qkv, out, gate_up, down;
  char *k, *v;  // its part of the cache
};

struct DecoderBlocks {
  int64_t B, L, H, K, D, E;
  std::vector<DecoderLayer> layers;  // alike in all dimensions
  const float* x;  // [B, L, E]
  float* y;        // [B, L, E], of the last layer
  const float *cosine, *sine;  // [L, D/2]
  int64_t cosine_row, sine_row;  // floats from a position to the next
  // The cache of a layer: [B, K, capacity, …] of floats of 32 or 16 bits in two arrays, or of packed rows in one.
  bool packed;
  RowLayout layout;
  Stored type;
  Strided strides;         // bytes, of k and v
  int64_t place, total;  // where the new tokens go, and how many are held then: query i sees total - L + i + 1 of them
  float scale;
};

MCL_API void decoder_blocks(DecoderBlocks b);

}  // namespace mcl
