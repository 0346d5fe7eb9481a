#include "kv_attention/kv_attention.h"

#include <variant>

#include "binding/heads.h"
#include "rope_append/rope_append.h"

namespace mcl {
namespace {

constexpr int kFewRowsOfQueries = 8;  // up to here the `few` form where nobody says which

bool is_float(mx::Dtype t) { return t == mx::float32 || t == mx::float16 || t == mx::bfloat16; }

// K or V of 32 or 16 bits as the graph holds it.
struct Floats {
  std::variant<HeadsOf<float>, HeadsOf<uint16_t>> heads;
  Stored type;

  explicit Floats(const mx::array& x)
      : heads(x.dtype() == mx::float32 ? decltype(heads)(HeadsOf<float>(x)) : HeadsOf<uint16_t>(x)),
        type(x.dtype() == mx::float32   ? Stored::float32
             : x.dtype() == mx::float16 ? Stored::float16
                                        : Stored::bfloat16) {}

  struct Store {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
  };
  Held hold(Store& store) {
    if (auto* wide = std::get_if<HeadsOf<float>>(&heads)) return hold(*wide, store.wide);
    return hold(std::get<HeadsOf<uint16_t>>(heads), store.narrow);
  }

 private:
  template <class T>
  Held hold(HeadsOf<T>& x, std::vector<T>& store) {
    x.straighten(store);
    const auto bytes = static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<const char*>(x.data),
            {x.strides.batch * bytes, x.strides.head * bytes, x.strides.row * bytes},
            type,
            nullptr,
            0};
  }
};

// [sinks, size, own, ring] as Python gives it; no window: size 0.
using WindowList = std::vector<int64_t>;
Window window_of(const WindowList& w) { return w.empty() ? Window{} : Window{w[0], w[1], w[2], w[3]}; }

void require_window(const char* op, const WindowList& w, int64_t L, int64_t T) {
  if (w.empty()) return;
  require(w.size() == 4, op, "a window is sinks, size, own, ring");
  const auto [sinks, size, own, ring] = window_of(w);
  require(sinks >= 0 && size > 0 && own >= 0 && ring > 0, op, "sinks and own are 0 or more, size and ring 1 or more");
  require(own < T && own < sinks + ring && ring - size >= L - 1, op, "the ring holds the window and the queries' keys");
  require(own + L <= T || (own >= sinks && T == sinks + ring), op, "there must be a place for every query's key");
}

Attention describe(const Heads& q, int64_t K, int64_t T, float scale, bool prompt, float* o, Strided os) {
  Attention a{};
  a.B = q.B, a.H = q.N, a.K = K, a.L = q.L, a.T = T, a.D = q.D;
  a.scale = scale, a.prompt = prompt;
  a.q = q.data, a.qs = q.strides;
  a.o = o, a.os = os;
  return a;
}

// Inputs: q, k, v, o, lse, dO and, where documents are packed, starts.
class KvAttentionGrad : public NativeWith<float> {  // scale
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(KvAttentionGrad)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]), k0(in[1]), v0(in[2]), o0(in[3]), do0(in[5]);
    const float* lse = in[4].data<float>();
    const int32_t* starts = in.size() > 6 ? in[6].data<int32_t>() : nullptr;
    const Strided dqs = allocate_like(in[0], out[0]), dks = allocate_like(in[1], out[1]),
                  dvs = allocate_like(in[2], out[2]);
    float *dq = out[0].data<float>(), *dk = out[1].data<float>(), *dv = out[2].data<float>();
    enqueue([=, scale = setting_] {
      std::vector<float> stores[5];
      Heads q = q0, k = k0, v = v0, o = o0, d_o = do0;
      q.straighten(stores[0]), k.straighten(stores[1]), v.straighten(stores[2]);
      o.straighten(stores[3]), d_o.straighten(stores[4]);
      AttentionGrad a{};
      a.B = q.B, a.H = q.N, a.K = k.N, a.L = q.L, a.T = k.L, a.D = q.D;
      a.scale = scale, a.starts = starts;
      a.q = q.data, a.k = k.data, a.v = v.data;
      a.qs = q.strides, a.ks = k.strides, a.vs = v.strides;
      a.o = o.data, a.os = o.strides;
      a.lse = lse;
      a.d_o = d_o.data, a.dos = d_o.strides;
      a.dq = dq, a.dk = dk, a.dv = dv;
      a.dqs = dqs, a.dks = dks, a.dvs = dvs;
      attention_backward(a);
    });
  }
};

