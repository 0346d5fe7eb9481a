// Layers of a decoder, one after the other, for a few tokens of one or several sequences, in one launch of the pool. Each:
//   h = x + out(attention(rope(q), cache)),  q, k, v = qkv(norm(x)), k turned and v appended to the cache
//   y = h + down(silu(gate) · up),           gate, up = gate_up(norm(h))
#pragma once
#include <vector>

#include "kv_attention/kv_attention.h"
#include "quant_matmul/quant_matmul.h"
#include "rope_append/rope_append.h"

namespace mcl {

// Keys and values [K, capacity, …] of one sequence and layer: floats of 32 or 16 bits in two arrays, or packed rows in one.
struct Storage {
  char *k, *v;
  Strided strides;  // bytes, of both
  int64_t n;        // tokens that count
};

// Consecutive new tokens of one sequence.
struct TokenSpan {
  int64_t n;             // tokens
  int64_t place, total;  // where they go in the last storage, and how many tokens the sequence has then
};

// Weights, formats and norms of a layer; x, y, rows and residuals are filled in by the launch.
struct DecoderLayer {
  QuantLinear qkv, out, gate_up, down;
  std::vector<std::vector<Storage>> held;  // of each span, one after the other its tokens; the last one grows
};

struct DecoderBlocks {
  int64_t N, H, K, D, E;
  std::vector<DecoderLayer> layers;  // alike in all dimensions
  std::vector<TokenSpan> spans;      // N tokens in all
  const float* x;                    // [N, E]
  float* y;                          // [N, E], of the last layer
  const float *cosine, *sine;        // [N, D/2]
  int64_t cosine_row, sine_row;      // floats from a token to the next
  bool packed;
  RowLayout layout;
  Stored type;
  float scale;
};

MCL_API void decoder_blocks(DecoderBlocks b);

}  // namespace mcl
