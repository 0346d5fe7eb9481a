#include "decoder_block/decoder_block.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "binding/heads.h"
#include "binding/scales.h"
#include "mlx/scheduler.h"
#include "mlx/transforms.h"

namespace mcl {
namespace {

constexpr const char* kOp = "decoder_blocks";
constexpr int kProducts = 4, kWeights[kProducts] = {3, 1, 2, 1};  // q k v, out, gate and up, down

struct Setting {
  std::vector<std::shared_ptr<const DecoderWeights>> layers;  // no inputs: MLX would copy and look through 23 arrays of each
  std::shared_ptr<const Arrays> segments;                     // nor these: span by span, layer by layer
  std::vector<std::vector<int>> spans;                        // n, place, total, then the tokens of each segment
  float scale;
  int k_bits, v_bits;  // of packed rows; 0 where the cache has floats
  bool operator==(const Setting&) const = default;
};

// The matrices and norms of a layer where they lie.
DecoderLayer layer_of(const DecoderWeights& w) {
  DecoderLayer layer{};
  QuantLinear* const linear[kProducts] = {&layer.qkv, &layer.out, &layer.gate_up, &layer.down};
  const mx::array* at = w.arrays.data();
  for (int i = 0; i < kProducts; ++i) {
    linear[i]->n = kWeights[i];
    for (int p = 0; p < kWeights[i]; ++p, at += 3) {
      QuantMatmul& s = linear[i]->part[p];
      s.weight = at[0].data<uint32_t>(), s.scales = at[1].data<void>(), s.biases = at[2].data<void>();
      s.outs = at[0].shape(0);
      s.group = w.formats[i][0], s.bits = w.formats[i][1], s.terms = w.formats[i][2];
      s.depth = static_cast<int64_t>(at[0].shape(1)) * 32 / s.bits;
      s.scale = scale_of(at[1].dtype());
    }
  }
  layer.qkv.norm = at[0].data<float>(), layer.qkv.eps = w.eps[0];
  layer.gate_up.norm = at[1].data<float>(), layer.gate_up.eps = w.eps[1];
  return layer;
}

// The part of a cache's storage [1, K, tokens, …] where its first n tokens lie.
Storage storage_of(const mx::array& k, const mx::array* v, int64_t n) {
  const auto bytes = static_cast<int64_t>(k.itemsize());
  return {const_cast<char*>(k.data<char>()), v ? const_cast<char*>(v->data<char>()) : nullptr,
          {0, k.strides(1) * bytes, k.strides(2) * bytes}, n};
}

// x [1, N, E], cosines and sines [N, D/2], of each span and layer the tail of its cache → y like x, and the tails, in place
// where nobody else holds them.
class DecoderBlocksOp : public NativeWith<Setting> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(DecoderBlocks)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Setting& f = setting_;
    DecoderBlocks b{};
    const DecoderWeights& w = *f.layers[0];
    const mx::array& x = in[0];
    b.N = x.shape(1), b.H = w.heads, b.K = w.kv_heads, b.D = w.D, b.E = w.E;
    allocate(out[0]);
    b.x = x.data<float>(), b.y = out[0].data<float>();
    b.cosine = in[1].data<float>(), b.cosine_row = in[1].strides(0);
    b.sine = in[2].data<float>(), b.sine_row = in[2].strides(0);
    b.scale = f.scale;
    b.packed = f.k_bits > 0;
    b.layout = {w.D, f.k_bits, f.v_bits};
    b.type = out[1].dtype() == mx::float16 ? Stored::float16 : Stored::float32;
    // Each output has a list of the inputs of its own: a cache with three holders could not be taken over.
    for (auto& y : out)
      if (&y.inputs() != &in && !y.is_tracer()) y.inputs().clear();
    for (size_t i = 1; i < out.size(); ++i) keep(in[2 + i], out[i]);
    for (const auto& layer : f.layers) b.layers.push_back(layer_of(*layer));
    const size_t n_each = b.packed ? 1 : 2;
    const mx::array* segment = f.segments->data();
    const mx::array* tail = out.data() + 1;
    for (const auto& span : f.spans) {
      b.spans.push_back({span[0], span[1], span[2]});
      for (auto& layer : b.layers) {
        std::vector<Storage>& held = layer.held.emplace_back();
        int64_t n = span[2];
        for (size_t i = 3; i < span.size(); ++i, segment += n_each) {
          held.push_back(storage_of(segment[0], n_each > 1 ? segment + 1 : nullptr, span[i]));
          n -= span[i];
        }
        held.push_back(storage_of(tail[0], n_each > 1 ? tail + 1 : nullptr, n));
        tail += n_each;
      }
    }
    // One task of the scheduler's count for each launch, so that `keep` can wait for launches one by one.
    mx::scheduler::notify_new_task(stream());
    enqueue([b = std::move(b), s = stream(), held = f.layers, segments = f.segments]() mutable {
      decoder_blocks(std::move(b));
      mx::scheduler::notify_task_completion(s);
    });
  }

