// The kernels of one row each against their formulas in float64: rms_norm, swiglu, rope, cross_entropy, adamw and the
// gradients of the first two and the fourth.
#include "check.h"
#include "simd/kernels.h"

namespace {

using check::near;
using check::normal;
const double kUlp = std::ldexp(1.0, -24);
const int64_t kLengths[] = {1, 2, 7, 16, 31, 33, 64, 100, 257};

void rms_norm(const mcl::Kernels& run, int64_t n) {
  const int64_t rows = 3;
  const float eps = 1e-5f;
  const auto x = normal(rows * n), w = normal(n), dy = normal(rows * n);
  std::vector<float> y(rows * n), dx(rows * n), dw(n, 0.5f);
  run.rms_norm(x.data(), w.data(), y.data(), rows, n, eps);
  run.rms_norm_grad(x.data(), w.data(), dy.data(), dx.data(), dw.data(), rows, n, eps);
  std::vector<double> weights(n, 0.5);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, dot = 0;
    for (int64_t i = 0; i < n; ++i) {
      squares += double(x[r * n + i]) * x[r * n + i];
      dot += double(x[r * n + i]) * w[i] * dy[r * n + i];
    }
    const double scale = 1 / std::sqrt(squares / n + eps);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = r * n + i;
      const double size = std::fabs(x[at] * scale * w[i]);
      near("rms_norm", at, x[at] * scale * w[i], y[at], (n + 8) * kUlp * size);
      const double back = x[at] * scale * scale * scale * dot / n;
      near("rms_norm_grad", at, w[i] * dy[at] * scale - back, dx[at],
           (n + 16) * kUlp * 4 * (std::fabs(w[i] * dy[at] * scale) + std::fabs(x[at]) * scale * scale * scale + 1e-3));
      weights[i] += dy[at] * x[at] * scale;
    }
  }
  for (int64_t i = 0; i < n; ++i) near("rms_norm_grad weight", i, weights[i], dw[i], (n + 16) * kUlp * 16);
}

void swiglu(const mcl::Kernels& run, int64_t n) {
  auto g = normal(n, 4);
  const auto u = normal(n), dy = normal(n);
  if (n > 4) g[0] = 200, g[1] = -200, g[2] = NAN, g[3] = INFINITY;
  std::vector<float> y(n), dg(n), du(n);
  run.swiglu(g.data(), u.data(), y.data(), n);
  run.swiglu_grad(g.data(), u.data(), dy.data(), dg.data(), du.data(), n);
  for (int64_t i = 0; i < n; ++i) {
    const double s = 1 / (1 + std::exp(-double(g[i])));
    const double tiny = 1e-35;  // e^x counts as 0 below -87.3
    near("swiglu", i, g[i] * s * u[i], y[i], 8 * kUlp * std::fabs(g[i] * s * u[i]) + tiny);
    if (!std::isfinite(g[i])) continue;
    near("swiglu_grad gate", i, dy[i] * u[i] * s * (1 + g[i] * (1 - s)), dg[i],
         16 * kUlp * std::fabs(dy[i] * u[i]) * (1 + std::fabs(g[i])) + tiny);
    near("swiglu_grad up", i, dy[i] * g[i] * s, du[i], 8 * kUlp * std::fabs(dy[i] * g[i] * s) + tiny);
  }
}

void rope(const mcl::Kernels& run, int64_t half) {
  const auto x = normal(2 * half), angle = normal(half, 3);
  std::vector<float> c(half), s(half), y(2 * half), back(2 * half);
  for (int64_t i = 0; i < half; ++i) c[i] = std::cos(angle[i]), s[i] = std::sin(angle[i]);
  run.rope(x.data(), c.data(), s.data(), y.data(), half, 1);
  run.rope(y.data(), c.data(), s.data(), back.data(), half, -1);
  for (int64_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[half + i], size = std::fabs(a) + std::fabs(b);
    near("rope", i, a * c[i] - b * s[i], y[i], 4 * kUlp * size);
    near("rope", half + i, b * c[i] + a * s[i], y[half + i], 4 * kUlp * size);
    near("rope and back", i, a, back[i], 12 * kUlp * size);
  }
}

void cross_entropy(const mcl::Kernels& run, int64_t n) {
  auto x = normal(n, 5);
  if (n > 20) x[3] = -INFINITY;
  for (const int32_t target : {int32_t(0), int32_t(n - 1), int32_t(-1), int32_t(n)}) {
    float loss = 9, of[2] = {9, 9};
    std::vector<float> d(n, 9);
    run.cross_entropy(x.data(), target, n, &loss, of);
    run.cross_entropy_grad(x.data(), target, of, 2, d.data(), n);
    double most = -INFINITY, total = 0;
    for (const float v : x) most = std::fmax(most, v);
    for (const float v : x) total += std::exp(v - most);
    const double expected = target < 0 ? 0 : target < n ? most + std::log(total) - x[target] : NAN;
    near("cross_entropy", target, expected, loss, (n / 8 + 16) * kUlp * (1 + std::fabs(most) * 2));
    for (int64_t i = 0; i < n; ++i) {
      const double p = std::exp(x[i] - most) / total - (i == target);
      near("cross_entropy_grad", i, target < 0 ? 0 : 2 * p, d[i], (n / 8 + 64) * kUlp * 2);
    }
  }
}

void adamw(const mcl::Kernels& run, int64_t n) {
  const auto p = normal(n), g = normal(n), m = normal(n, 0.1f);
  auto v = normal(n);
  for (float& a : v) a = a * a;
  const mcl::AdamW how{0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 1 / (1 - 0.9f * 0.9f), 1 / (1 - 0.95f * 0.95f)};
  std::vector<float> p1(n), m1(n), v1(n);
  run.adamw(how, 0.25f, p.data(), g.data(), m.data(), v.data(), p1.data(), m1.data(), v1.data(), n);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    squares += double(g[i]) * g[i];
    const double a = g[i] * 0.25, mean = m[i] * 0.9 + a * 0.1, square = v[i] * 0.95 + a * a * 0.05;
    const double step = 0.01 * mean * how.correct1 / (std::sqrt(square * how.correct2) + 1e-8);
    near("adamw m", i, mean, m1[i], 1e-6);
    near("adamw v", i, square, v1[i], 1e-6 * (1 + square));
    near("adamw p", i, p[i] * (1 - 0.001) - step, p1[i], 1e-6 * (1 + std::fabs(p[i]) + std::fabs(step)));
  }
  near("sum_squares", n, squares, run.sum_squares(g.data(), n), (n + 8) * kUlp * squares);
}

}  // namespace

int main() {
  const mcl::Kernels& run = mcl::kernels();
  for (const int64_t n : kLengths) {
    rms_norm(run, n);
    swiglu(run, n);
    rope(run, n);
    cross_entropy(run, n);
    adamw(run, n);
  }
  return check::result("elementwise", run.name, mcl::threads());
}
