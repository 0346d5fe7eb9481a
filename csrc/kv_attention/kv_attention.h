// Causal attention over keys and values where they lie: floats of 32 or 16 bits, or codes of 8 or 4. `few` streams the
// keys once for a few query rows, `tile` multiplies blocks of queries and keys; `grad` is the gradient over float32.
#pragma once
#include <cstdint>
#include <vector>

#include "pool/pool.h"
#include "rope_append/rope_append.h"

namespace mcl {

// A [heads, rows, depth] array per batch element; depth is contiguous.
struct Strided {
  int64_t batch, head, row;
};

// codes8, codes4: unsigned codes from the low end of 32-bit words, as mx.quantize packs them (affine).
enum class Stored { float32, float16, bfloat16, codes8, codes4 };

// K or V of every kv head.
struct Held {
  const char* data;
  Strided strides;  // bytes
  Stored type;
  const char* scales;  // codes: a word per row and group, float16 scale low, float16 bias high; strides are those of data
  int group;           // codes: elements per group, 32 or 64
};

// Storage of the first keys and the last ones: mlx_codellama/kernels/kv_attention_window.py says which a query sees.
struct Window {
  int64_t sinks, size, own, ring;  // size 0: no window

  int64_t place(int64_t i) const { return own + i < sinks + ring ? own + i : own + i - ring; }  // of query i's own key
};

struct Attention {
  int64_t B, H, K, L, T, D;  // T = offset + L; query head h reads kv head h / (H / K)
  float scale;
  const float* q;
  Strided qs;  // floats
  Held k, v;
  const int32_t* starts;  // [B, L]: query i sees keys starts[i] ... offset + i; null: from 0
  Window window;          // in place of offset and starts, where it has a size
  float* o;
  Strided os;  // floats
  float* lse;  // [B, H, L] log-sum-exp of the scaled scores, or null

  int64_t share() const { return H / K; }
  int64_t depth() const { return (D + 31) / 32 * 32; }  // padded for any vector width
  // Keys from here on are seen by none of the queries before i1. A ring may have older keys behind the newest.
  int64_t end(int64_t i1) const { return window.size != 0 && window.own != T - L ? T : T - L + i1; }
};

// Queries [i0, i1) of all query heads of one kv head, over keys [first, end). Row r is query i0 + r / share of head
// kv * share + r % share.
struct AttentionTask {
  int64_t b, kv, i0, i1, first, end;
  float* partial;  // null where these are all keys, and the result goes to o. Else [rows][depth] sums, maxima, totals

  int64_t rows(const Attention& s) const { return (i1 - i0) * s.share(); }
};

constexpr int64_t kMaxDepth = 256;
constexpr int64_t kFewQueries = 8, kFewKeys = 64;                  // rows of the `few` form; keys that it takes at a time
constexpr int64_t kTileRows = 128, kTileKeys = 128, kStrip = 64;  // of the `tile` form; a strip of rows is scored at once

// Floats that a task needs.
inline int64_t attention_partial_floats(const Attention& s, int64_t rows) { return rows * (s.depth() + 2); }
inline int64_t attention_tile_floats(const Attention& s, int64_t rows) {
  const int64_t padded = (rows + 15) / 16 * 16;
  return padded * (2 * s.depth() + 2) + 2 * kTileKeys * s.depth() + kStrip * kTileKeys + 32 * s.depth();
}

// The gradient. Everything is float32 and strides are floats.
struct AttentionGrad {
  int64_t B, H, K, L, T, D;
  float scale;
  const float *q, *k, *v;
  Strided qs, ks, vs;
  const int32_t* starts;
  const float* o;
  Strided os;
  const float* lse;
  const float* d_o;
  Strided dos;
  float *dq, *dk, *dv;
  Strided dqs, dks, dvs;
  float* scratch;  // slots * attention_slot_floats()
};

constexpr int64_t kQueryTile = 64, kKeyTile = 128;

inline int64_t attention_depth(const AttentionGrad& s) { return (s.D + 31) / 32 * 32; }
inline int64_t attention_keys(const AttentionGrad& s) { return (s.T + kKeyTile - 1) / kKeyTile * kKeyTile; }
// Per (batch, kv head): K and V in panels and in rows, dK and dV.
inline int64_t attention_slot_floats(const AttentionGrad& s) { return 6 * attention_keys(s) * attention_depth(s); }

// K and V of a where they lie in packed rows; strides are bytes.
MCL_API void hold_rows(Attention& a, const char* rows, Strided strides, const RowLayout& layout);

// Attention as tasks that may run in any order, and where keys are split, as many merges of what they left. Memory for
// that is the calling thread's, until it asks for attention again.
class AttentionWork {
 public:
  explicit AttentionWork(const Attention& s);
  void over(const Held& k, const Held& v) { s_.k = k, s_.v = v; }  // of the same dimensions, for the runs from now on
  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  void run(int64_t i) const;
  int64_t merges() const { return parts_ > 1 ? tasks() / parts_ : 0; }
  void merge(int64_t i) const;

 private:
  Attention s_;
  bool few_;
  int64_t parts_;
  std::vector<AttentionTask> tasks_;
};

MCL_API void attention_forward(const Attention& s);
MCL_API void attention_backward(AttentionGrad s);

}  // namespace mcl
