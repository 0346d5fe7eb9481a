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
  enum Stage { kQkv, kAttention, kOut, kGateUp, kDown, kStages };

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
  }

  int stages() const { return kStages * static_cast<int>(b_.layers.size()); }

  int64_t begin(int stage) override {
    if (stage % kStages == kAttention) {
      const DecoderLayer& l = b_.layers[static_cast<size_t>(stage / kStages)];
      append(l);
      Attention a = attention();
      hold(a, l);
      attention_->over(a.k, a.v);
      return attention_->tasks();
    }
    if (stage % kStages == kOut)
      for (int64_t i = 0; i < attention_->merges(); ++i) attention_->merge(i);
    return product(stage).begin();
  }

  void run(int stage, int64_t a, int64_t b) override {
    if (stage % kStages != kAttention) product(stage).run(a, b);
    else
      for (int64_t i = a; i < b; ++i) attention_->run(i);
  }

  int64_t grain(int stage) const override { return stage % kStages == kAttention ? 1 : products_[index(stage)].grain(); }

  void wait(int stage, int me, int threads, const Over& over) override {
    const size_t next = index(stage + 1 + ((stage + 1) % kStages == kAttention));
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
    return static_cast<size_t>(4 * layer + (within < kAttention ? within : within - 1));
  }
  RowsProduct& product(int stage) { return products_[index(stage)]; }
  QuantLinear& linear(size_t product) {
    DecoderLayer& l = b_.layers[product / 4];
    QuantLinear* const of[] = {&l.qkv, &l.out, &l.gate_up, &l.down};
    return *of[product % 4];
  }
  int64_t rows() const { return b_.B * b_.L; }

  Attention attention() const {
    Attention a{};
    a.B = b_.B, a.H = b_.H, a.K = b_.K, a.L = b_.L, a.T = b_.total, a.D = b_.D;
    a.scale = b_.scale;
    a.q = q_, a.o = seen_;
    a.qs = a.os = {b_.L * b_.H * b_.D, b_.D, b_.H * b_.D};
    return a;
  }
  void hold(Attention& a, const DecoderLayer& l) const {
    if (b_.packed) hold_rows(a, l.k, b_.strides, b_.layout);
    else a.k = {l.k, b_.strides, b_.type, nullptr, 0}, a.v = {l.v, b_.strides, b_.type, nullptr, 0};
  }

  // Turn q and k by their positions; k and v into the cache.
  void append(const DecoderLayer& to) {
    const int64_t D = b_.D;
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t b = r / b_.L, l = r % b_.L;
      const float *c = b_.cosine + l * b_.cosine_row, *s = b_.sine + l * b_.sine_row;
      for (int64_t n = 0; n < b_.H; ++n) {
        float* q = q_ + (r * b_.H + n) * D;
        run_.rope(q, c, s, q, D / 2, 1.0f);
      }
      for (int64_t n = 0; n < b_.K; ++n) {
        const float *k = k_ + (r * b_.K + n) * D, *v = v_ + (r * b_.K + n) * D;
        const int64_t at = b * b_.strides.batch + n * b_.strides.head + (b_.place + l) * b_.strides.row;
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
    }
  }

  DecoderBlocks& b_;
  const Kernels& run_;
  float *q_, *k_, *v_, *seen_, *h_, *x_, *inner_;  // x_: what one layer leaves for the next
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