 private:
  // The cache goes on in its own buffer, or in a copy where somebody else holds it. Until the token before has passed
  // these layers MLX holds the buffer for it, and a moment longer: the task that lets go of it follows the launch. A
  // caller who is so far ahead waits here, else every token would copy the cache.
  void keep(const mx::array& in, mx::array& out) {
    while (!in.is_donatable() && mx::scheduler::n_active_tasks() > 1) {
      mx::scheduler::wait_for_one();
      for (int i = 0; i < 20 && !in.is_donatable(); ++i) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (in.is_donatable()) {
      out.copy_shared_buffer(in);
      return;
    }
    allocate(out);
    enqueue([from = in.data<char>(), to = out.data<char>(), n = in.nbytes()] { std::memcpy(to, from, n); });
  }
};

mx::array in_rows(const mx::array& x, mx::Stream s) {
  return mcl::in_rows(x, x.has_primitive() && dynamic_cast<const DecoderBlocksOp*>(&x.primitive()), s);
}

// A slice of a table's rows needs no copy, which a graph cannot know before it has been computed.
mx::array in_table(const mx::array& x, mx::Stream s) {
  return x.status() != mx::array::Status::unscheduled && x.strides(1) == 1 ? x : rows(x, s);
}

}  // namespace

bool any_traced(const Arrays& arrays) {
  return std::any_of(arrays.begin(), arrays.end(), [](const mx::array& a) { return a.is_tracer(); });
}

DecoderWeights::DecoderWeights(const Arrays& weights, const Arrays& scales, const Arrays& biases, const Arrays& norms,
                               const std::vector<float>& eps, const std::vector<std::vector<int>>& formats, int heads,
                               int kv_heads)
    : eps(eps), formats(formats), heads(heads), kv_heads(kv_heads) {
  require(weights.size() == 7 && scales.size() == 7 && biases.size() == 7, kOp, "seven weights, each with scales and biases");
  require(norms.size() == 2 && eps.size() == 2 && formats.size() == kProducts, kOp, "two norms and four formats");
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, kOp, "H must be a multiple of K");
  for (const auto& weight : weights) require(weight.ndim() == 2 && weight.dtype() == mx::uint32, kOp, "weights must be uint32 [O, words]");
  D = weights[0].shape(0) / heads, E = weights[3].shape(0), F = weights[4].shape(0);
  require(D % 2 == 0 && D > 0 && D <= kMaxDepth && weights[0].shape(0) == heads * D, kOp, "D must be even and at most 256");
  const int outs[7] = {heads * D, kv_heads * D, kv_heads * D, E, F, F, E}, depth[7] = {E, E, E, heads * D, E, E, F};
  for (int i = 0, w = 0; i < kProducts; ++i) {
    require(formats[i].size() == 3, kOp, "a format is group size, bits and terms");
    const int group = formats[i][0], bits = formats[i][1], terms = formats[i][2];
    require(bits == 4 || bits == 8, kOp, "bits must be 4 or 8");
    require(group == 32 || group == 64 || group == 128, kOp, "the group size must be 32, 64 or 128");
    require(terms >= 0 && terms <= 2, kOp, "terms must be 0, 1 or 2");
    const int first = w;
    for (int p = 0; p < kWeights[i]; ++p, ++w) {
      const mx::Shape words{outs[w], static_cast<int>(static_cast<int64_t>(depth[w]) * bits / 32)};
      const mx::Shape groups{outs[w], depth[w] / group};
      require(depth[w] % group == 0 && weights[w].shape() == words, kOp, "a weight has not the shape that the others ask for");
      require(scales[w].shape() == groups && biases[w].shape() == groups && is_scale(scales[w].dtype()) &&
                  biases[w].dtype() == scales[w].dtype() && scales[w].dtype() == scales[first].dtype(),
              kOp, "scales and biases must be [O, I/group] of one dtype");
      for (const auto* each : {&weights[w], &scales[w], &biases[w]}) arrays.push_back(*each);
    }
  }
  for (const auto& norm : norms) {
    require(norm.shape() == mx::Shape{E} && norm.dtype() == mx::float32, kOp, "a norm's weight must be float32 [E]");
    arrays.push_back(norm);
  }
  mx::eval(arrays);
  for (auto& each : arrays)
    if (!each.flags().row_contiguous) each = rows(each, cpu_stream());
  mx::eval(arrays);
  for (auto& each : arrays) each.wait();
}

