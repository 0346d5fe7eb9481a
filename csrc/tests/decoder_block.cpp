// A layer in one launch against the same kernels one launch after the other, to the bit: several widths, formats, caches.
#include "decoder_block/decoder_block.h"

#include <algorithm>

#include "check.h"
#include "simd/kernels.h"

namespace {

struct Weights {
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales, biases;
  mcl::QuantMatmul part(const float* x, float* y, int64_t rows, int64_t depth, int64_t outs, int bits, int group, int terms) const {
    return {x, words.data(), scales.data(), biases.data(), y, rows, depth, outs, bits, group, mcl::Scale::float16, terms};
  }
};

Weights make(int64_t outs, int64_t depth, int bits, int group) {
  Weights w;
  for (int64_t i = 0; i < outs * depth * bits / 32; ++i) w.words.push_back(check::engine()());
  for (int64_t i = 0; i < outs * depth / group; ++i) {
    const float scale = 0.3f / static_cast<float>((1 << bits) * std::sqrt(static_cast<double>(depth)));
    w.scales.push_back(check::float_to_half(scale * static_cast<float>(1 + check::bits(5))));
    w.biases.push_back(check::float_to_half(-scale * static_cast<float>(1 << (bits - 1)) * 3));
  }
  w.words.shrink_to_fit(), w.scales.shrink_to_fit(), w.biases.shrink_to_fit();
  return w;
}

enum Cache { kFloats, kHalves, kRows };

void one(int64_t B, int64_t L, int64_t held, int terms, Cache cache, bool broken) {
  const int64_t H = 6, K = 2, D = 64, E = 192, F = 320, rows = B * L, total = held + L, capacity = total + 3;
  const int bits[4] = {4, 8, 8, 4}, group[4] = {64, 128, 32, 64};
  const Weights q = make(H * D, E, 4, 64), k = make(K * D, E, 4, 64), v = make(K * D, E, 4, 64), o = make(E, H * D, 8, 128),
                gate = make(F, E, 8, 32), up = make(F, E, 8, 32), down = make(E, F, 4, 64);
  auto x = check::normal(rows * E);
  if (broken) x[rows * E - 5] = NAN;
  const auto norm1 = check::normal(E), norm2 = check::normal(E), cosine = check::normal(L * D / 2), sine = check::normal(L * D / 2);
  const mcl::RowLayout layout{D, 8, 4};
  const int64_t row_bytes = cache == kRows ? layout.words() * 4 : cache == kHalves ? D * 2 : D * 4;
  std::vector<char> keys(B * K * capacity * row_bytes), values(cache == kRows ? 0 : keys.size());
  const mcl::Kernels& run = mcl::kernels();
  const auto place = [&](std::vector<char>& to, int64_t b, int64_t n, int64_t t) { return to.data() + ((b * K + n) * capacity + t) * row_bytes; };
  const auto append = [&](int64_t b, int64_t n, int64_t t, const float* key, const float* value, const float* c, const float* s) {
    if (cache == kRows) {
      run.append_row(layout, key, value, c, s, reinterpret_cast<uint32_t*>(place(keys, b, n, t)));
    } else if (cache == kFloats) {
      run.rope(key, c, s, reinterpret_cast<float*>(place(keys, b, n, t)), D / 2, 1);
      std::memcpy(place(values, b, n, t), value, D * 4);
    } else {
      uint32_t both[D];
      run.append_row({D, 16, 16}, key, value, c, s, both);
      std::memcpy(place(keys, b, n, t), both, D * 2);
      std::memcpy(place(values, b, n, t), both + D / 2, D * 2);
    }
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t n = 0; n < K; ++n)
      for (int64_t t = 0; t < held; ++t) {
        const auto key = check::normal(D), value = check::normal(D);
        append(b, n, t, key.data(), value.data(), cosine.data(), sine.data());
      }

  mcl::DecoderBlock all{};
  all.B = B, all.L = L, all.H = H, all.K = K, all.D = D;
  std::vector<float> y(rows * E, NAN);
  all.x = x.data(), all.y = y.data();
  const auto of = [&](int i, const Weights& w, const float* in, float* out, int64_t depth, int64_t outs) {
    return w.part(in, out, rows, depth, outs, bits[i], group[i], terms);
  };
  all.qkv.n = 3, all.qkv.norm = norm1.data(), all.qkv.eps = 1e-5f;
  all.qkv.part[0] = of(0, q, nullptr, nullptr, E, H * D), all.qkv.part[1] = of(0, k, nullptr, nullptr, E, K * D);
  all.qkv.part[2] = of(0, v, nullptr, nullptr, E, K * D);
  all.out.n = 1, all.out.part[0] = of(1, o, nullptr, nullptr, H * D, E);
  all.gate_up.n = 2, all.gate_up.norm = norm2.data(), all.gate_up.eps = 2e-3f;
  all.gate_up.part[0] = of(2, gate, nullptr, nullptr, E, F), all.gate_up.part[1] = of(2, up, nullptr, nullptr, E, F);
  all.down.n = 1, all.down.part[0] = of(3, down, nullptr, nullptr, F, E);
  all.cosine = cosine.data(), all.sine = sine.data(), all.cosine_row = all.sine_row = D / 2;
  all.packed = cache == kRows, all.layout = layout, all.type = cache == kHalves ? mcl::Stored::float16 : mcl::Stored::float32;
  auto its_keys = keys, its_values = values;
  all.k = its_keys.data(), all.v = its_values.data();
  all.strides = {K * capacity * row_bytes, capacity * row_bytes, row_bytes};
  all.place = held, all.total = total, all.scale = 0.11f;
  mcl::decoder_block(all);

  std::vector<float> qs(rows * H * D), ks(rows * K * D), vs(rows * K * D), seen(rows * H * D), h(rows * E), inner(rows * F), want(rows * E);
  mcl::QuantLinear l = all.qkv;
  for (auto& part : l.part) part.x = x.data();
  l.part[0].y = qs.data(), l.part[1].y = ks.data(), l.part[2].y = vs.data();
  mcl::quant_linear(l);
  for (int64_t r = 0; r < rows; ++r) {
    const float *c = cosine.data() + r % L * D / 2, *s = sine.data() + r % L * D / 2;
    for (int64_t n = 0; n < H; ++n) {
      float turned[D];
      run.rope(qs.data() + (r * H + n) * D, c, s, turned, D / 2, 1);
      std::memcpy(qs.data() + (r * H + n) * D, turned, sizeof turned);
    }
    for (int64_t n = 0; n < K; ++n) append(r / L, n, held + r % L, ks.data() + (r * K + n) * D, vs.data() + (r * K + n) * D, c, s);
  }
  mcl::Attention a{};
  a.B = B, a.H = H, a.K = K, a.L = L, a.T = total, a.D = D, a.scale = all.scale;
  a.q = qs.data(), a.o = seen.data(), a.qs = a.os = {L * H * D, D, H * D};
  if (cache == kRows) mcl::hold_rows(a, keys.data(), all.strides, layout);
  else a.k = {keys.data(), all.strides, all.type, nullptr, 0}, a.v = {values.data(), all.strides, all.type, nullptr, 0};
  mcl::attention_forward(a);
  l = all.out, l.part[0].x = seen.data(), l.part[0].y = h.data(), l.residual = x.data();
  mcl::quant_linear(l);
  l = all.gate_up, l.gated = true, l.part[0].x = l.part[1].x = h.data(), l.part[0].y = inner.data();
  mcl::quant_linear(l);
  l = all.down, l.part[0].x = inner.data(), l.part[0].y = want.data(), l.residual = h.data();
  mcl::quant_linear(l);
  for (int64_t i = 0; i < rows * E; ++i) check::near("y", i, want[i], y[i], 0);
  for (size_t i = 0; i < keys.size(); ++i) check::near("keys", static_cast<int64_t>(i), keys[i], its_keys[i], 0);
  for (size_t i = 0; i < values.size(); ++i) check::near("values", static_cast<int64_t>(i), values[i], its_values[i], 0);

  // The same again in a cache whose heads lie more than 2^31 bytes apart.
  const int64_t apart = (int64_t{1} << 31) + 4096, part = capacity * row_bytes;
  const check::Expanse far_keys(B * K * apart), far_values(B * K * apart);
  if (!far_keys.data() || !far_values.data()) return;
  for (int64_t i = 0; i < B * K; ++i) {
    std::memcpy(far_keys.data() + i * apart, keys.data() + i * part, static_cast<size_t>(held * row_bytes));
    if (!values.empty()) std::memcpy(far_values.data() + i * apart, values.data() + i * part, static_cast<size_t>(held * row_bytes));
  }
  all.k = far_keys.data(), all.v = far_values.data(), all.strides = {K * apart, apart, row_bytes};
  std::fill(y.begin(), y.end(), NAN);
  mcl::decoder_block(all);
  for (int64_t i = 0; i < rows * E; ++i) check::near("y, heads far apart", i, want[i], y[i], 0);
  for (int64_t i = 0; i < B * K; ++i)
    for (int64_t j = 0; j < total * row_bytes; ++j) check::near("keys, heads far apart", i, keys[i * part + j], far_keys.data()[i * apart + j], 0);
}

}  // namespace

int main() {
  for (const int terms : {0, 2})
    for (const Cache cache : {kFloats, kHalves, kRows}) {
      one(1, 1, 1100, terms, cache, false);  // the keys are split
      one(2, 1, 5, terms, cache, false);
      one(1, 3, 70, terms, cache, false);
      one(2, 2, 0, terms, cache, true);
      if (terms) one(1, 8, 33, terms, cache, false);
    }
  return check::result("decoder_block", mcl::kernels().name, mcl::threads());
}
