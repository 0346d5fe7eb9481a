#include "decoder_block/decoder_block.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "pool/scratch.h"
#include "pool/stages.h"
#include "quant_matmul/rows_product.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

// Memory for the products and for what goes between them, of the calling thread.
class Memory {
 public:
  explicit Memory(int64_t floats) : at_(scratch<Scratch::decoder_block>(floats)) {}
  static int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }
  float* take(int64_t n) {
    float* const taken = at_;
    at_ += round_up(n);
    return taken;
  }

 private:
  float* at_;
};

// Stage i of a launch is stage i % kStages of layer i / kStages. What goes between stages lies in the same memory in
// every layer, as all of a stage is done before the next begins.
class Blocks : public StageWork {
 public:
  enum Stage { kQkv, kTurn, kAttention, kOut, kGateUp, kDown, kStages };

  explicit Blocks(DecoderBlocks& b) : b_(b), run_(kernels()), products_(4 * b.layers.size()) {
    const int64_t inner = b.layers[0].gate_up.part[0].outs, width[] = {b.H * b.D, b.K * b.D, b.K * b.D, b.H * b.D, b.E, b.E, inner};
    int64_t floats = 0, most = 0;
    for (const int64_t w : width) floats += Memory::round_up(rows() * w);
    for (size_t i = 0; i < products_.size(); ++i) {
      QuantLinear& l = linear(i);
      for (int p = 0; p < l.n; ++p) l.part[p].rows = rows();
      l.gated = i % 4 == 2;
      most = std::max(most, RowsProduct(l).floats());
    }
    Memory memory(floats + most);
    float** const at[] = {&q_, &k_, &v_, &seen_, &h_, &x_, &inner_};
    for (int i = 0; i < 7; ++i) *at[i] = memory.take(rows() * width[i]);
    float* const prepared = memory.take(most);
    const float* x = b.x;
    for (size_t i = 0; i < b.layers.size(); ++i) {
      DecoderLayer& l = b.layers[i];
      float *const y[] = {q_, k_, v_}, *const to = i + 1 < b.layers.size() ? x_ : b.y;
      for (int p = 0; p < 3; ++p) l.qkv.part[p].x = x, l.qkv.part[p].y = y[p];
      l.out.part[0].x = seen_, l.out.part[0].y = h_, l.out.residual = x;
      for (int p = 0; p < 2; ++p) l.gate_up.part[p].x = h_;
      l.gate_up.part[0].y = inner_;
      l.down.part[0].x = inner_, l.down.part[0].y = to, l.down.residual = h_;
      x = to;
    }
    for (size_t i = 0; i < products_.size(); ++i) {
      products_[i] = RowsProduct(linear(i));
      products_[i].use(prepared);
    }
    attention_.emplace(attention());
    for (size_t i = 0; i < b.spans.size(); ++i) {
      const TokenSpan& span = b.spans[i];
      for (int64_t t = 0; t < span.n; ++t) token_.push_back({i, span.place + t});
    }
  }

  int stages() const { return kStages * static_cast<int>(b_.layers.size()); }

  int64_t begin(int stage) override {
    const DecoderLayer& l = b_.layers[static_cast<size_t>(stage / kStages)];
    switch (stage % kStages) {
      case kTurn:
        if (b_.N > 1) return b_.N * b_.K;
        for (int64_t n = 0; n < b_.K; ++n) turn(l, 0, n);  // less work than a stage more
        return 0;
      case kAttention:
        for (size_t i = 0; i < b_.spans.size(); ++i) hold(attention_->pieces(static_cast<int64_t>(i)), l.held[i]);
        return attention_->tasks();
      case kOut:
        for (int64_t i = 0; i < attention_->merges(); ++i) attention_->merge(i);
        break;
      default: break;
    }
    return product(stage).begin();
  }

  void run(int stage, int64_t a, int64_t b) override {
    const int within = stage % kStages;
    if (within == kTurn)
      for (int64_t i = a; i < b; ++i) turn(b_.layers[static_cast<size_t>(stage / kStages)], i / b_.K, i % b_.K);
    else if (within == kAttention)
      for (int64_t i = a; i < b; ++i) attention_->run(i);
    else product(stage).run(a, b);
  }

  int64_t grain(int stage) const override {
    const int within = stage % kStages;
    return within == kTurn || within == kAttention ? 1 : products_[index(stage)].grain();
  }

