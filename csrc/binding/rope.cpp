#include "binding/heads.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

class Rope : public NativeWith<bool> {  // inverse
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(Rope)
  DEFINE_INPUT_OUTPUT_SHAPE()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads from(in[0]);
    const float *cosine = in[1].data<float>(), *sine = in[2].data<float>();
    const Strided to = allocate_like(in[0], out[0]);
    float* y = out[0].data<float>();
    enqueue([=, sign = setting_ ? -1.0f : 1.0f]() {
      Heads x = from;
      std::vector<float> store;
      x.straighten(store);
      const int64_t half = x.D / 2;
      parallel_ranges(x.B * x.L, 8, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
          const int64_t b = i / x.L, l = i % x.L;
          for (int64_t n = 0; n < x.N; ++n)
            kernels().rope(x.data + b * x.strides.batch + n * x.strides.head + l * x.strides.row, cosine + l * half,
                           sine + l * half, y + b * to.batch + n * to.head + l * to.row, half, sign);
        }
      });
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays wanted;
    for (int a : argnums) {
      require(a == 0, "rope", "the tables have no gradient");
      wanted.push_back(mx::array(primals[0].shape(), mx::float32, std::make_shared<Rope>(stream(), !setting_),
                                 {cotangents[0], primals[1], primals[2]}));
    }
    return wanted;
  }
};

}  // namespace

mx::array rope(const mx::array& x, const mx::array& cosine, const mx::array& sine, bool inverse) {
  require(x.dtype() == mx::float32 && cosine.dtype() == mx::float32 && sine.dtype() == mx::float32, "rope",
          "x and tables must be float32");
  require(x.ndim() == 4 && x.shape(3) % 2 == 0, "rope", "x must be [B, H, L, D] with D even");
  const mx::Shape table{x.shape(2), x.shape(3) / 2};
  require(cosine.shape() == table && sine.shape() == table, "rope", "the tables must be [L, D/2]");
  const auto s = cpu_stream();
  return mx::array(x.shape(), mx::float32, std::make_shared<Rope>(s, inverse), {x, rows(cosine, s), rows(sine, s)});
}

}  // namespace mcl
