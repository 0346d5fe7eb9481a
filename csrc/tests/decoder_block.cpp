// Layers in one launch against the same kernels one launch after the other, to the bit: several widths, formats, caches.
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

constexpr int64_t H = 6, K = 2, D = 64, E = 192, F = 320;

// A layer's matrices and norms.
struct Layer {
  Weights q = make(H * D, E, 4, 64), k = make(K * D, E, 4, 64), v = make(K * D, E, 4, 64), o = make(E, H * D, 8, 128),
          gate = make(F, E, 8, 32), up = make(F, E, 8, 32), down = make(E, F, 4, 64);
  std::vector<float> norm1 = check::normal(E), norm2 = check::normal(E);
};

void some(int layers, int64_t L, int64_t held, int terms, Cache cache, bool broken) {
  const int64_t B = 1, rows = L, total = held + L, capacity = total + 3;
  const int bits[4] = {4, 8, 8, 4}, group[4] = {64, 128, 32, 64};
  auto x = check::normal(rows * E);
  if (broken) x[rows * E - 5] = NAN;
  const auto given = x;
  const auto cosine = check::normal(L * D / 2), sine = check::normal(L * D / 2);
  const mcl::RowLayout layout{D, 8, 4};
  const int64_t row_bytes = cache == kRows ? layout.words() * 4 : cache == kHalves ? D * 2 : D * 4;
  const mcl::Kernels& run = mcl::kernels();
  const auto place = [&](std::vector<char>& to, int64_t b, int64_t n, int64_t t) { return to.data() + ((b * K + n) * capacity + t) * row_bytes; };
  const auto append = [&](std::vector<char>& keys, std::vector<char>& values, int64_t b, int64_t n, int64_t t, const float* key,
                          const float* value, const float* c, const float* s) {
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
  const mcl::Strided strides{K * capacity * row_bytes, capacity * row_bytes, row_bytes};
  const std::vector<Layer> of(static_cast<size_t>(layers));
  using Bytes = std::vector<char>;
  std::vector<Bytes> keys, values;
  for (int i = 0; i < layers; ++i) {
    keys.emplace_back(B * K * capacity * row_bytes), values.emplace_back(cache == kRows ? 0 : keys[i].size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t n = 0; n < K; ++n)
        for (int64_t t = 0; t < held; ++t) {
          const auto key = check::normal(D), value = check::normal(D);
          append(keys[i], values[i], b, n, t, key.data(), value.data(), cosine.data(), sine.data());
        }
  }

  mcl::DecoderBlocks all{};
  all.N = L, all.H = H, all.K = K, all.D = D, all.E = E;
  std::vector<float> y(rows * E, NAN);
  all.x = x.data(), all.y = y.data();
  auto its_keys = keys, its_values = values;
  for (int i = 0; i < layers; ++i) {
    const Layer& w = of[i];
    const auto part = [&](int j, const Weights& m, int64_t depth, int64_t outs) {
      return m.part(nullptr, nullptr, rows, depth, outs, bits[j], group[j], terms);
    };
    mcl::DecoderLayer l{};
    l.qkv.n = 3, l.qkv.norm = w.norm1.data(), l.qkv.eps = 1e-5f;
    l.qkv.part[0] = part(0, w.q, E, H * D), l.qkv.part[1] = part(0, w.k, E, K * D), l.qkv.part[2] = part(0, w.v, E, K * D);
    l.out.n = 1, l.out.part[0] = part(1, w.o, H * D, E);
    l.gate_up.n = 2, l.gate_up.norm = w.norm2.data(), l.gate_up.eps = 2e-3f;
    l.gate_up.part[0] = part(2, w.gate, E, F), l.gate_up.part[1] = part(2, w.up, E, F);
    l.down.n = 1, l.down.part[0] = part(3, w.down, F, E);
    l.held = {{{its_keys[i].data(), its_values[i].data(), strides, total}}};
    all.layers.push_back(l);
  }
  all.cosine = cosine.data(), all.sine = sine.data(), all.cosine_row = all.sine_row = D / 2;
  all.packed = cache == kRows, all.layout = layout, all.type = cache == kHalves ? mcl::Stored::float16 : mcl::Stored::float32;
  all.spans = {{L, held, total}}, all.scale = 0.11f;
  mcl::decoder_blocks(all);

  std::vector<float> qs(rows * H * D), ks(rows * K * D), vs(rows * K * D), seen(rows * H * D), h(rows * E), inner(rows * F), want(rows * E), first;
  for (int i = 0; i < layers; ++i) {
    mcl::QuantLinear l = all.layers[i].qkv;
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
      for (int64_t n = 0; n < K; ++n)
        append(keys[i], values[i], r / L, n, held + r % L, ks.data() + (r * K + n) * D, vs.data() + (r * K + n) * D, c, s);
    }
    mcl::Attention a{};
    a.B = B, a.H = H, a.K = K, a.L = L, a.T = total, a.D = D, a.scale = all.scale;
    a.q = qs.data(), a.o = seen.data(), a.qs = a.os = {L * H * D, D, H * D};
    if (cache == kRows) a.pieces = {mcl::packed_rows(keys[i].data(), strides, layout, total)};
    else a.pieces = {{{keys[i].data(), strides, all.type, nullptr, 0}, {values[i].data(), strides, all.type, nullptr, 0}, total}};
    mcl::attention_forward(a);
    l = all.layers[i].out, l.part[0].x = seen.data(), l.part[0].y = h.data(), l.residual = x.data();
    mcl::quant_linear(l);
    l = all.layers[i].gate_up, l.gated = true, l.part[0].x = l.part[1].x = h.data(), l.part[0].y = inner.data();
    mcl::quant_linear(l);
    l = all.layers[i].down, l.part[0].x = inner.data(), l.part[0].y = want.data(), l.residual = h.data();
    mcl::quant_linear(l);
    x = want;
    if (i == 0) first = want;
    for (size_t j = 0; j < keys[i].size(); ++j) check::near("keys", static_cast<int64_t>(j), keys[i][j], its_keys[i][j], 0);
    for (size_t j = 0; j < values[i].size(); ++j) check::near("values", static_cast<int64_t>(j), values[i][j], its_values[i][j], 0);
  }
  for (int64_t i = 0; i < rows * E; ++i) check::near("y", i, want[i], y[i], 0);

  // The first layer again, in a cache whose heads lie more than 2^31 bytes apart.
  const int64_t apart = (int64_t{1} << 31) + 4096, part = capacity * row_bytes;
  const check::Expanse far_keys(B * K * apart), far_values(B * K * apart);
  if (!far_keys.data() || !far_values.data()) return;
  for (int64_t i = 0; i < B * K; ++i) {
    std::memcpy(far_keys.data() + i * apart, keys[0].data() + i * part, static_cast<size_t>(held * row_bytes));
    if (cache != kRows) std::memcpy(far_values.data() + i * apart, values[0].data() + i * part, static_cast<size_t>(held * row_bytes));
  }
  all.x = given.data(), all.layers.resize(1);
  all.layers[0].held = {{{far_keys.data(), far_values.data(), {K * apart, apart, row_bytes}, total}}};
  std::fill(y.begin(), y.end(), NAN);
  mcl::decoder_blocks(all);
  for (int64_t i = 0; i < rows * E; ++i) check::near("y, heads far apart", i, first[i], y[i], 0);
  for (int64_t i = 0; i < B * K; ++i)
    for (int64_t j = 0; j < total * row_bytes; ++j) check::near("keys, heads far apart", i, keys[0][i * part + j], far_keys.data()[i * apart + j], 0);
}