  void wait(int stage, int me, int threads, const Over& over) override {
    int after = stage + 1;
    while (after % kStages == kTurn || after % kStages == kAttention) ++after;
    const size_t next = index(after);
    if (next >= products_.size()) return;
    Fetched& mine = fetched_[me];
    if (mine.product != next) mine = {next, 0};
    products_[next].fetch(me, threads, over, mine.bytes);
  }

 private:
  struct Fetched {
    size_t product;
    int64_t bytes;
  };

  static size_t index(int stage) {
    const int layer = stage / kStages, within = stage % kStages;
    return static_cast<size_t>(4 * layer + (within < kTurn ? within : within - 2));
  }
  RowsProduct& product(int stage) { return products_[index(stage)]; }
  QuantLinear& linear(size_t product) {
    DecoderLayer& l = b_.layers[product / 4];
    QuantLinear* const of[] = {&l.qkv, &l.out, &l.gate_up, &l.down};
    return *of[product % 4];
  }
  int64_t rows() const { return b_.N; }

  std::vector<Attention> attention() const {
    std::vector<Attention> all;
    int64_t first = 0;
    for (const TokenSpan& span : b_.spans) {
      Attention a{};
      a.B = 1, a.H = b_.H, a.K = b_.K, a.L = span.n, a.T = span.total, a.D = b_.D;
      a.scale = b_.scale;
      a.q = q_ + first * b_.H * b_.D, a.o = seen_ + first * b_.H * b_.D;
      a.qs = a.os = {0, b_.D, b_.H * b_.D};
      all.push_back(a);
      first += span.n;
    }
    return all;
  }
  void hold(std::vector<Piece>& pieces, const std::vector<Storage>& held) const {
    pieces.clear();
    for (const Storage& s : held)
      pieces.push_back(b_.packed ? packed_rows(s.k, s.strides, b_.layout, s.n)
                                 : Piece{{s.k, s.strides, b_.type, nullptr, 0}, {s.v, s.strides, b_.type, nullptr, 0}, s.n});
  }

  // Turn the queries and the key of a kv head of row r by its position; the key and the value into the cache.
  void turn(const DecoderLayer& layer, int64_t r, int64_t n) {
    const int64_t D = b_.D, share = b_.H / b_.K;
    const float *c = b_.cosine + r * b_.cosine_row, *s = b_.sine + r * b_.sine_row;
    for (int64_t h = n * share; h < (n + 1) * share; ++h) {
      float* q = q_ + (r * b_.H + h) * D;
      run_.rope(q, c, s, q, D / 2, 1.0f);
    }
    const Token& token = token_[static_cast<size_t>(r)];
    const Storage& to = layer.held[token.span].back();
    const float *k = k_ + (r * b_.K + n) * D, *v = v_ + (r * b_.K + n) * D;
    const int64_t at = n * to.strides.head + token.place * to.strides.row;
    if (b_.packed) {
      run_.append_row(b_.layout, k, v, c, s, reinterpret_cast<uint32_t*>(to.k + at));
    } else if (b_.type == Stored::float32) {
      run_.rope(k, c, s, reinterpret_cast<float*>(to.k + at), D / 2, 1.0f);
      std::memcpy(to.v + at, v, static_cast<size_t>(D) * sizeof(float));
    } else {
      uint32_t halves[kMostRowDepth];
      run_.append_row({D, 16, 16}, k, v, c, s, halves);
      std::memcpy(to.k + at, halves, static_cast<size_t>(D) * 2);
      std::memcpy(to.v + at, halves + D / 2, static_cast<size_t>(D) * 2);
    }
  }

  struct Token {
    size_t span;
    int64_t place;
  };

  DecoderBlocks& b_;
  const Kernels& run_;
  float *q_, *k_, *v_, *seen_, *h_, *x_, *inner_;  // x_: what one layer leaves for the next
  std::vector<Token> token_;  // of each row
  std::optional<AttentionWork> attention_;
  std::vector<RowsProduct> products_;  // four of each layer
  Fetched fetched_[kMostStageThreads] = {};
};

}  // namespace

void decoder_blocks(DecoderBlocks b) {
  if (b.layers.empty()) return;
  Blocks blocks(b);
  run_stages(blocks.stages(), blocks);
}

}  // namespace mcl
