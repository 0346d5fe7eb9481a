#include <cstring>

#include "binding/native.h"
#include "pool/pool.h"

namespace mcl {
namespace {

constexpr int64_t kGrain = 1 << 20;  // bytes

// Memory that the system has not given yet is cleared by it, page by page, for whoever touches it first: by all threads
// here, for MLX does so on one while the others wait.
class Zeros : public Native {
 public:
  using Native::Native;
  DEFINE_NAME(Zeros)
  DEFINE_DEFAULT_IS_EQUIVALENT()

  void eval_cpu(const Arrays&, Arrays& out) override {
    allocate(out[0]);
    char* to = out[0].data<char>();
    const auto n = static_cast<int64_t>(out[0].nbytes());
    enqueue([=] {
      parallel_ranges(n, kGrain, [&](int64_t a, int64_t b) { std::memset(to + a, 0, static_cast<size_t>(b - a)); });
    });
  }
};

}  // namespace

mx::array zeros_like(const mx::array& like, const std::vector<int>& shape) {
  int64_t size = 1;
  for (const int n : shape) require(n >= 0, "zeros_like", "a dimension is negative"), size *= n;
  const mx::Shape of(shape.begin(), shape.end());
  if (size == 0) return mx::zeros(of, like.dtype(), cpu_stream());
  return mx::array(of, like.dtype(), std::make_shared<Zeros>(cpu_stream()), {});
}

}  // namespace mcl