struct FloatsSetting {
  float scale;
  bool prompt;
  WindowList window;
  bool operator==(const FloatsSetting&) const = default;
};

// Inputs: q (float32), k, v and, where documents are packed, starts. Outputs: o and the log-sum-exp, both float32.
class KvAttention : public NativeWith<FloatsSetting> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(KvAttention)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]);
    const Floats k0(in[1]), v0(in[2]);
    const int64_t K = in[1].shape(1), T = in[1].shape(2);
    const int32_t* starts = in.size() > 3 ? in[3].data<int32_t>() : nullptr;
    const Strided os = allocate_like(in[0], out[0]);
    allocate(out[1]);
    float *o = out[0].data<float>(), *lse = out[1].data<float>();
    enqueue([=, scale = setting_.scale, prompt = setting_.prompt, window = window_of(setting_.window)] {
      std::vector<float> q_store;
      Floats::Store k_store, v_store;
      Heads q = q0;
      Floats k = k0, v = v0;
      q.straighten(q_store);
      Attention a = describe(q, K, T, scale, prompt, o, os);
      a.pieces = {{k.hold(k_store), v.hold(v_store), T}};
      a.starts = starts, a.window = window, a.lse = lse;
      attention_forward(a);
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    require(setting_.window.empty(), "kv_attention", "a window has no gradient");
    const auto wide = [&](int i) { return mx::astype(primals[i], mx::float32, stream()); };
    Arrays inputs{primals[0], wide(1), wide(2), outputs[0], outputs[1], cotangents[0]};
    if (primals.size() > 3) inputs.push_back(primals[3]);
    auto grads = mx::array::make_arrays({primals[0].shape(), primals[1].shape(), primals[2].shape()},
                                        {mx::float32, mx::float32, mx::float32},
                                        std::make_shared<KvAttentionGrad>(stream(), setting_.scale), inputs);
    Arrays wanted;
    for (int a : argnums) {
      require(a < 3, "kv_attention", "the document starts have no gradient");
      wanted.push_back(mx::astype(grads[a], primals[a].dtype(), stream()));
    }
    return wanted;
  }
};

struct RowsSetting {
  RowLayout layout;
  float scale;
  bool prompt;
  int tokens;
  WindowList window;
  bool operator==(const RowsSetting&) const = default;
};

// Inputs: q (float32), rows (see kernels/packed_kv.py). Output: o, float32.
class KvAttentionRows : public NativeWith<RowsSetting> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(KvAttentionRows)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]);
    const HeadsOf<uint32_t> rows0(in[1]);
    const Strided os = allocate_like(in[0], out[0]);
    float* o = out[0].data<float>();
    enqueue([=, setting = setting_] {
      std::vector<float> q_store;
      std::vector<uint32_t> rows_store;
      Heads q = q0;
      HeadsOf<uint32_t> rows = rows0;
      q.straighten(q_store), rows.straighten(rows_store);
      Attention a = describe(q, rows.N, setting.tokens, setting.scale, setting.prompt, o, os);
      const Strided strides{4 * rows.strides.batch, 4 * rows.strides.head, 4 * rows.strides.row};
      a.pieces = {packed_rows(reinterpret_cast<const char*>(rows.data), strides, setting.layout, setting.tokens)};
      a.window = window_of(setting.window);
      attention_forward(a);
    });
  }
};

struct SegmentsSetting {
  RowLayout layout;  // of packed rows; no bits where the arrays are floats
  std::vector<int> tokens;
  float scale;
  bool prompt;
  bool operator==(const SegmentsSetting&) const = default;
};

