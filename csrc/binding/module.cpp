#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "binding/native.h"
#include "pool/pool.h"
#include "simd/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

// A shared_ptr that nanobind makes of a Python object takes the interpreter's lock where it is dropped, and MLX's stream
// drops its own after each token: it would wait for Python, and end the process if that is ending. This one is plain C++.
struct HeldWeights {
  std::shared_ptr<const mcl::DecoderWeights> held;
};

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");  // the array type comes from there
  m.def("rms_norm", &mcl::rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("zeros_like", &mcl::zeros_like, "like"_a, "shape"_a);
  m.def("swiglu", &mcl::swiglu, "gate"_a, "up"_a);
  m.def("rope", &mcl::rope, "x"_a, "cos"_a, "sin"_a, "inverse"_a = false);
  m.def("cross_entropy", &mcl::cross_entropy, "logits"_a, "targets"_a);
  m.def("kv_attention", &mcl::kv_attention, "q"_a, "k"_a, "v"_a, "scale"_a, "starts"_a = nb::none(),
        "window"_a = std::vector<int64_t>(), "prompt"_a = nb::none());
  m.def("quant_linear", &mcl::quant_linear, "x"_a, "weights"_a, "scales"_a, "biases"_a, "norm"_a.none(), "eps"_a,
        "residual"_a.none(), "gated"_a, "group_size"_a, "bits"_a, "terms"_a, "prompt"_a);
  m.def("kv_attention_rows", &mcl::kv_attention_rows, "q"_a, "rows"_a, "k_bits"_a, "v_bits"_a, "scale"_a, "offset"_a,
        "window"_a = std::vector<int64_t>(), "prompt"_a = nb::none());
  m.def("kv_attention_segments", &mcl::kv_attention_segments, "q"_a, "arrays"_a, "tokens"_a, "k_bits"_a, "v_bits"_a,
        "scale"_a, "prompt"_a);
  m.def("rope_append", &mcl::rope_append, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "k_bits"_a, "v_bits"_a);
  m.def("any_traced", &mcl::any_traced, "arrays"_a);
  nb::class_<HeldWeights>(m, "DecoderWeights")
      .def("__init__", [](HeldWeights* self, const mcl::Arrays& weights, const mcl::Arrays& scales, const mcl::Arrays& biases,
                          const mcl::Arrays& norms, const std::vector<float>& eps,
                          const std::vector<std::vector<int>>& formats, int heads, int kv_heads) {
        new (self) HeldWeights{
            std::make_shared<const mcl::DecoderWeights>(weights, scales, biases, norms, eps, formats, heads, kv_heads)};
      });
  m.def("decoder_blocks", [](const std::vector<const HeldWeights*>& layers, const mcl::mx::array& x,
                             const mcl::mx::array& cosine, const mcl::mx::array& sine, const mcl::Arrays& tails,
                             const mcl::Arrays& segments, const std::vector<std::vector<int>>& spans, float scale, int k_bits,
                             int v_bits) {
    std::vector<std::shared_ptr<const mcl::DecoderWeights>> weights;
    for (const HeldWeights* layer : layers) weights.push_back(layer->held);
    return mcl::decoder_blocks(std::move(weights), x, cosine, sine, tails, segments, spans, scale, k_bits, v_bits);
  });
  m.def("adamw", &mcl::adamw, "p"_a, "g"_a, "m"_a, "v"_a, "grad_scale"_a, "rate"_a, "beta1"_a, "beta2"_a, "eps"_a,
        "decay"_a, "step"_a);
  m.def("sum_squares", &mcl::sum_squares, "arrays"_a);
  m.def("threads", [] { return mcl::threads(); });
  m.def("isa", [] { return std::string(mcl::kernels().name); });
}
