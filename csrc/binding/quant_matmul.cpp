#include "quant_matmul/quant_matmul.h"

#include "binding/native.h"

namespace mcl {
namespace {

bool is_scale(mx::Dtype t) { return t == mx::float32 || t == mx::float16 || t == mx::bfloat16; }

// x [..., depth] float32, weight [outs, words], scales [outs, groups], biases where affine → [..., outs]
class QuantMatmulOp : public Native {
 public:
  QuantMatmulOp(mx::Stream s, int bits, int group, int terms) : Native(s), bits_(bits), group_(group), terms_(terms) {}
  DEFINE_NAME(QuantMatmul)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    allocate(out[0]);
    QuantMatmul s{};
    s.x = in[0].data<float>();
    s.weight = in[1].data<uint32_t>();
    s.scales = in[2].data<void>();
    s.biases = in.size() > 3 ? in[3].data<void>() : nullptr;
    s.y = out[0].data<float>();
    s.depth = in[0].shape(-1);
    s.outs = in[1].shape(0);
    s.rows = s.outs ? static_cast<int64_t>(out[0].size()) / s.outs : 0;
    s.bits = bits_;
    s.group = group_;
    const auto t = in[2].dtype();
    s.scale = in.size() < 4        ? Scale::e8m0
              : t == mx::float32   ? Scale::float32
              : t == mx::float16   ? Scale::float16
                                   : Scale::bfloat16;
    s.terms = terms_;
    enqueue([=] { quant_matmul(s); });
  }

  // Only x has a gradient: dy @ dequantised(W). Training reads it once per step, so MLX's own operations will do.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays wanted;
    for (int a : argnums) {
      require(a == 0, "quant_matmul", "only x has a gradient: the weights are quantised");
      const bool affine = primals.size() > 3;
      const auto scales = affine ? mx::astype(primals[2], mx::float32, stream()) : primals[2];
      std::optional<mx::array> biases;
      if (affine) biases = mx::astype(primals[3], mx::float32, stream());
      const auto dense = mx::dequantize(primals[1], scales, biases, group_, bits_, affine ? "affine" : "mxfp4",
                                        std::nullopt, mx::float32, stream());
      wanted.push_back(mx::matmul(cotangents[0], dense, stream()));
    }
    return wanted;
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const QuantMatmulOp&>(other);
    return bits_ == o.bits_ && group_ == o.group_ && terms_ == o.terms_;
  }

 private:
  int bits_, group_, terms_;
};

}  // namespace

mx::array quant_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales,
                       const std::optional<mx::array>& biases, int group, int bits, int terms) {
  const char* op = "quant_matmul";
  require(bits == 4 || bits == 8, op, "bits must be 4 or 8");
  require(group == 32 || group == 64 || group == 128, op, "the group size must be 32, 64 or 128");
  require(terms >= 0 && terms <= 2, op, "terms must be 0, 1 or 2");
  require(is_scale(x.dtype()), op, "x must be float32, float16 or bfloat16");
  require(x.ndim() >= 1 && weight.ndim() == 2 && weight.dtype() == mx::uint32, op, "weight must be uint32 [O, I·bits/32]");
  require(x.shape(-1) % group == 0, op, "the last axis of x must hold whole groups");
  require(static_cast<int64_t>(weight.shape(1)) * 32 == static_cast<int64_t>(x.shape(-1)) * bits, op,
          "weight does not fit the last axis of x");
  const mx::Shape groups{weight.shape(0), x.shape(-1) / group};
  require(scales.shape() == groups, op, "scales must be [O, I/group]");
  if (biases) {
    require(biases->shape() == groups && biases->dtype() == scales.dtype(), op, "biases must be like scales");
    require(is_scale(scales.dtype()), op, "scales must be float32, float16 or bfloat16");
  } else {
    require(scales.dtype() == mx::uint8 && bits == 4 && group == 32, op,
            "without biases, only mxfp4: uint8 scales of groups of 32");
  }
  const auto s = cpu_stream();
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  Arrays in{rows(mx::astype(x, mx::float32, s), s), rows(weight, s), rows(scales, s)};
  if (biases) in.push_back(rows(*biases, s));
  const auto y =
      mx::array(std::move(shape), mx::float32, std::make_shared<QuantMatmulOp>(s, bits, group, terms), std::move(in));
  return mx::astype(y, x.dtype(), s);
}

}  // namespace mcl