// Inputs: q (float32), then of each segment its rows, or its keys and its values. Output: o, float32.
class KvAttentionSegments : public NativeWith<SegmentsSetting> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(KvAttentionSegments)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]);
    const int64_t K = in[1].shape(1);
    const Strided os = allocate_like(in[0], out[0]);
    float* o = out[0].data<float>();
    std::vector<Floats> floats;
    std::vector<HeadsOf<uint32_t>> packed;
    for (size_t i = 1; i < in.size(); ++i) {
      if (setting_.layout.k_bits) packed.emplace_back(in[i]);
      else floats.emplace_back(in[i]);
    }
    enqueue([=, setting = setting_]() mutable {
      std::vector<float> q_store;
      Heads q = q0;
      q.straighten(q_store);
      int64_t T = 0;
      for (const int n : setting.tokens) T += n;
      Attention a = describe(q, K, T, setting.scale, setting.prompt, o, os);
      std::vector<std::vector<uint32_t>> rows_stores(packed.size());
      std::vector<Floats::Store> stores(floats.size());
      for (size_t i = 0; i < setting.tokens.size(); ++i) {
        const int64_t n = setting.tokens[i];
        if (n == 0) continue;
        if (setting.layout.k_bits == 0) {
          a.pieces.push_back({floats[2 * i].hold(stores[2 * i]), floats[2 * i + 1].hold(stores[2 * i + 1]), n});
          continue;
        }
        HeadsOf<uint32_t>& rows = packed[i];
        rows.straighten(rows_stores[i]);
        const Strided strides{4 * rows.strides.batch, 4 * rows.strides.head, 4 * rows.strides.row};
        a.pieces.push_back(packed_rows(reinterpret_cast<const char*>(rows.data), strides, setting.layout, n));
      }
      attention_forward(a);
    });
  }
};

}  // namespace

void require_rows(const char* op, const RowLayout& f) {
  const auto known = [](int bits) { return bits == 4 || bits == 8 || bits == 16; };
  require(known(f.k_bits) && known(f.v_bits), op, "K and V have 4, 8 or 16 bits");
  require(f.D % (f.k_bits == 16 && f.v_bits == 16 ? 2 : 32) == 0, op, "D must be even, and for codes a multiple of 32");
}

mx::array kv_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                       const std::optional<mx::array>& starts, const WindowList& window, std::optional<bool> prompt) {
  const char* op = "kv_attention";
  require(is_float(q.dtype()) && is_float(k.dtype()) && is_float(v.dtype()), op,
          "q, k and v must be float32, float16 or bfloat16");
  require(q.ndim() == 4 && k.ndim() == 4 && k.shape() == v.shape(), op, "q must be [B, H, L, D], k and v [B, K, T, D]");
  require(q.shape(0) == k.shape(0) && q.shape(3) == k.shape(3), op, "q and k must have the same B and D");
  require(k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0, op, "H must be a multiple of K");
  require(k.shape(2) >= q.shape(2), op, "there must be at least as many keys as queries");
  require(q.shape(3) > 0 && q.shape(3) <= kMaxDepth, op, "D must be 1 to 256");
  require(scale > 0, op, "scale must be positive");
  require(window.empty() || !starts, op, "documents and a window exclude each other");
  require_window(op, window, q.shape(2), k.shape(2));
  const auto s = cpu_stream();
  Arrays inputs{mx::astype(q, mx::float32, s), k, v};
  if (starts) {
    require(mx::issubdtype(starts->dtype(), mx::integer), op, "starts must be integers");
    require(starts->shape() == mx::Shape{q.shape(0), q.shape(2)}, op, "starts must be [B, L]");
    inputs.push_back(rows(mx::astype(*starts, mx::int32, s), s));
  }
  const auto o = mx::array::make_arrays({q.shape(), {q.shape(0), q.shape(1), q.shape(2)}}, {mx::float32, mx::float32},
                                        std::make_shared<KvAttention>(s, FloatsSetting{scale, prompt.value_or(q.shape(2) > kFewRowsOfQueries), window}), inputs)[0];
  return mx::astype(o, q.dtype(), s);
}

