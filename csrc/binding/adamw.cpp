#include <algorithm>
#include <cmath>

#include "binding/native.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

class AdamWStep : public Native {
 public:
  AdamWStep(mx::Stream s, AdamW how) : Native(s), how_(how) {}
  DEFINE_NAME(AdamWStep)

  // Inputs: p, g, m, v, grad_scale.
  void eval_cpu(const Arrays& in, Arrays& out) override {
    const float *p = in[0].data<float>(), *g = in[1].data<float>(), *m = in[2].data<float>(), *v = in[3].data<float>();
    const float* scale = in[4].data<float>();
    reuse_or_allocate(in[0], out[0]);
    reuse_or_allocate(in[2], out[1]);
    reuse_or_allocate(in[3], out[2]);
    float *p_out = out[0].data<float>(), *m_out = out[1].data<float>(), *v_out = out[2].data<float>();
    const int64_t n = in[0].size();
    enqueue([=, how = how_] {
      parallel_ranges(n, 8192, [&](int64_t a, int64_t b) {
        kernels().adamw(how, *scale, p + a, g + a, m + a, v + a, p_out + a, m_out + a, v_out + a, b - a);
      });
    });
  }

 private:
  AdamW how_;
};

class SumSquares : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(SumSquares)
  DEFINE_DEFAULT_IS_EQUIVALENT()

  void eval_cpu(const Arrays& in, Arrays& out) override {
    struct Piece {
      const float* x;
      int64_t n;
    };
    constexpr int64_t kPiece = 1 << 16;  // fixed, so that the sum does not depend on the number of threads
    std::vector<Piece> pieces;
    for (const auto& x : in)
      for (int64_t a = 0, n = x.size(); a < n; a += kPiece)
        pieces.push_back({x.data<float>() + a, std::min(kPiece, n - a)});
    allocate(out[0]);
    float* to = out[0].data<float>();
    enqueue([to, pieces = std::move(pieces)] {
      std::vector<double> sums(pieces.size());
      auto body = [&](int64_t i) { sums[i] = kernels().sum_squares(pieces[i].x, pieces[i].n); };
      parallel(static_cast<int64_t>(pieces.size()), body);
      double total = 0;
      for (double s : sums) total += s;
      *to = static_cast<float>(total);
    });
  }
};

}  // namespace

Arrays adamw(const mx::array& p, const mx::array& g, const mx::array& m, const mx::array& v, const mx::array& grad_scale,
             float rate, float beta1, float beta2, float eps, float decay, int step) {
  for (const auto* x : {&p, &g, &m, &v}) {
    require(x->dtype() == mx::float32, "adamw", "all arrays must be float32");
    require(x->shape() == p.shape(), "adamw", "all arrays must have one shape");
  }
  require(grad_scale.size() == 1, "adamw", "grad_scale must be one number");
  require(step >= 1, "adamw", "steps count from 1");
  const auto s = cpu_stream();
  const AdamW how{rate, beta1, beta2, eps, decay, static_cast<float>(1 / (1 - std::pow(double{beta1}, step))),
                  static_cast<float>(1 / (1 - std::pow(double{beta2}, step)))};
  return mx::array::make_arrays({p.shape(), p.shape(), p.shape()}, {mx::float32, mx::float32, mx::float32},
                                std::make_shared<AdamWStep>(s, how),
                                {rows(p, s), rows(g, s), rows(m, s), rows(v, s),
                                 mx::astype(grad_scale, mx::float32, s)});
}

mx::array sum_squares(const Arrays& xs) {
  const auto s = cpu_stream();
  Arrays inputs;
  for (const auto& x : xs) {
    require(x.dtype() == mx::float32, "sum_squares", "all arrays must be float32");
    inputs.push_back(rows(x, s));
  }
  if (inputs.empty()) return mx::array(0.0f);
  return mx::array(mx::Shape{}, mx::float32, std::make_shared<SumSquares>(s), std::move(inputs));
}

}  // namespace mcl