namespace {

// Computed, or on their way on this stream, with elements of a token side by side.
std::shared_ptr<const Arrays> ready(const Arrays& segments, mx::Stream s) {
  Arrays found = segments;
  const auto compute = [&] {
    Arrays rest;
    for (const auto& a : found)
      if (a.status() == mx::array::Status::unscheduled) rest.push_back(a);
    if (!rest.empty()) mx::async_eval(rest);
  };
  compute();
  for (auto& a : found)
    if (a.strides(3) != 1 && a.shape(3) > 1) a = rows(a, s);
  compute();
  for (auto& a : found)
    if (!a.is_available() && !(a.event().valid() && a.event().stream() == s)) a.wait();
  return std::make_shared<const Arrays>(std::move(found));
}

}  // namespace

Arrays decoder_blocks(std::vector<std::shared_ptr<const DecoderWeights>> layers, const mx::array& x,
                      const mx::array& cosine, const mx::array& sine, const Arrays& tails, const Arrays& segments,
                      const std::vector<std::vector<int>>& spans, float scale, int k_bits, int v_bits) {
  require(!layers.empty() && !spans.empty(), kOp, "at least one layer and one span");
  const DecoderWeights& w = *layers[0];
  require(x.ndim() == 3 && x.dtype() == mx::float32 && x.shape(0) == 1 && x.shape(2) == w.E, kOp, "x must be float32 [1, N, E]");
  const int N = x.shape(1), D = w.D;
  require(N > 0 && N <= kFewRows, kOp, "x has no rows, or too many");
  for (const auto& layer : layers) require(layer->alike(w), kOp, "the layers must have the same dimensions");
  for (const auto* table : {&cosine, &sine})
    require(table->shape() == mx::Shape{N, D / 2} && table->dtype() == mx::float32, kOp, "the tables must be float32 [N, D/2]");
  const bool packed = k_bits > 0;
  if (packed) require_rows(kOp, {D, k_bits, v_bits});
  const size_t n_each = packed ? 1 : 2, n_layers = layers.size();
  require(tails.size() == spans.size() * n_layers * n_each, kOp, "a cache is one array of packed rows, or two of floats");
  const int width = packed ? static_cast<int>(RowLayout{D, k_bits, v_bits}.words()) : D;
  const auto check = [&](const mx::array& held) {
    require(held.ndim() == 4 && held.shape() == mx::Shape{1, w.kv_heads, held.shape(2), width}, kOp,
            "the cache must be [1, K, tokens, width]");
    require(packed ? held.dtype() == mx::uint32 : held.dtype() == mx::float32 || held.dtype() == mx::float16, kOp,
            "the cache has no dtype of a cache");
    require(held.dtype() == tails[0].dtype(), kOp, "caches must be alike");
    return held.shape(2);
  };
  int64_t rows_of_spans = 0;
  size_t segment = 0, tail = 0;
  for (const auto& span : spans) {
    require(span.size() >= 3, kOp, "a span is n, place, total and the tokens of its segments");
    const int64_t n = span[0], place = span[1], total = span[2];
    int64_t last = total;
    require(n > 0, kOp, "a span has at least one token");
    rows_of_spans += n;
    for (size_t i = 3; i < span.size(); ++i) last -= span[i];
    require(segments.size() >= segment + n_layers * (span.size() - 3) * n_each, kOp, "there are fewer segments than counts");
    for (size_t layer = 0; layer < n_layers; ++layer) {
      for (size_t i = 3; i < span.size(); ++i)
        for (size_t j = 0; j < n_each; ++j, ++segment)
          require(span[i] >= 0 && span[i] <= check(segments[segment]), kOp, "a segment has fewer tokens than count");
      for (size_t j = 0; j < n_each; ++j, ++tail) {
        const int64_t capacity = check(tails[tail]);
        require(place >= 0 && last >= n && place <= capacity - n && last <= capacity, kOp,
                "there must be room for the new tokens");
        require(tails[tail].shape() == tails[tail - j].shape(), kOp, "keys and values must be alike");
      }
    }
  }
  require(rows_of_spans == N && segment == segments.size(), kOp, "the spans must have N tokens, and all segments");
  require(scale > 0, kOp, "scale must be positive");
  if (x.is_tracer() || cosine.is_tracer() || sine.is_tracer() || any_traced(tails) || any_traced(segments)) return {};
  const auto s = cpu_stream();
  Arrays in{in_rows(x, s), in_table(cosine, s), in_table(sine, s)};
  std::vector<mx::Shape> shapes{x.shape()};
  std::vector<mx::Dtype> types{mx::float32};
  for (const auto& held : tails) {
    in.push_back(in_rows(held, s));
    shapes.push_back(held.shape()), types.push_back(held.dtype());
  }
  const Setting setting{std::move(layers), ready(segments, s), spans, scale, k_bits, v_bits};
  return mx::array::make_arrays(std::move(shapes), types, std::make_shared<DecoderBlocksOp>(s, setting), in);
}

}  // namespace mcl
