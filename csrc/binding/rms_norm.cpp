#include <algorithm>

#include "binding/native.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kRows = 64;  // rows per piece: fixed, so that sums do not depend on the number of threads

class RmsNormGrad : public NativeWith<float> {  // eps
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(RmsNormGrad)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float *x = in[0].data<float>(), *w = in[1].data<float>(), *dy = in[2].data<float>();
    reuse_or_allocate(in[2], out[0]);
    allocate(out[1]);
    float *dx = out[0].data<float>(), *dw = out[1].data<float>();
    const int64_t n = in[1].size(), count = n ? in[0].size() / n : 0;
    enqueue([=, eps = setting_] {
      const int64_t pieces = (count + kRows - 1) / kRows;
      std::vector<float> partial(static_cast<size_t>(pieces * n), 0.0f);
      auto piece = [&](int64_t i) {
        const int64_t first = i * kRows * n;
        kernels().rms_norm_grad(x + first, w, dy + first, dx + first, partial.data() + i * n,
                                std::min(kRows, count - i * kRows), n, eps);
      };
      parallel(pieces, piece);
      std::fill(dw, dw + n, 0.0f);
      for (int64_t i = 0; i < pieces; ++i)
        for (int64_t j = 0; j < n; ++j) dw[j] += partial[static_cast<size_t>(i * n + j)];
    });
  }
};

class RmsNorm : public NativeWith<float> {  // eps
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(RmsNorm)
  DEFINE_INPUT_OUTPUT_SHAPE()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float *x = in[0].data<float>(), *w = in[1].data<float>();
    reuse_or_allocate(in[0], out[0]);
    float* y = out[0].data<float>();
    const int64_t n = in[1].size(), count = n ? in[0].size() / n : 0;
    enqueue([=, eps = setting_] {
      parallel_ranges(count, 16, [&](int64_t a, int64_t b) {
        kernels().rms_norm(x + a * n, w, y + a * n, b - a, n, eps);
      });
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const auto &x = primals[0], &w = primals[1];
    auto grads = mx::array::make_arrays({x.shape(), w.shape()}, {mx::float32, mx::float32},
                                        std::make_shared<RmsNormGrad>(stream(), setting_),
                                        {x, w, rows(cotangents[0], stream())});
    Arrays wanted;
    for (int a : argnums) wanted.push_back(grads[a]);
    return wanted;
  }
};

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  require(x.dtype() == mx::float32 && weight.dtype() == mx::float32, "rms_norm", "x and weight must be float32");
  require(weight.ndim() == 1 && x.ndim() >= 1 && x.shape(-1) == weight.shape(0), "rms_norm",
          "weight must be [E] for x [..., E]");
  const auto s = cpu_stream();
  return mx::array(x.shape(), mx::float32, std::make_shared<RmsNorm>(s, eps), {rows(x, s), rows(weight, s)});
}

}  // namespace mcl
