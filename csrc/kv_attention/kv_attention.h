// Causal attention over float32, tiled, with its gradient. See kv_attention.simd.h for the method.
#pragma once
#include <cstdint>

#include "pool/pool.h"

namespace mcl {

// A [heads, rows, depth] array per batch element; depth is contiguous; strides in floats.
struct Strided {
  int64_t batch, head, row;
};

struct AttentionShape {
  int64_t B, H, K, L, T, D;  // T = offset + L; query head h reads kv head h / (H / K)
  float scale;
  const float *q, *k, *v;
  Strided qs, ks, vs;
  const int32_t* starts;  // [B, L]: query i sees keys starts[i] ... offset + i; null: from 0
  float* o;               // forward: written. Backward: read.
  Strided os;
  float* lse;  // [B, H, L] log-sum-exp of the scaled scores
  const float* d_o;
  Strided dos;
  float *dq, *dk, *dv;
  Strided dqs, dks, dvs;
  float* scratch;  // slots * attention_slot_floats()
};

constexpr int64_t kQueryTile = 64, kKeyTile = 128;

inline int64_t attention_depth(const AttentionShape& s) { return (s.D + 31) / 32 * 32; }     // padded for any vector width
inline int64_t attention_keys(const AttentionShape& s) { return (s.T + kKeyTile - 1) / kKeyTile * kKeyTile; }
// Per (batch, kv head): K in panels and V in rows; backward also V in panels, K in rows, dK and dV.
inline int64_t attention_slot_floats(const AttentionShape& s, bool backward) {
  return attention_keys(s) * attention_depth(s) * (backward ? 6 : 2);
}

MCL_API void attention_forward(AttentionShape s);
MCL_API void attention_backward(AttentionShape s);

}  // namespace mcl
