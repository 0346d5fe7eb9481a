#include "rope_append/rope_append.h"

#include "binding/heads.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

// Inputs: q, k, v (float32), cos, sin. Outputs: q turned, the rows of k turned and v.
class RopeAppend : public NativeWith<RowLayout> {
 public:
  using NativeWith::NativeWith;
  DEFINE_NAME(RopeAppend)

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const Heads q0(in[0]), k0(in[1]), v0(in[2]);
    const float *cosine = in[3].data<float>(), *sine = in[4].data<float>();
    const Strided to = allocate_like(in[0], out[0]);
    allocate(out[1]);
    float* turned = out[0].data<float>();
    uint32_t* rows = out[1].data<uint32_t>();
    enqueue([=, layout = setting_] {
      std::vector<float> stores[3];
      Heads q = q0, k = k0, v = v0;
      q.straighten(stores[0]), k.straighten(stores[1]), v.straighten(stores[2]);
      const int64_t half = q.D / 2, words = layout.words();
      const Kernels& run = kernels();
      parallel_ranges(q.B * q.L, 4, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
          const int64_t b = i / q.L, l = i % q.L;
          const float *c = cosine + l * half, *s = sine + l * half;
          for (int64_t n = 0; n < q.N; ++n)
            run.rope(q.data + b * q.strides.batch + n * q.strides.head + l * q.strides.row, c, s,
                     turned + b * to.batch + n * to.head + l * to.row, half, 1.0f);
          for (int64_t n = 0; n < k.N; ++n)
            run.append_row(layout, k.data + b * k.strides.batch + n * k.strides.head + l * k.strides.row,
                           v.data + b * v.strides.batch + n * v.strides.head + l * v.strides.row, c, s,
                           rows + ((b * k.N + n) * k.L + l) * words);
        }
      });
    });
  }
};

}  // namespace

Arrays rope_append(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cosine,
                   const mx::array& sine, int k_bits, int v_bits) {
  const char* op = "rope_append";
  require(q.ndim() == 4 && k.ndim() == 4 && k.shape() == v.shape(), op, "q must be [B, H, L, D], k and v [B, K, L, D]");
  require(q.shape(0) == k.shape(0) && q.shape(2) == k.shape(2) && q.shape(3) == k.shape(3), op,
          "q and k must have the same B, L and D");
  for (const auto& x : {q, k, v})
    require(mx::issubdtype(x.dtype(), mx::floating), op, "q, k and v must be floats");
  require(cosine.dtype() == mx::float32 && sine.dtype() == mx::float32, op, "the tables must be float32");
  const mx::Shape table{q.shape(2), q.shape(3) / 2};
  require(cosine.shape() == table && sine.shape() == table, op, "the tables must be [L, D/2]");
  require(q.shape(3) <= kMostRowDepth, op, "D must be at most 256");
  require_rows(op, {q.shape(3), k_bits, v_bits});
  const RowLayout layout{q.shape(3), k_bits, v_bits};
  const auto s = cpu_stream();
  const auto wide = [&](const mx::array& x) { return mx::astype(x, mx::float32, s); };
  auto out = mx::array::make_arrays(
      {q.shape(), {k.shape(0), k.shape(1), k.shape(2), static_cast<int>(layout.words())}}, {mx::float32, mx::uint32},
      std::make_shared<RopeAppend>(s, layout), {wide(q), wide(k), wide(v), rows(cosine, s), rows(sine, s)});
  return {mx::astype(out[0], q.dtype(), s), out[1]};
}

}  // namespace mcl
