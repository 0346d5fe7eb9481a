#include "binding/scales.h"
#include "mlx/transforms.h"

namespace mcl {
namespace {

const std::string kName = "QuantMatmul";

// A token passes hundreds of weights: a node more for each would cost as much as some of the products.
mx::array in_rows(const mx::array& x, mx::Stream s) {
  const auto* maker = x.has_primitive() ? dynamic_cast<const Native*>(&x.primitive()) : nullptr;
  return mcl::in_rows(x, maker && maker->name() == kName, s);
}

struct Setting {
  int bits, group, terms;
  int n;  // weights
  bool affine, norm, residual, gated, prompt;
  float eps;
  bool operator==(const Setting&) const = default;
  int per_weight() const { return affine ? 3 : 2; }
  int norm_at() const { return 1 + n * per_weight(); }
  int residual_at() const { return norm_at() + norm; }
};

// x [..., depth] float32, then for each weight [outs, words], scales [outs, groups], biases where affine, then the norm's
// weight [depth] and the residual [..., outs] where there are → [..., outs] of each weight, or of the gated pair.
class QuantLinearOp : public NativeWith<Setting> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(QuantMatmul)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    QuantLinear l{};
    l.n = setting_.n, l.eps = setting_.eps, l.gated = setting_.gated, l.prompt = setting_.prompt;
    if (setting_.norm) l.norm = in[setting_.norm_at()].data<float>();
    if (setting_.residual) l.residual = in[setting_.residual_at()].data<float>();
    for (auto& y : out) allocate(y);
    for (int p = 0; p < l.n; ++p) {
      const mx::array* part = &in[1 + p * setting_.per_weight()];
      QuantMatmul& s = l.part[p];
      s.x = in[0].data<float>();
      s.weight = part[0].data<uint32_t>();
      s.scales = part[1].data<void>();
      s.biases = setting_.affine ? part[2].data<void>() : nullptr;
      s.y = setting_.gated && p > 0 ? nullptr : out[p].data<float>();
      s.depth = in[0].shape(-1);
      s.outs = part[0].shape(0);
      const auto count = [](size_t all, int64_t each) { return each ? static_cast<int64_t>(all) / each : 0; };
      s.rows = s.depth ? count(in[0].size(), s.depth) : count(out[0].size(), s.outs);
      s.bits = setting_.bits, s.group = setting_.group, s.terms = setting_.terms;
      s.scale = setting_.affine ? scale_of(part[1].dtype()) : Scale::e8m0;
    }
    enqueue([l] { quant_linear(l); });
  }

  // Of x, the norm's weight and the residual; the weights have none, being quantised. dy @ dequantised(W) is done with
  // MLX's own operations: training reads it once per step.
  Arrays vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays wanted;
    const bool plain = setting_.n == 1 && !setting_.norm;
    std::optional<Arrays> all;  // of x and the norm's weight
    for (int a : argnums) {
      const bool floating = a == 0 || (setting_.norm && a == setting_.norm_at());
      const bool added = setting_.residual && a == setting_.residual_at();
      require(floating || added, "quant_matmul", "only x has a gradient: the weights are quantised");
      if (added) wanted.push_back(cotangents[0]);
      else if (plain) wanted.push_back(mx::matmul(cotangents[0], dense(in, 0), stream()));
      else {
        if (!all) all = composed(in, cotangents);
        wanted.push_back((*all)[a == 0 ? 0 : 1]);
      }
    }
    return wanted;
  }

 private:
  mx::array dense(const Arrays& in, int p) {
    const mx::array* part = &in[1 + p * setting_.per_weight()];
    std::optional<mx::array> biases;
    if (setting_.affine) biases = mx::astype(part[2], mx::float32, stream());
    const auto scales = setting_.affine ? mx::astype(part[1], mx::float32, stream()) : part[1];
    return mx::dequantize(part[0], scales, biases, setting_.group, setting_.bits,
                          setting_.affine ? "affine" : "mxfp4", std::nullopt, mx::float32, stream());
  }

  Arrays composed(const Arrays& in, const Arrays& cotangents) {
    Arrays primals{in[0]};
    if (setting_.norm) primals.push_back(in[setting_.norm_at()]);
    const auto f = [&](const Arrays& p) {
      const auto x = setting_.norm ? rms_norm(p[0], p[1], setting_.eps) : p[0];
      Arrays y;
      for (int i = 0; i < setting_.n; ++i) y.push_back(mx::matmul(x, mx::transpose(dense(in, i), stream()), stream()));
      return setting_.gated ? Arrays{swiglu(y[0], y[1])} : y;
    };
    return mx::vjp(f, primals, cotangents).second;
  }
};

}  // namespace

