#include "binding/native.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

class CrossEntropyGrad : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(CrossEntropyGrad)
  DEFINE_DEFAULT_IS_EQUIVALENT()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float* logits = in[0].data<float>();
    const int32_t* targets = in[1].data<int32_t>();
    const float *of = in[2].data<float>(), *dloss = in[3].data<float>();
    reuse_or_allocate(in[0], out[0]);
    float* dlogits = out[0].data<float>();
    const int64_t n = in[0].shape(-1), count = in[1].size();
    enqueue([=] {
      parallel_ranges(count, 4, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i)
          kernels().cross_entropy_grad(logits + i * n, targets[i], of + 2 * i, dloss[i], dlogits + i * n, n);
      });
    });
  }
};

class CrossEntropy : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(CrossEntropy)
  DEFINE_DEFAULT_IS_EQUIVALENT()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float* logits = in[0].data<float>();
    const int32_t* targets = in[1].data<int32_t>();
    allocate(out[0]);
    allocate(out[1]);
    float *loss = out[0].data<float>(), *of = out[1].data<float>();
    const int64_t n = in[0].shape(-1), count = in[1].size();
    enqueue([=] {
      parallel_ranges(count, 4, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i) kernels().cross_entropy(logits + i * n, targets[i], n, loss + i, of + 2 * i);
      });
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    require(argnums.size() == 1 && argnums[0] == 0, "cross_entropy", "only the logits have a gradient");
    return {mx::array(primals[0].shape(), mx::float32, std::make_shared<CrossEntropyGrad>(stream()),
                      {primals[0], primals[1], outputs[1], rows(cotangents[0], stream())})};
  }
};

}  // namespace

mx::array cross_entropy(const mx::array& logits, const mx::array& targets) {
  require(logits.dtype() == mx::float32, "cross_entropy", "logits must be float32");
  require(mx::issubdtype(targets.dtype(), mx::integer), "cross_entropy", "targets must be integers");
  mx::Shape shape = logits.shape();
  require(logits.ndim() >= 1 && logits.shape(-1) > 0, "cross_entropy", "logits must be [..., V] with V > 0");
  shape.pop_back();
  require(targets.shape() == shape, "cross_entropy", "targets must be [...] for logits [..., V]");
  const auto s = cpu_stream();
  mx::Shape pairs = shape;
  pairs.push_back(2);
  return mx::array::make_arrays({shape, pairs}, {mx::float32, mx::float32}, std::make_shared<CrossEntropy>(s),
                                {rows(logits, s), rows(mx::astype(targets, mx::int32, s), s)})[0];
}

}  // namespace mcl
