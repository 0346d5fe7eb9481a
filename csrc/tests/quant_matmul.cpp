// quant_linear against sums in float64: 4 and 8 bits and mxfp4, all groups and kinds of scale, few rows and many,
// float and integer activations, several products at once, NaN and infinity.
#include <algorithm>

#include "check.h"
#include "quant_matmul/quant_matmul.h"
#include "simd/kernels.h"

namespace {

struct Weights {
  std::vector<uint32_t> words;
  std::vector<uint32_t> scales, biases;  // storage of any kind of scale
  std::vector<double> dense;             // [outs, depth]
};

const double kFloat4[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

Weights make(int64_t outs, int64_t depth, int bits, int group, mcl::Scale kind, bool full = false) {
  Weights w;
  w.words.resize(outs * depth * bits / 32, ~0u);
  if (!full)
    for (uint32_t& word : w.words) word = check::engine()();
  const int64_t groups = outs * depth / group, bytes = kind == mcl::Scale::float32 ? 4 : kind == mcl::Scale::e8m0 ? 1 : 2;
  w.scales.resize((groups * bytes + 3) / 4);
  w.biases.resize(w.scales.size());
  std::vector<double> scale(groups), bias(groups);
  for (int64_t g = 0; g < groups; ++g) {
    const float a = check::normal(1, 0.05f)[0], b = check::normal(1, 0.3f)[0];
    if (kind == mcl::Scale::float32) {
      std::memcpy(w.scales.data() + g, &a, 4), std::memcpy(w.biases.data() + g, &b, 4);
      scale[g] = a, bias[g] = b;
    } else if (kind == mcl::Scale::e8m0) {
      const uint8_t e = static_cast<uint8_t>(120 + check::bits(12));
      reinterpret_cast<uint8_t*>(w.scales.data())[g] = e;
      scale[g] = std::ldexp(1.0, e - 127);
    } else {
      uint16_t sa, sb;
      if (kind == mcl::Scale::float16) {
        sa = check::float_to_half(a), sb = check::float_to_half(b);
        scale[g] = check::half_to_float(sa), bias[g] = check::half_to_float(sb);
      } else {
        uint32_t ua, ub;
        std::memcpy(&ua, &a, 4), std::memcpy(&ub, &b, 4);
        sa = ua >> 16, sb = ub >> 16;
        scale[g] = check::bfloat_to_float(sa), bias[g] = check::bfloat_to_float(sb);
      }
      reinterpret_cast<uint16_t*>(w.scales.data())[g] = sa;
      reinterpret_cast<uint16_t*>(w.biases.data())[g] = sb;
    }
  }
  w.dense.resize(outs * depth);
  for (int64_t i = 0; i < outs * depth; ++i) {
    const int64_t per = 32 / bits;
    const uint32_t code = w.words[i / per] >> (i % per * bits) & ((1u << bits) - 1);
    const int64_t g = i / group;
    w.dense[i] = kind == mcl::Scale::e8m0 ? scale[g] * kFloat4[code & 7] * (code & 8 ? -1 : 1) : scale[g] * code + bias[g];
  }
  return w;
}

mcl::QuantMatmul part(const Weights& w, const float* x, float* y, int64_t rows, int64_t depth, int64_t outs, int bits,
                      int group, mcl::Scale kind, int terms) {
  return {x, w.words.data(), w.scales.data(), kind == mcl::Scale::e8m0 ? nullptr : w.biases.data(), y,
          rows, depth, outs, bits, group, kind, terms};
}

void compare(const char* what, const Weights& w, const std::vector<float>& x, const std::vector<float>& y, int64_t rows,
             int64_t depth, int64_t outs, int group, int terms) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outs; ++o) {
      double total = 0, within = 0;
      for (int64_t g = 0; g < depth; g += group) {
        double most = 0, weight = 0;
        for (int64_t i = g; i < g + group; ++i) {
          const double product = w.dense[o * depth + i] * x[r * depth + i];
          total += product;
          weight += std::fabs(w.dense[o * depth + i]);
          most = std::fmax(most, std::fabs(x[r * depth + i]));
          // code · scale and bias are summed apart, and may be larger than what is left of them
          within += 64 * std::ldexp(1.0, -24) * (std::fabs(product) + std::fabs(x[r * depth + i]));
        }
        if (terms) within += weight * most / (terms == 2 ? 32512 : 254) * 1.01;
      }
      check::near(what, r * outs + o, total, y[r * outs + o], within);
    }
}

