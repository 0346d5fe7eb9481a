#include "decoder_block/decoder_block.h"

#include <cstring>

#include "pool/scratch.h"
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

class Block : public StageWork {
 public:
  enum Stage { kQkv, kAttention, kOut, kGateUp, kDown, kStages };

  Block(const DecoderBlock& b, Memory memory)
      : b_(b),
        run_(kernels()),
        q_(memory.take(rows() * b.H * b.D)),
        k_(memory.take(rows() * b.K * b.D)),
        v_(memory.take(rows() * b.K * b.D)),
        seen_(memory.take(rows() * b.H * b.D)),
        h_(memory.take(rows() * b.out.part[0].outs)),
        inner_(memory.take(rows() * b.gate_up.part[0].outs)),
        attention_(attention()) {
    float* const y[] = {q_, k_, v_};
    for (int p = 0; p < 3; ++p) b_.qkv.part[p].x = b.x, b_.qkv.part[p].y = y[p];
    b_.out.part[0].x = seen_, b_.out.part[0].y = h_, b_.out.residual = b.x;
    for (int p = 0; p < 2; ++p) b_.gate_up.part[p].x = h_;
    b_.gate_up.part[0].y = inner_;
    b_.down.part[0].x = inner_, b_.down.part[0].y = b.y, b_.down.residual = h_;
    const QuantLinear* const linear[] = {&b_.qkv, &b_.out, &b_.gate_up, &b_.down};
    for (int i = 0; i < 4; ++i) {
      products_[i] = RowsProduct(*linear[i]);
      products_[i].use(memory.take(products_[i].floats()));
    }
  }

  static int64_t floats(const DecoderBlock& b) {
    const int64_t rows = b.B * b.L, most[] = {b.H * b.D, b.K * b.D, b.K * b.D, b.H * b.D, b.out.part[0].outs, b.gate_up.part[0].outs};
    int64_t n = 0;
    for (const int64_t width : most) n += Memory::round_up(rows * width);
    for (const QuantLinear* l : {&b.qkv, &b.out, &b.gate_up, &b.down}) n += Memory::round_up(RowsProduct(*l).floats());
    return n;
  }

  int64_t begin(int stage) override {
    if (stage == kAttention) {
      append();
      return attention_.tasks();
    }
    if (stage == kOut)
      for (int64_t i = 0; i < attention_.merges(); ++i) attention_.merge(i);
    return product(stage).begin();
  }

  void run(int stage, int64_t a, int64_t b) override {
    if (stage != kAttention) product(stage).run(a, b);
    else
      for (int64_t i = a; i < b; ++i) attention_.run(i);
  }

  int64_t grain(int stage) const override { return stage == kAttention ? 1 : products_[index(stage)].grain(); }

  void wait(int stage, int me, int threads, const Over& over) override {
    const int next = stage + 1 == kAttention ? kOut : stage + 1;
    if (next < kStages) products_[index(next)].fetch(me, threads, over, fetched_[me][index(next)]);
  }

 private:
  static int index(int stage) { return stage < kAttention ? stage : stage - 1; }
  RowsProduct& product(int stage) { return products_[index(stage)]; }
  int64_t rows() const { return b_.B * b_.L; }

  Attention attention() const {
    Attention a{};
    a.B = b_.B, a.H = b_.H, a.K = b_.K, a.L = b_.L, a.T = b_.total, a.D = b_.D;
    a.scale = b_.scale;
    a.q = q_, a.o = seen_;
    a.qs = a.os = {b_.L * b_.H * b_.D, b_.D, b_.H * b_.D};
    if (b_.packed) hold_rows(a, b_.k, b_.strides, b_.layout);
    else a.k = {b_.k, b_.strides, b_.type, nullptr, 0}, a.v = {b_.v, b_.strides, b_.type, nullptr, 0};
    return a;
  }

  // Turn q and k by their positions; k and v into the cache.
  void append() {
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
          run_.append_row(b_.layout, k, v, c, s, reinterpret_cast<uint32_t*>(b_.k + at));
        } else if (b_.type == Stored::float32) {
          run_.rope(k, c, s, reinterpret_cast<float*>(b_.k + at), D / 2, 1.0f);
          std::memcpy(b_.v + at, v, static_cast<size_t>(D) * sizeof(float));
        } else {
          uint32_t halves[kMostRowDepth];
          run_.append_row({D, 16, 16}, k, v, c, s, halves);
          std::memcpy(b_.k + at, halves, static_cast<size_t>(D) * 2);
          std::memcpy(b_.v + at, halves + D / 2, static_cast<size_t>(D) * 2);
        }
      }
    }
  }

  DecoderBlock b_;
  const Kernels& run_;
  float *const q_, *const k_, *const v_, *const seen_, *const h_, *const inner_;
  const AttentionWork attention_;
  RowsProduct products_[4];
  int64_t fetched_[kMostStageThreads][4] = {};
};

}  // namespace

void decoder_block(DecoderBlock b) {
  b.gate_up.gated = true;
  Block block(b, Memory(Block::floats(b)));
  run_stages(Block::kStages, block);
}

}  // namespace mcl