// One sequence, its keys and values in storages one after the other.
struct Text {
  int64_t held;                  // tokens before the new ones
  std::vector<int64_t> pieces;   // of those, how many lie in storages that do not grow
};

// Spans of several sequences in one launch against each of their tokens alone, to the bit: y and what is stored.
void ragged(const std::vector<Text>& texts, const std::vector<int64_t>& lengths, int terms, Cache cache) {
  const mcl::RowLayout layout{D, 4, 4};
  const int64_t row_bytes = cache == kRows ? layout.words() * 4 : cache == kHalves ? D * 2 : D * 4;
  const std::vector<Layer> of(2);
  const int bits[4] = {4, 8, 8, 4}, group[4] = {64, 128, 32, 64};
  int64_t N = 0;
  for (const int64_t n : lengths) N += n;
  const auto x = check::normal(N * E), cosine = check::normal(N * D / 2), sine = check::normal(N * D / 2);
  using Bytes = std::vector<char>;
  struct Arrays {
    std::vector<Bytes> k, v;
    std::vector<mcl::Storage> at;
  };
  std::vector<std::vector<Arrays>> stores(of.size());  // [layer][text]
  for (auto& layer : stores)
    for (size_t i = 0; i < texts.size(); ++i) {
      Arrays& a = layer.emplace_back();
      int64_t left = texts[i].held;
      const auto add = [&](int64_t n, int64_t capacity) {
        for (auto* to : {&a.k, &a.v}) {
          Bytes& bytes = to->emplace_back(K * capacity * row_bytes);
          for (int64_t r = 0; r < K * capacity; ++r) {
            const auto key = check::normal(D), value = check::normal(D), zero = std::vector<float>(D / 2), one = std::vector<float>(D / 2, 1.0f);
            if (cache == kFloats) std::memcpy(&bytes[r * row_bytes], key.data(), static_cast<size_t>(row_bytes));
            else mcl::kernels().append_row(cache == kRows ? layout : mcl::RowLayout{D / 2, 16, 16}, key.data(), value.data(), one.data(), zero.data(), reinterpret_cast<uint32_t*>(&bytes[r * row_bytes]));
          }
        }
        a.at.push_back({a.k.back().data(), a.v.back().data(), {0, capacity * row_bytes, row_bytes}, n});
      };
      a.k.reserve(9), a.v.reserve(9);
      for (const int64_t n : texts[i].pieces) add(n, n + 2), left -= n;
      add(left + lengths[i], left + lengths[i] + 1);
    }
  // Of span i the tokens [first, first + n).
  struct Asked {
    size_t text;
    int64_t first, n;
  };
  const auto launch = [&](std::vector<std::vector<Arrays>>& where, const std::vector<Asked>& asked, std::vector<float>& y) {
    mcl::DecoderBlocks b{};
    std::vector<float> given, c, s;
    for (const Asked& one : asked) {
      int64_t start = one.first;
      for (size_t i = 0; i < one.text; ++i) start += lengths[i];
      given.insert(given.end(), x.begin() + start * E, x.begin() + (start + one.n) * E);
      c.insert(c.end(), cosine.begin() + start * D / 2, cosine.begin() + (start + one.n) * D / 2);
      s.insert(s.end(), sine.begin() + start * D / 2, sine.begin() + (start + one.n) * D / 2);
      int64_t before = 0;
      for (const int64_t n : texts[one.text].pieces) before += n;
      b.spans.push_back({one.n, texts[one.text].held - before + one.first, texts[one.text].held + one.first + one.n});
      b.N += one.n;
    }
    b.H = H, b.K = K, b.D = D, b.E = E;
    for (size_t i = 0; i < of.size(); ++i) {
      const Layer& w = of[i];
      const auto part = [&](int j, const Weights& m, int64_t depth, int64_t outs) {
        return m.part(nullptr, nullptr, b.N, depth, outs, bits[j], group[j], terms);
      };
      mcl::DecoderLayer l{};
      l.qkv.n = 3, l.qkv.norm = w.norm1.data(), l.qkv.eps = 1e-5f;
      l.qkv.part[0] = part(0, w.q, E, H * D), l.qkv.part[1] = part(0, w.k, E, K * D), l.qkv.part[2] = part(0, w.v, E, K * D);
      l.out.n = 1, l.out.part[0] = part(1, w.o, H * D, E);
      l.gate_up.n = 2, l.gate_up.norm = w.norm2.data(), l.gate_up.eps = 2e-3f;
      l.gate_up.part[0] = part(2, w.gate, E, F), l.gate_up.part[1] = part(2, w.up, E, F);
      l.down.n = 1, l.down.part[0] = part(3, w.down, F, E);
      for (const Asked& one : asked) {
        auto held = where[i][one.text].at;
        held.back().n -= lengths[one.text] - one.first - one.n;
        l.held.push_back(held);
      }
      b.layers.push_back(l);
    }
    y.assign(static_cast<size_t>(b.N * E), NAN);
    b.x = given.data(), b.y = y.data(), b.cosine = c.data(), b.sine = s.data(), b.cosine_row = b.sine_row = D / 2;
    b.packed = cache == kRows, b.layout = layout, b.type = cache == kHalves ? mcl::Stored::float16 : mcl::Stored::float32;
    b.scale = 0.11f;
    mcl::decoder_blocks(b);
  };
  auto alone = stores;
  for (size_t i = 0; i < stores.size(); ++i)
    for (size_t j = 0; j < texts.size(); ++j)
      for (size_t p = 0; p < stores[i][j].at.size(); ++p)
        alone[i][j].at[p].k = alone[i][j].k[p].data(), alone[i][j].at[p].v = alone[i][j].v[p].data();
  std::vector<Asked> all;
  std::vector<float> want, one, got;
  for (size_t j = 0; j < texts.size(); ++j) {
    all.push_back({j, 0, lengths[j]});
    for (int64_t t = 0; t < lengths[j]; ++t) {
      launch(alone, {{j, t, 1}}, one);
      want.insert(want.end(), one.begin(), one.end());
    }
  }
  launch(stores, all, got);
  for (size_t i = 0; i < want.size(); ++i) check::near("a token's y among others", static_cast<int64_t>(i), want[i], got[i], 0);
  for (size_t i = 0; i < stores.size(); ++i)
    for (size_t j = 0; j < texts.size(); ++j)
      for (size_t p = 0; p < stores[i][j].k.size(); ++p) {
        check::near("keys stored among others", static_cast<int64_t>(j), 0, std::memcmp(stores[i][j].k[p].data(), alone[i][j].k[p].data(), alone[i][j].k[p].size()), 0);
        check::near("values stored among others", static_cast<int64_t>(j), 0, std::memcmp(stores[i][j].v[p].data(), alone[i][j].v[p].data(), alone[i][j].v[p].size()), 0);
      }
}

}  // namespace

int main() {
  for (const int terms : {0, 2})
    for (const Cache cache : {kFloats, kHalves, kRows}) {
      some(2, 1, 1100, terms, cache, false);  // the keys are split
      some(3, 3, 70, terms, cache, false);
      some(2, 4, 0, terms, cache, true);
      some(2, 8, 33, terms, cache, false);
      ragged({{0, {}}}, {8}, terms, cache);
      ragged({{3, {}}, {700, {}}, {260, {}}}, {2, 1, 5}, terms, cache);
      ragged({{300, {256}}, {520, {256, 7, 200}}, {60, {60}}, {9, {}}}, {1, 3, 1, 2}, terms, cache);
    }
  return check::result("decoder_block", mcl::kernels().name, mcl::threads());
}