void one(int bits, int group, mcl::Scale kind, int terms, int64_t rows, int64_t groups, int64_t outs) {
  const int64_t depth = groups * group;
  const Weights w = make(outs, depth, bits, group, kind);
  const auto x = check::normal(rows * depth);
  std::vector<float> y(rows * outs, NAN);
  mcl::QuantLinear l{};
  l.part[0] = part(w, x.data(), y.data(), rows, depth, outs, bits, group, kind, terms);
  l.n = 1;
  mcl::quant_linear(l);
  char what[99];
  std::snprintf(what, sizeof what, "%d bits, group %d, %d terms, %lld x %lld x %lld", bits, group, terms, static_cast<long long>(rows), static_cast<long long>(depth), static_cast<long long>(outs));
  compare(what, w, x, y, rows, depth, outs, group, terms);
}

// The largest codes and integers there are: sums of 16-bit products wrap on the way, by far.
void largest(int bits, int group, int terms) {
  const int64_t rows = 13, outs = 5, depth = 3 * group;
  const Weights w = make(outs, depth, bits, group, mcl::Scale::float32, true);
  std::vector<float> x(rows * depth), y(rows * outs, NAN);
  for (int64_t i = 0; i < rows * depth; ++i) x[i] = i / depth % 3 == 0 || (i / depth % 3 == 1 && check::bits(2)) ? 1.0f : -1.0f;
  mcl::QuantLinear l{};
  l.part[0] = part(w, x.data(), y.data(), rows, depth, outs, bits, group, mcl::Scale::float32, terms);
  l.n = 1;
  mcl::quant_linear(l);
  compare("largest", w, x, y, rows, depth, outs, group, terms);
}

void several(int64_t rows, int terms) {  // three products of different widths, of x normalised; then gate and up
  const int64_t depth = 192, outs[] = {40, 12, 7};
  const int group = 64;
  const auto x = check::normal(rows * depth), norm = check::normal(depth);
  std::vector<float> normed(rows * depth);
  mcl::kernels().rms_norm(x.data(), norm.data(), normed.data(), rows, depth, 1e-5f);
  Weights w[3];
  std::vector<float> y[3];
  mcl::QuantLinear l{};
  for (int p = 0; p < 3; ++p) {
    w[p] = make(outs[p], depth, 4, group, mcl::Scale::float16);
    y[p].assign(rows * outs[p], NAN);
    l.part[p] = part(w[p], x.data(), y[p].data(), rows, depth, outs[p], 4, group, mcl::Scale::float16, terms);
  }
  l.n = 3, l.norm = norm.data(), l.eps = 1e-5f;
  mcl::quant_linear(l);
  for (int p = 0; p < 3; ++p) compare("three products", w[p], normed, y[p], rows, depth, outs[p], group, terms);

  const int64_t width = 24;
  const Weights gate = make(width, depth, 4, group, mcl::Scale::float32), up = make(width, depth, 4, group, mcl::Scale::float32);
  std::vector<float> a(rows * width), b(rows * width), both(rows * width, NAN), plus(rows * width, NAN);
  const auto residual = check::normal(rows * width);
  for (const auto& [weights, to] : {std::pair{&gate, &a}, std::pair{&up, &b}}) {
    mcl::QuantLinear single{};
    single.part[0] = part(*weights, x.data(), to->data(), rows, depth, width, 4, group, mcl::Scale::float32, terms);
    single.n = 1;
    mcl::quant_linear(single);
  }
  mcl::QuantLinear fused{};
  fused.part[0] = part(gate, x.data(), both.data(), rows, depth, width, 4, group, mcl::Scale::float32, terms);
  fused.part[1] = part(up, x.data(), nullptr, rows, depth, width, 4, group, mcl::Scale::float32, terms);
  fused.n = 2, fused.gated = true;
  mcl::quant_linear(fused);
  mcl::QuantLinear added{};
  added.part[0] = part(gate, x.data(), plus.data(), rows, depth, width, 4, group, mcl::Scale::float32, terms);
  added.n = 1, added.residual = residual.data();
  mcl::quant_linear(added);
  for (int64_t i = 0; i < rows * width; ++i) {
    const double g = a[i], expected = g / (1 + std::exp(-g)) * b[i];
    check::near("gate and up", i, expected, both[i], 1e-5 * (1 + std::fabs(expected)));
    check::near("residual", i, double(a[i]) + residual[i], plus[i], 1e-6 * (1 + std::fabs(a[i])));
  }
}

