// Causal attention over keys and values where they lie: floats of 32 or 16 bits, or codes of 8 or 4, in one piece or in
// several. `few` streams the keys once for a few query rows, `tile` multiplies blocks of queries and keys; `grad` is the
// gradient over float32.
//
// A row's bits depend on its query, on the keys that it sees and on the form; not on the other rows, on the pieces or on
// the number of threads. Keys are split at fixed positions: within a split a row goes through them in one order from zero
// on, and splits are joined in ascending order (a span of them first, then spans).
#pragma once
#include <cstddef>
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

// Keys and values of consecutive tokens.
struct Piece {
  Held k, v;
  int64_t n;
};

struct Attention {
  int64_t B, H, K, L, T, D;  // T = offset + L; query head h reads kv head h / (H / K)
  float scale;
  bool prompt;  // the form: `tile`. Else `few`
  const float* q;
  Strided qs;  // floats
  std::vector<Piece> pieces;  // one after the other the T keys; stored alike. The last may hold more than are left
  const int32_t* starts;  // [B, L]: query i sees keys starts[i] ... offset + i; null: from 0
  Window window;          // in place of offset and starts, where it has a size
  float* o;
  Strided os;  // floats
  float* lse;  // [B, H, L] log-sum-exp of the scaled scores, or null

  int64_t share() const { return H / K; }
  int64_t split() const { return prompt ? 1024 : 256; }  // keys
  int64_t depth() const { return (D + 31) / 32 * 32; }  // padded for any vector width
  // Keys from here on are seen by none of the queries before i1. A ring may have older keys behind the newest.
  int64_t end(int64_t i1) const { return window.size != 0 && window.own != T - L ? T : T - L + i1; }
};

// Queries [i0, i1) of all query heads of one kv head, over keys [first, end) from the beginning of a split on. Row r is
// query i0 + r / share of head kv * share + r % share.
struct AttentionTask {
  int64_t b, kv, i0, i1, first, end;
  float* partial;  // null where these are all keys, and the result goes to o. Else a state for each `unit` of keys
  int64_t unit;    // a split, or a span

  int64_t rows(const Attention& s) const { return (i1 - i0) * s.share(); }
  int64_t units() const { return end > first ? (end - first + unit - 1) / unit : 0; }
};

constexpr int64_t kMaxDepth = 256;
constexpr int64_t kSpan = 16;                                      // splits
constexpr int64_t kFewQueryRows = 64, kFewKeys = 64;                   // of the `few` form, at a time
constexpr int64_t kTileRows = 128, kTileKeys = 128, kStrip = 64;  // of the `tile` form; a strip of rows is scored at once
constexpr int64_t kStateRest = 16;

// A row's state over some keys: [depth] sums, [8] sums of biases by group (`few` over codes), the maximum, the total.
inline int64_t attention_state_floats(const Attention& s, int64_t rows) { return rows * (s.depth() + kStateRest); }
// Floats that a task needs.
inline int64_t attention_few_floats(const Attention& s, int64_t rows) {
  return 3 * attention_state_floats(s, rows) + rows * (s.depth() + s.depth() / 4 + kFewKeys) + 2 * kFewKeys * (s.depth() + 16);
}
inline int64_t attention_tile_floats(const Attention& s, int64_t rows) {
  const int64_t padded = (rows + 15) / 16 * 16;
  return 3 * attention_state_floats(s, padded) + padded * s.depth() + 2 * kTileKeys * s.depth() + kStrip * kTileKeys + 32 * s.depth();
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

// K and V of n tokens where they lie in packed rows; strides are bytes.
MCL_API Piece packed_rows(const char* rows, Strided strides, const RowLayout& layout, int64_t n);

// Attention of one or several sequences as tasks that may run in any order, and where keys of some rows are divided among
// tasks, merges of what they left. Memory for that is the calling thread's, until it asks for attention again.
class AttentionWork {
 public:
  explicit AttentionWork(std::vector<Attention> sequences);
  // Other keys of the same dimensions, for the runs from now on.
  std::vector<Piece>& pieces(int64_t sequence) { return s_[static_cast<size_t>(sequence)].pieces; }
  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  void run(int64_t i) const;
  int64_t merges() const { return static_cast<int64_t>(merges_.size()); }
  void merge(int64_t i) const;

 private:
  struct Merge {
    size_t sequence, first, n;  // tasks
  };
  std::vector<Attention> s_;
  std::vector<AttentionTask> tasks_;
  std::vector<size_t> of_;  // the sequence of each
  std::vector<Merge> merges_;
};

MCL_API void attention_forward(const Attention& s);
MCL_API void attention_backward(AttentionGrad s);

}  // namespace mcl
