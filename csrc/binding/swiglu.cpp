#include "binding/native.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kGrain = 4096;

class SwigluGrad : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(SwigluGrad)
  DEFINE_DEFAULT_IS_EQUIVALENT()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float *gate = in[0].data<float>(), *up = in[1].data<float>(), *dy = in[2].data<float>();
    reuse_or_allocate(in[0], out[0]);
    reuse_or_allocate(in[1], out[1]);
    float *dgate = out[0].data<float>(), *dup = out[1].data<float>();
    const int64_t n = in[0].size();
    enqueue([=] {
      parallel_ranges(n, kGrain, [&](int64_t a, int64_t b) {
        kernels().swiglu_grad(gate + a, up + a, dy + a, dgate + a, dup + a, b - a);
      });
    });
  }
};

class Swiglu : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(Swiglu)
  DEFINE_DEFAULT_IS_EQUIVALENT()
  DEFINE_INPUT_OUTPUT_SHAPE()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float *gate = in[0].data<float>(), *up = in[1].data<float>();
    reuse_or_allocate(in[0], out[0]);
    float* y = out[0].data<float>();
    const int64_t n = in[0].size();
    enqueue([=] {
      parallel_ranges(n, kGrain, [&](int64_t a, int64_t b) { kernels().swiglu(gate + a, up + a, y + a, b - a); });
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const auto &gate = primals[0], &up = primals[1];
    auto grads = mx::array::make_arrays({gate.shape(), up.shape()}, {mx::float32, mx::float32},
                                        std::make_shared<SwigluGrad>(stream()),
                                        {gate, up, rows(cotangents[0], stream())});
    Arrays wanted;
    for (int a : argnums) wanted.push_back(grads[a]);
    return wanted;
  }
};

}  // namespace

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  require(gate.dtype() == mx::float32 && up.dtype() == mx::float32, "swiglu", "gate and up must be float32");
  require(gate.shape() == up.shape(), "swiglu", "gate and up must have one shape");
  const auto s = cpu_stream();
  return mx::array(gate.shape(), mx::float32, std::make_shared<Swiglu>(s), {rows(gate, s), rows(up, s)});
}

}  // namespace mcl
