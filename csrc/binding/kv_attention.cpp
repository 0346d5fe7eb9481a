#include "kv_attention/kv_attention.h"

#include "binding/heads.h"

namespace mcl {
namespace {

AttentionShape describe(const Heads& q, const Heads& k, const Heads& v, float scale, const int32_t* starts) {
  AttentionShape a{};
  a.B = q.B, a.H = q.N, a.K = k.N, a.L = q.L, a.T = k.L, a.D = q.D;
  a.scale = scale, a.starts = starts;
  a.q = q.data, a.k = k.data, a.v = v.data;
  a.qs = q.strides, a.ks = k.strides, a.vs = v.strides;
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
      AttentionShape a = describe(q, k, v, scale, starts);
      a.o = const_cast<float*>(o.data), a.os = o.strides;
      a.lse = const_cast<float*>(lse);
      a.d_o = d_o.data, a.dos = d_o.strides;
      a.dq = dq, a.dk = dk, a.dv = dv;
      a.dqs = dqs, a.dks = dks, a.dvs = dvs;
      attention_backward(a);
    });
  }
};

class KvAttention : public NativeWith<float> {  // scale
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(KvAttention)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]), k0(in[1]), v0(in[2]);
    const int32_t* starts = in.size() > 3 ? in[3].data<int32_t>() : nullptr;
    const Strided os = allocate_like(in[0], out[0]);
    allocate(out[1]);
    float *o = out[0].data<float>(), *lse = out[1].data<float>();
    enqueue([=, scale = setting_] {
      std::vector<float> stores[3];
      Heads q = q0, k = k0, v = v0;
      q.straighten(stores[0]), k.straighten(stores[1]), v.straighten(stores[2]);
      AttentionShape a = describe(q, k, v, scale, starts);
      a.o = o, a.os = os, a.lse = lse;
      attention_forward(a);
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    Arrays inputs{primals[0], primals[1], primals[2], outputs[0], outputs[1], cotangents[0]};
    if (primals.size() > 3) inputs.push_back(primals[3]);
    auto grads = mx::array::make_arrays({primals[0].shape(), primals[1].shape(), primals[2].shape()},
                                        {mx::float32, mx::float32, mx::float32},
                                        std::make_shared<KvAttentionGrad>(stream(), setting_), inputs);
    Arrays wanted;
    for (int a : argnums) {
      require(a < 3, "kv_attention", "the document starts have no gradient");
      wanted.push_back(grads[a]);
    }
    return wanted;
  }
};

}  // namespace

mx::array kv_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                       const std::optional<mx::array>& starts) {
  const char* op = "kv_attention";
  require(q.dtype() == mx::float32 && k.dtype() == mx::float32 && v.dtype() == mx::float32, op,
          "q, k and v must be float32");
  require(q.ndim() == 4 && k.ndim() == 4 && k.shape() == v.shape(), op, "q must be [B, H, L, D], k and v [B, K, T, D]");
  require(q.shape(0) == k.shape(0) && q.shape(3) == k.shape(3), op, "q and k must have the same B and D");
  require(k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0, op, "H must be a multiple of K");
  require(k.shape(2) >= q.shape(2), op, "there must be at least as many keys as queries");
  require(q.shape(3) > 0 && q.shape(3) <= 256, op, "D must be 1 to 256");
  require(scale > 0, op, "scale must be positive");
  const auto s = cpu_stream();
  Arrays inputs{q, k, v};
  if (starts) {
    require(mx::issubdtype(starts->dtype(), mx::integer), op, "starts must be integers");
    require(starts->shape() == mx::Shape{q.shape(0), q.shape(2)}, op, "starts must be [B, L]");
    inputs.push_back(rows(mx::astype(*starts, mx::int32, s), s));
  }
  return mx::array::make_arrays({q.shape(), {q.shape(0), q.shape(1), q.shape(2)}}, {mx::float32, mx::float32},
                                std::make_shared<KvAttention>(s, scale), inputs)[0];
}

}  // namespace mcl