mx::array kv_attention_rows(const mx::array& q, const mx::array& rows, int k_bits, int v_bits, float scale, int offset,
                            const WindowList& window, std::optional<bool> prompt) {
  const char* op = "kv_attention_rows";
  require(is_float(q.dtype()) && rows.dtype() == mx::uint32, op, "q must be a float, rows uint32");
  require(q.ndim() == 4 && rows.ndim() == 4, op, "q must be [B, H, L, D], rows [B, K, capacity, W]");
  require(q.shape(3) > 0 && q.shape(3) <= kMaxDepth, op, "D must be 1 to 256");
  const RowLayout layout{q.shape(3), k_bits, v_bits};
  require_rows(op, layout);
  require(q.shape(0) == rows.shape(0), op, "q and rows must have the same B");
  require(rows.shape(1) > 0 && q.shape(1) % rows.shape(1) == 0, op, "H must be a multiple of K");
  require(rows.shape(3) == layout.words(), op, "the rows have another width than D and the bits");
  require(offset >= 0 && offset <= rows.shape(2) - q.shape(2), op, "there must be a row for every token");
  require_window(op, window, q.shape(2), offset + q.shape(2));
  require(scale > 0, op, "scale must be positive");
  const auto s = cpu_stream();
  const RowsSetting setting{layout, scale, prompt.value_or(q.shape(2) > kFewRowsOfQueries), offset + q.shape(2), window};
  const auto o = mx::array(q.shape(), mx::float32, std::make_shared<KvAttentionRows>(s, setting),
                           {mx::astype(q, mx::float32, s), rows});
  return mx::astype(o, q.dtype(), s);
}

mx::array kv_attention_segments(const mx::array& q, const Arrays& arrays, const std::vector<int>& tokens, int k_bits,
                                int v_bits, float scale, bool prompt) {
  const char* op = "kv_attention_segments";
  const bool packed = k_bits > 0;
  require(is_float(q.dtype()) && q.ndim() == 4 && q.shape(2) > 0, op, "q must be a float [B, H, L, D], L at least 1");
  require(q.shape(3) > 0 && q.shape(3) <= kMaxDepth, op, "D must be 1 to 256");
  require(!tokens.empty() && arrays.size() == tokens.size() * (packed ? 1 : 2), op,
          "a segment is one array of packed rows, or keys and values");
  const RowLayout layout{q.shape(3), k_bits, v_bits};
  if (packed) require_rows(op, layout);
  const int width = packed ? static_cast<int>(layout.words()) : q.shape(3);
  int64_t total = 0;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto& x = arrays[i];
    const int n = tokens[packed ? i : i / 2];
    require(x.ndim() == 4 && x.shape(0) == q.shape(0) && x.shape(3) == width, op, "segments must be [B, K, tokens, width]");
    require(x.shape(1) == arrays[0].shape(1) && x.dtype() == arrays[0].dtype(), op, "segments must be alike");
    require(packed ? x.dtype() == mx::uint32 : is_float(x.dtype()), op, "segments are uint32 rows, or floats");
    require(n >= 0 && n <= x.shape(2), op, "a segment has fewer tokens than count");
    if (packed || i % 2 == 0) total += n;
  }
  require(arrays[0].shape(1) > 0 && q.shape(1) % arrays[0].shape(1) == 0, op, "H must be a multiple of K");
  require(total >= q.shape(2), op, "there must be at least as many keys as queries");
  require(scale > 0, op, "scale must be positive");
  const auto s = cpu_stream();
  Arrays in{mx::astype(q, mx::float32, s)};
  in.insert(in.end(), arrays.begin(), arrays.end());
  const SegmentsSetting setting{layout, tokens, scale, prompt};
  const auto o = mx::array(q.shape(), mx::float32, std::make_shared<KvAttentionSegments>(s, setting), std::move(in));
  return mx::astype(o, q.dtype(), s);
}

}  // namespace mcl