// A row's bits are its own: rows alone, among up to `most` or all at once, also beside one that is not finite.
void company(int bits, int group, mcl::Scale kind, int terms, int64_t rows, bool prompt) {
  const int64_t depth = 9 * group + 128, outs = 70;
  const Weights w = make(outs, depth, bits, group, kind), up = make(outs, depth, bits, group, kind);
  const auto x = check::normal(rows * depth), norm = check::normal(depth), residual = check::normal(rows * outs);
  for (const bool gated : {false, true}) {
    const auto run = [&](const std::vector<float>& all, int64_t first, int64_t n, float* y) {
      mcl::QuantLinear l{};
      l.part[0] = part(w, all.data() + first * depth, y + first * outs, n, depth, outs, bits, group, kind, terms);
      l.part[1] = part(up, all.data() + first * depth, nullptr, n, depth, outs, bits, group, kind, terms);
      l.n = gated ? 2 : 1, l.gated = gated, l.prompt = prompt, l.norm = norm.data(), l.eps = 1e-5f;
      if (!gated) l.residual = residual.data() + first * outs;
      mcl::quant_linear(l);
    };
    std::vector<float> want(rows * outs, NAN);
    for (int64_t r = 0; r < rows; ++r) run(x, r, 1, want.data());
    for (const int64_t n : {int64_t{2}, int64_t{3}, int64_t{5}, int64_t{7}, rows}) {
      std::vector<float> got(rows * outs, NAN);
      for (int64_t r = 0; r < rows; r += n) run(x, r, std::min(n, rows - r), got.data());
      for (int64_t i = 0; i < rows * outs; ++i) check::near("a row among others", i, want[i], got[i], 0);
    }
    auto wild = x;
    wild[depth + 3] = NAN;
    if (rows > 5) wild[5 * depth + 70] = INFINITY;
    std::vector<float> got(rows * outs, 0);
    run(wild, 0, rows, got.data());
    for (int64_t i = 0; i < rows * outs; ++i)
      check::near("beside a row that is not finite", i, i / outs == 1 || i / outs == 5 ? NAN : want[i], got[i], 0);
  }
}

void not_finite(int64_t rows, int terms) {
  const int64_t depth = 128, outs = 9;
  const Weights w = make(outs, depth, 4, 64, mcl::Scale::float32);
  auto x = check::normal(rows * depth);
  x[5] = NAN;
  if (rows > 1) x[depth + 70] = INFINITY;
  std::vector<float> y(rows * outs);
  mcl::QuantLinear l{};
  l.part[0] = part(w, x.data(), y.data(), rows, depth, outs, 4, 64, mcl::Scale::float32, terms);
  l.n = 1;
  mcl::quant_linear(l);
  for (int64_t o = 0; o < outs; ++o) {
    check::near("NaN", o, NAN, y[o], 0);
    if (rows > 1) {
      const double v = w.dense[o * depth + 70];
      check::near("infinity", o, v == 0 ? NAN : v > 0 ? INFINITY : -INFINITY, y[outs + o], 0);
    }
  }
}

}  // namespace

int main() {
  using enum mcl::Scale;
  for (const int terms : {0, 1, 2}) {
    for (const int bits : {4, 8})
      for (const int group : {32, 64, 128})
        for (const auto kind : {float32, float16, bfloat16})
          for (const int64_t rows : {1, 3, 9}) one(bits, group, kind, terms, rows, 1 + check::bits(5), 1 + check::bits(70));
    one(4, 64, float16, terms, 70, 20, 131);  // several panels and blocks
    one(8, 32, float16, terms, 1, 40, 300);
    one(4, 64, float32, terms, 0, 2, 5);  // no rows
    for (const int bits : {4, 8})
      for (const int group : {32, 64, 128}) largest(bits, group, terms);
    for (const int64_t rows : {1, 2, 6}) several(rows, terms), not_finite(rows, terms);
  }
  for (const int terms : {0, 1, 2})
    for (const int bits : {4, 8})
      for (const bool prompt : {false, true}) {
        company(bits, 32, float16, terms, prompt ? 150 : 8, prompt);
        company(bits, 64, float32, terms, 8, prompt);
        company(bits, 128, bfloat16, terms, prompt ? 13 : 6, prompt);
      }
  for (const int64_t rows : {1, 3, 9}) one(4, 32, e8m0, 0, rows, 3, 37);
  return check::result("quant_matmul", mcl::kernels().name, mcl::threads());
}
