// What every primitive here shares: CPU only, float32, work enqueued on MLX's stream.
#pragma once
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "pool/out_of_memory.h"

namespace mcl {

namespace mx = mlx::core;
using mx::array, mx::Shape;  // for the macros of mlx/primitives.h
using Arrays = std::vector<mx::array>;

class Native : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + " of mlx_codellama_cpu runs on the CPU only");
  }

 protected:
  // Run f on the stream. MLX keeps the buffers of inputs and outputs alive until then, so f may hold plain pointers.
  template <class F>
  void enqueue(F&& f) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<F>(f));
  }
};

// With one setting: two of a type are equivalent, for mx.compile, where their settings are equal.
template <class T>
class NativeWith : public Native {
 public:
  NativeWith(mx::Stream s, T setting) : Native(s), setting_(setting) {}
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const NativeWith&>(other).setting_ == setting_;
  }

 protected:
  const T setting_;
};

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

inline void require(bool good, const char* op, const char* what) {
  if (!good) throw std::invalid_argument(std::string(op) + ": " + what);
}

inline mx::array rows(const mx::array& x, mx::Stream s) { return mx::contiguous(x, false, s); }

// The same without a node of its own in the graph where that is known: x is computed and in rows, or is `made_so`.
inline mx::array in_rows(const mx::array& x, bool made_so, mx::Stream s) {
  const bool computed = x.status() != mx::array::Status::unscheduled;
  return made_so || (computed && x.flags().row_contiguous) ? x : rows(x, s);
}

// Memory from MLX, never null: std::bad_alloc where there is none. (allocator/allocator.cpp does this for MLX's own
// operations, unless another allocator came first.)
inline mx::allocator::Data checked_malloc(size_t bytes) {
  mx::allocator::Data data = mx::allocator::malloc(bytes);
  if (!data.buffer().ptr()) throw OutOfMemory();
  return data;
}

inline void allocate(mx::array& out) { out.set_data(checked_malloc(out.nbytes())); }

// Take over the input's buffer where nobody else needs it. Both must be contiguous float32 of one shape.
inline void reuse_or_allocate(const mx::array& in, mx::array& out) {
  if (in.is_donatable() && in.nbytes() == out.nbytes() && in.flags().row_contiguous)
    out.copy_shared_buffer(in);
  else
    allocate(out);
}

// The public operations.
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);
mx::array zeros_like(const mx::array& like, const std::vector<int>& shape);
mx::array swiglu(const mx::array& gate, const mx::array& up);
mx::array rope(const mx::array& x, const mx::array& cosine, const mx::array& sine, bool inverse);
mx::array cross_entropy(const mx::array& logits, const mx::array& targets);
mx::array kv_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                       const std::optional<mx::array>& starts, const std::vector<int64_t>& window,
                       std::optional<bool> prompt);
mx::array kv_attention_rows(const mx::array& q, const mx::array& rows, int k_bits, int v_bits, float scale, int offset,
                            const std::vector<int64_t>& window, std::optional<bool> prompt);
mx::array kv_attention_segments(const mx::array& q, const Arrays& arrays, const std::vector<int>& tokens, int k_bits,
                                int v_bits, float scale, bool prompt);
Arrays rope_append(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cosine,
                   const mx::array& sine, int k_bits, int v_bits);
Arrays quant_linear(const mx::array& x, const Arrays& weights, const Arrays& scales, const Arrays& biases,
                    const std::optional<mx::array>& norm, float eps, const std::optional<mx::array>& residual,
                    bool gated, int group, int bits, int terms, bool prompt);

// What a layer's launch reads: for each of seven weights [outs, words] scales and biases [outs, groups], then two norms'.
struct DecoderWeights {
  Arrays arrays;  // computed, in rows
  std::vector<float> eps;
  std::vector<std::vector<int>> formats;  // group, bits and terms of q k v, of out, of gate and up, of down
  int heads, kv_heads, D, E, F;
  DecoderWeights(const Arrays& weights, const Arrays& scales, const Arrays& biases, const Arrays& norms,
                 const std::vector<float>& eps, const std::vector<std::vector<int>>& formats, int heads, int kv_heads);
  bool alike(const DecoderWeights& o) const {
    return heads == o.heads && kv_heads == o.kv_heads && D == o.D && E == o.E && F == o.F;
  }
};
// Whether a gradient, a compilation or another transformation looks at one of them.
bool any_traced(const Arrays& arrays);
// Nothing where that is so: weights are no inputs of its node, and it has no gradient.
Arrays decoder_blocks(std::vector<std::shared_ptr<const DecoderWeights>> layers, const mx::array& x,
                      const mx::array& cosine, const mx::array& sine, const Arrays& tails, const Arrays& segments,
                      const std::vector<std::vector<int>>& spans, float scale, int k_bits, int v_bits);

Arrays adamw(const mx::array& p, const mx::array& g, const mx::array& m, const mx::array& v, const mx::array& grad_scale,
             float rate, float beta1, float beta2, float eps, float decay, int step);
mx::array sum_squares(const Arrays& xs);

}  // namespace mcl