Arrays quant_linear(const mx::array& x, const Arrays& weights, const Arrays& scales, const Arrays& biases,
                    const std::optional<mx::array>& norm, float eps, const std::optional<mx::array>& residual,
                    bool gated, int group, int bits, int terms, bool prompt) {
  const char* op = "quant_matmul";
  const int n = static_cast<int>(weights.size());
  const bool affine = !biases.empty();
  require(bits == 4 || bits == 8, op, "bits must be 4 or 8");
  require(group == 32 || group == 64 || group == 128, op, "the group size must be 32, 64 or 128");
  require(terms >= 0 && terms <= 2, op, "terms must be 0, 1 or 2");
  require(is_scale(x.dtype()) && x.ndim() >= 1, op, "x must be float32, float16 or bfloat16");
  require(n >= 1 && n <= 3 && scales.size() == weights.size() && (!affine || biases.size() == weights.size()), op,
          "one to three weights, each with its scales (and biases)");
  require(x.shape(-1) % group == 0, op, "the last axis of x must hold whole groups");
  for (int i = 0; i < n; ++i) {
    const auto &weight = weights[i], &scale = scales[i];
    require(weight.ndim() == 2 && weight.dtype() == mx::uint32, op, "weight must be uint32 [O, I·bits/32]");
    require(static_cast<int64_t>(weight.shape(1)) * 32 == static_cast<int64_t>(x.shape(-1)) * bits, op,
            "weight does not fit the last axis of x");
    const mx::Shape groups{weight.shape(0), x.shape(-1) / group};
    require(scale.shape() == groups, op, "scales must be [O, I/group]");
    require(scale.dtype() == scales[0].dtype(), op, "the weights' scales must be of one dtype");
    if (affine) {
      require(biases[i].shape() == groups && biases[i].dtype() == scale.dtype(), op, "biases must be like scales");
      require(is_scale(scale.dtype()), op, "scales must be float32, float16 or bfloat16");
    } else {
      require(scale.dtype() == mx::uint8 && bits == 4 && group == 32, op,
              "without biases, only mxfp4: uint8 scales of groups of 32");
    }
  }
  require(!gated || (n == 2 && weights[0].shape(0) == weights[1].shape(0)), op, "gated asks for two weights of one shape");
  require(!norm || norm->shape() == mx::Shape{x.shape(-1)}, op, "the norm's weight must be [I]");
  const auto s = cpu_stream();
  std::vector<mx::Shape> shapes;
  for (int i = 0; i < (gated ? 1 : n); ++i) {
    shapes.push_back(x.shape());
    shapes.back().back() = weights[i].shape(0);
  }
  require(!residual || (shapes.size() == 1 && residual->shape() == shapes[0]), op, "the residual must be like the result");
  const auto wide = [&](const mx::array& a) { return in_rows(mx::astype(a, mx::float32, s), s); };
  Arrays in{wide(x)};
  for (int i = 0; i < n; ++i) {
    in.push_back(in_rows(weights[i], s));
    in.push_back(in_rows(scales[i], s));
    if (affine) in.push_back(in_rows(biases[i], s));
  }
  if (norm) in.push_back(wide(*norm));
  if (residual) in.push_back(wide(*residual));
  const Setting setting{bits, group, terms, n, affine, norm.has_value(), residual.has_value(), gated, prompt, eps};
  auto ys = mx::array::make_arrays(std::move(shapes), std::vector<mx::Dtype>(gated ? 1 : n, mx::float32),
                                   std::make_shared<QuantLinearOp>(s, setting), std::move(in));
  for (auto& y : ys) y = mx::astype(y, x.dtype(), s);
  return ys;
}

}  // namespace mcl
