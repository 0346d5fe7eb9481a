// Attention and its gradient, and packed rows, against sums in float64: every kind of storage, few queries and many,
// packed documents, keys split over threads.
#include <algorithm>

#include "check.h"
#include "kv_attention/kv_attention.h"
#include "rope_append/rope_append.h"
#include "simd/kernels.h"

namespace {

using check::near;
using check::normal;
using mcl::Stored;

// Values of K or V [B, K, T, D] in rows of their own width, and what the kernel is told about them.
struct Store {
  std::vector<uint32_t> words;
  std::vector<double> values;
  mcl::Held held;
};

Store store(int64_t B, int64_t K, int64_t T, int64_t D, Stored type) {
  const bool codes = type == Stored::codes8 || type == Stored::codes4;
  const int bits = type == Stored::float32 ? 32 : type == Stored::codes8 ? 8 : type == Stored::codes4 ? 4 : 16;
  const int64_t group = D % 64 == 0 ? 64 : 32, value_words = D * bits / 32, width = value_words + (codes ? D / group : 0);
  Store s;
  s.words.resize(B * K * T * width);
  s.values.resize(B * K * T * D);
  for (int64_t r = 0; r < B * K * T; ++r) {
    uint32_t* row = s.words.data() + r * width;
    if (codes) {
      for (int64_t w = 0; w < value_words; ++w) row[w] = check::engine()();
      for (int64_t g = 0; g < D / group; ++g) {
        const uint16_t a = check::float_to_half(4.0f / (1 << bits)), b = check::float_to_half(normal(1)[0] - 2);
        row[value_words + g] = a | static_cast<uint32_t>(b) << 16;
        for (int64_t i = g * group; i < (g + 1) * group; ++i) {
          const uint32_t code = row[i * bits / 32] >> (i * bits % 32) & ((1u << bits) - 1);
          s.values[r * D + i] = double(check::half_to_float(a)) * code + check::half_to_float(b);
        }
      }
      continue;
    }
    const auto x = normal(D);
    for (int64_t i = 0; i < D; ++i) {
      if (bits == 32) std::memcpy(row + i, &x[i], 4), s.values[r * D + i] = x[i];
      else {
        uint32_t word;
        std::memcpy(&word, &x[i], 4);
        const uint16_t h = type == Stored::float16 ? check::float_to_half(x[i]) : static_cast<uint16_t>(word >> 16);
        reinterpret_cast<uint16_t*>(row)[i] = h;
        s.values[r * D + i] = type == Stored::float16 ? check::half_to_float(h) : check::bfloat_to_float(h);
      }
    }
  }
  const char* data = reinterpret_cast<const char*>(s.words.data());
  s.held = {data, {K * T * width * 4, T * width * 4, width * 4}, type, codes ? data + value_words * 4 : nullptr, int(group)};
  return s;
}

struct Truth {
  std::vector<double> o, lse, weights;  // [B, H, L, D], [B, H, L], [B, H, L, T]
};

Truth truth(int64_t B, int64_t H, int64_t K, int64_t L, int64_t T, int64_t D, double scale, const std::vector<float>& q,
            const std::vector<double>& k, const std::vector<double>& v, const int32_t* starts,
            const std::vector<bool>& seen = {}) {  // seen [L, T] in place of starts
  Truth t{std::vector<double>(B * H * L * D), std::vector<double>(B * H * L), std::vector<double>(B * H * L * T)};
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < L; ++i) {
        const int64_t at = (b * H + h) * L + i, kv = (b * K + h / (H / K)) * T;
        const int64_t from = starts ? starts[b * L + i] : 0, to = T - L + i;
        double most = -INFINITY, total = 0;
        std::vector<double> score(T);
        const auto sees = [&](int64_t j) { return seen.empty() ? j >= from && j <= to : seen[i * T + j]; };
        for (int64_t j = 0; j < T; ++j) {
          if (!sees(j)) continue;
          for (int64_t d = 0; d < D; ++d) score[j] += q[at * D + d] * k[(kv + j) * D + d];
          score[j] *= scale, most = std::fmax(most, score[j]);
        }
        for (int64_t j = 0; j < T; ++j)
          if (sees(j)) total += std::exp(score[j] - most);
        t.lse[at] = most + std::log(total);
        for (int64_t j = 0; j < T; ++j) {
          if (!sees(j)) continue;
          const double w = t.weights[at * T + j] = std::exp(score[j] - t.lse[at]);
          for (int64_t d = 0; d < D; ++d) t.o[at * D + d] += w * v[(kv + j) * D + d];
        }
      }
  return t;
}

std::vector<int32_t> documents(int64_t B, int64_t L) {
  std::vector<int32_t> starts(B * L);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0, start = 0; i < L; ++i) {
      if (check::bits(9) == 0) start = i;
      starts[b * L + i] = static_cast<int32_t>(start);
    }
  return starts;
}

void forward(int64_t B, int64_t K, int64_t share, int64_t L, int64_t T, int64_t D, Stored k_type, Stored v_type, bool packed,
             bool prompt) {
  const int64_t H = K * share;
  const auto q = normal(B * H * L * D);
  const Store k = store(B, K, T, D, k_type), v = store(B, K, T, D, v_type);
  const auto starts = documents(B, L);
  std::vector<float> o(B * H * L * D, NAN), lse(B * H * L, NAN);
  mcl::Attention s{};
  s.B = B, s.H = H, s.K = K, s.L = L, s.T = T, s.D = D, s.scale = 1 / std::sqrt(float(D));
  s.q = q.data(), s.qs = s.os = {H * L * D, L * D, D}, s.pieces = {{k.held, v.held, T}}, s.prompt = prompt;
  s.starts = packed ? starts.data() : nullptr, s.o = o.data(), s.lse = lse.data();
  mcl::attention_forward(s);
  const Truth t = truth(B, H, K, L, T, D, s.scale, q, k.values, v.values, s.starts);
  char what[99];
  std::snprintf(what, sizeof what, "attention types %d %d, B %d K %d share %d L %d T %d D %d%s%s", int(k_type), int(v_type), int(B),
                int(K), int(share), int(L), int(T), int(D), packed ? ", documents" : "", prompt ? ", tiles" : "");
  for (size_t i = 0; i < t.o.size(); ++i) near(what, i, t.o[i], o[i], 3e-5);
  for (size_t i = 0; i < t.lse.size(); ++i) near("log-sum-exp", i, t.lse[i], lse[i], 3e-5);
}

// Keys and values whose rows lie so far apart that heads are more than 2^31 bytes from the first, against the same rows close
// together: to the bit.
void far_apart(int64_t L, int64_t D, Stored type) {
  const int64_t K = 3, share = 2, H = K * share, T = 100, row = int64_t{22} << 20;
  const auto q = normal(H * L * D);
  const Store k = store(1, K, T, D, type), v = store(1, K, T, D, type);
  const check::Expanse wide_k(K * T * row), wide_v(K * T * row);
  if (!wide_k.data() || !wide_v.data()) return;
  const auto spread = [&](const Store& s, char* to) {
    const char* from = reinterpret_cast<const char*>(s.words.data());
    const int64_t bytes = s.held.strides.row;
    for (int64_t r = 0; r < K * T; ++r) std::memcpy(to + r * row, from + r * bytes, static_cast<size_t>(bytes));
    return mcl::Held{to, {K * T * row, T * row, row}, type, s.held.scales ? to + (s.held.scales - from) : nullptr, s.held.group};
  };
  std::vector<float> o[2];
  for (int i = 0; i < 2; ++i) {
    o[i].assign(H * L * D, NAN);
    mcl::Attention s{};
    s.B = 1, s.H = H, s.K = K, s.L = L, s.T = T, s.D = D, s.scale = 0.1f;
    s.q = q.data(), s.qs = s.os = {H * L * D, L * D, D}, s.o = o[i].data();
    s.pieces = {i ? mcl::Piece{spread(k, wide_k.data()), spread(v, wide_v.data()), T} : mcl::Piece{k.held, v.held, T}};
    s.prompt = L > 8;
    mcl::attention_forward(s);
  }
  for (size_t i = 0; i < o[0].size(); ++i) near("rows far apart", i, o[0][i], o[1][i], 0);
}

// The last L of `count` tokens, over the first `sinks` and the last `size`; ring 0: places follow positions.
void windowed(int64_t K, int64_t share, int64_t L, int64_t count, int64_t D, int64_t sinks, int64_t size, int64_t ring,
              Stored type) {
  const int64_t H = K * share, T = ring ? std::min(count, sinks + ring) : count;
  std::vector<int64_t> position(T);  // of the key at each place
  const auto place = [&](int64_t p) { return p < sinks || !ring ? p : sinks + (p - sinks) % ring; };
  for (int64_t p = 0; p < count; ++p) position[place(p)] = p;
  std::vector<bool> seen(L * T);
  for (int64_t i = 0; i < L; ++i)
    for (int64_t t = 0; t < T; ++t) {
      const int64_t own = count - L + i, p = position[t];
      seen[i * T + t] = p <= own && (p < sinks || p > own - size);
    }
  const auto q = normal(H * L * D);
  const Store k = store(1, K, T, D, type), v = store(1, K, T, D, type);
  std::vector<float> o(H * L * D, NAN);
  mcl::Attention s{};
  s.B = 1, s.H = H, s.K = K, s.L = L, s.T = T, s.D = D, s.scale = 1 / std::sqrt(float(D));
  s.q = q.data(), s.qs = s.os = {H * L * D, L * D, D}, s.pieces = {{k.held, v.held, T}}, s.prompt = L > 8, s.o = o.data();
  s.window = {sinks, size, place(count - L), ring ? ring : int64_t{1} << 30};
  mcl::attention_forward(s);
  const Truth t = truth(1, H, K, L, T, D, s.scale, q, k.values, v.values, nullptr, seen);
  for (size_t i = 0; i < t.o.size(); ++i) near("window", i, t.o[i], o[i], 3e-5);
}

// Some of a text's queries: one chunk of rows, as the kernel is asked for them.
struct Chunk {
  int64_t first, n;
};

// o of the queries [first, first + n) of L that end a text of T keys, over the keys up to them in these pieces.
mcl::Attention part_of(int64_t K, int64_t share, int64_t L, int64_t T, int64_t D, float scale, const float* q, float* o, Chunk c,
                       const std::vector<mcl::Piece>& pieces, bool prompt) {
  mcl::Attention s{};
  s.B = 1, s.H = K * share, s.K = K, s.L = c.n, s.T = T - L + c.first + c.n, s.D = D, s.scale = scale, s.prompt = prompt;
  s.q = q + c.first * D, s.o = o + c.first * D, s.qs = s.os = {0, L * D, D};
  s.pieces = pieces;
  return s;
}

// The same keys in pieces of `lengths` and the rest: each a copy, in storage of another stride.
struct Pieces {
  std::vector<std::vector<uint32_t>> words;
  std::vector<mcl::Piece> held;
};
Pieces in_pieces(const Store& k, const Store& v, int64_t K, int64_t T, const std::vector<int64_t>& lengths) {
  Pieces all;
  int64_t first = 0;
  for (size_t i = 0; i <= lengths.size(); ++i) {
    const int64_t n = i < lengths.size() ? lengths[i] : T - first, capacity = n + static_cast<int64_t>(i);
    mcl::Piece piece{k.held, v.held, n};
    for (const auto& [from, to] : {std::pair{&k, &piece.k}, std::pair{&v, &piece.v}}) {
      const int64_t row = from->held.strides.row / 4;
      auto& words = all.words.emplace_back(K * capacity * row, 0x7fc07fc0);  // NaN where nothing is held
      for (int64_t h = 0; h < K; ++h)
        for (int64_t t = 0; t < n; ++t)
          std::memcpy(&words[(h * capacity + t) * row], &from->words[(h * T + first + t) * row], static_cast<size_t>(row * 4));
      to->data = reinterpret_cast<const char*>(words.data());
      if (to->scales) to->scales = to->data + (from->held.scales - from->held.data);
      to->strides = {0, capacity * row * 4, row * 4};
    }
    all.held.push_back(piece);
    first += n;
  }
  return all;
}

void same(const char* what, const std::vector<float>& want, const std::vector<float>& got) {
  for (size_t i = 0; i < want.size(); ++i) {
    uint32_t a, b;
    std::memcpy(&a, &want[i], 4), std::memcpy(&b, &got[i], 4);
    near(what, static_cast<int64_t>(i), a, b, 0);
  }
}

// A row's bits are its own: queries alone, some or all at once, beside another sequence, over keys in pieces.
void company(int64_t K, int64_t share, int64_t L, int64_t T, int64_t D, Stored k_type, Stored v_type, float scale, bool prompt) {
  const int64_t H = K * share;
  const auto q = normal(H * L * D);
  const Store k = store(1, K, T, D, k_type), v = store(1, K, T, D, v_type);
  const std::vector<mcl::Piece> whole{{k.held, v.held, T}};
  std::vector<float> want(H * L * D, NAN);
  mcl::attention_forward(part_of(K, share, L, T, D, scale, q.data(), want.data(), {0, L}, whole, prompt));
  for (const float x : want) near("a result is a number", 0, 0, x - x, 0);
  char what[120];
  const auto in_chunks = [&](int64_t n, const std::vector<mcl::Piece>& pieces, const char* how) {
    std::vector<float> got(want.size(), NAN);
    for (int64_t i = 0; i < L; i += n)
      mcl::attention_forward(part_of(K, share, L, T, D, scale, q.data(), got.data(), {i, std::min(n, L - i)}, pieces, prompt));
    std::snprintf(what, sizeof what, "%lld at a time%s, types %d %d, share %d, L %d, T %d, D %d%s", static_cast<long long>(n), how,
                  int(k_type), int(v_type), int(share), int(L), int(T), int(D), prompt ? ", tiles" : "");
    same(what, want, got);
  };
  for (const int64_t n : {int64_t{1}, int64_t{3}, int64_t{7}, int64_t{64}})
    if (n < L) in_chunks(n, whole, "");
  const std::vector<std::vector<int64_t>> cuts = {{T / 2}, {std::min<int64_t>(256, T / 3), 1, std::min<int64_t>(90, T / 4)}, {T - L, (L + 1) / 2}};
  for (const auto& lengths : cuts) {
    if (T < 8) break;
    const Pieces pieces = in_pieces(k, v, K, T, lengths);
    in_chunks(L, pieces.held, " in pieces");
    in_chunks((L + 1) / 2, pieces.held, " in pieces");
  }
  // Beside a longer and a shorter sequence, in one launch.
  const int64_t other = T + 700;
  const Store k2 = store(1, K, other, D, k_type), v2 = store(1, K, other, D, v_type);
  std::vector<float> got(want.size(), NAN), others(want.size());
  const std::vector<mcl::Piece> far{{k2.held, v2.held, other}};
  const mcl::AttentionWork work({part_of(K, share, 1, 1, D, scale, q.data(), others.data(), {0, 1}, whole, prompt),
                                 part_of(K, share, L, T, D, scale, q.data(), got.data(), {0, L}, whole, prompt),
                                 part_of(K, share, L, other, D, scale, q.data(), others.data(), {0, L}, far, prompt)});
  auto body = [&](int64_t i) { work.run(i); };
  mcl::parallel(work.tasks(), body);
  auto merge = [&](int64_t i) { work.merge(i); };
  mcl::parallel(work.merges(), merge);
  same("beside others", want, got);
}

// What a later row holds must not reach an earlier one: NaN in the last key and value.
void later_nan(int64_t share, int64_t L, int64_t T, Stored type, bool prompt) {
  const int64_t D = 64;
  const auto q = normal(share * L * D);
  Store k = store(1, 1, T, D, type), v = store(1, 1, T, D, type);
  const auto run = [&] {
    std::vector<float> o(share * L * D, NAN);
    mcl::attention_forward(part_of(1, share, L, T, D, 0.1f, q.data(), o.data(), {0, L}, {{k.held, v.held, T}}, prompt));
    return o;
  };
  const auto want = run();
  for (Store* s : {&k, &v}) {
    const int64_t row = s->held.strides.row / 4;
    for (int64_t i = 0; i < row; ++i) s->words[(T - 1) * row + i] = type == Stored::float32 ? 0x7fc00000 : 0x7e007e00;
  }
  const auto got = run();
  for (int64_t r = 0; r < share * L; ++r)
    for (int64_t d = 0; d < D; ++d)
      near("NaN in a later row", r, r % L < L - 1 ? want[r * D + d] : NAN, got[r * D + d], 0);
}

void backward(int64_t B, int64_t K, int64_t share, int64_t L, int64_t D, bool packed) {
  const int64_t H = K * share, T = L;
  const auto q = normal(B * H * L * D), k = normal(B * K * T * D), v = normal(B * K * T * D), d_o = normal(B * H * L * D);
  const auto starts = documents(B, L);
  const std::vector<double> kd(k.begin(), k.end()), vd(v.begin(), v.end());
  const float scale = 1 / std::sqrt(float(D));
  const Truth t = truth(B, H, K, L, T, D, scale, q, kd, vd, packed ? starts.data() : nullptr);
  const std::vector<float> o(t.o.begin(), t.o.end()), lse(t.lse.begin(), t.lse.end());
  std::vector<float> dq(q.size(), NAN), dk(k.size(), NAN), dv(v.size(), NAN);
  const mcl::Strided wide{H * L * D, L * D, D}, narrow{K * T * D, T * D, D};
  mcl::AttentionGrad s{};
  s.B = B, s.H = H, s.K = K, s.L = L, s.T = T, s.D = D, s.scale = scale;
  s.q = q.data(), s.k = k.data(), s.v = v.data(), s.qs = s.os = s.dos = s.dqs = wide, s.ks = s.vs = s.dks = s.dvs = narrow;
  s.starts = packed ? starts.data() : nullptr, s.o = o.data(), s.lse = lse.data(), s.d_o = d_o.data();
  s.dq = dq.data(), s.dk = dk.data(), s.dv = dv.data();
  mcl::attention_backward(s);
  std::vector<double> eq(q.size()), ek(k.size()), ev(v.size());
  for (int64_t at = 0; at < B * H * L; ++at) {
    const int64_t kv = (at / (H * L) * K + at / L % H / share) * T;
    double delta = 0;
    for (int64_t d = 0; d < D; ++d) delta += t.o[at * D + d] * d_o[at * D + d];
    for (int64_t j = 0; j < T; ++j) {
      const double w = t.weights[at * T + j];
      double dw = 0;
      for (int64_t d = 0; d < D; ++d) dw += d_o[at * D + d] * v[(kv + j) * D + d];
      const double ds = w * (dw - delta) * scale;
      for (int64_t d = 0; d < D; ++d) {
        eq[at * D + d] += ds * k[(kv + j) * D + d];
        ek[(kv + j) * D + d] += ds * q[at * D + d];
        ev[(kv + j) * D + d] += w * d_o[at * D + d];
      }
    }
  }
  for (size_t i = 0; i < eq.size(); ++i) near("gradient of q", i, eq[i], dq[i], 1e-4);
  for (size_t i = 0; i < ek.size(); ++i) near("gradient of k", i, ek[i], dk[i], 2e-4 * share);
  for (size_t i = 0; i < ev.size(); ++i) near("gradient of v", i, ev[i], dv[i], 1e-4 * share);
}

void append(int64_t D, int k_bits, int v_bits) {
  const mcl::RowLayout f{D, k_bits, v_bits};
  const auto k = normal(D), v = normal(D), angle = normal(D / 2, 3);
  std::vector<float> c(D / 2), s(D / 2);
  for (int64_t i = 0; i < D / 2; ++i) c[i] = std::cos(angle[i]), s[i] = std::sin(angle[i]);
  std::vector<uint32_t> row(f.words());
  mcl::kernels().append_row(f, k.data(), v.data(), c.data(), s.data(), row.data());
  const int64_t group = f.group(), k_words = D * k_bits / 32, v_words = D * v_bits / 32;
  std::vector<double> turned(D);
  for (int64_t i = 0; i < D / 2; ++i) {
    turned[i] = double(k[i]) * c[i] - double(k[D / 2 + i]) * s[i];
    turned[D / 2 + i] = double(k[D / 2 + i]) * c[i] + double(k[i]) * s[i];
  }
  const auto part = [&](int bits, int64_t at, int64_t scales, auto value) {
    for (int64_t g = 0; g < D; g += group) {
      double low = INFINITY, high = -INFINITY;
      for (int64_t i = g; i < g + group; ++i) low = std::fmin(low, value(i)), high = std::fmax(high, value(i));
      for (int64_t i = g; i < g + group; ++i) {
        const uint32_t code = row[at + i * bits / 32] >> (i * bits % 32) & (bits == 16 ? 0xffffu : (1u << bits) - 1);
        const uint32_t pair = bits == 16 ? 0 : row[scales + g / group];
        const double got = bits == 16 ? check::half_to_float(code)
                                      : double(check::half_to_float(pair & 0xffff)) * code + check::half_to_float(pair >> 16);
        const double within = bits == 16 ? std::fabs(value(i)) / 2000 + 1e-6 : (high - low) / ((1 << bits) - 1) * 0.55 + 2e-3 * (high - low);
        near("append_row", i, value(i), got, within);
      }
    }
  };
  part(k_bits, 0, k_words + v_words, [&](int64_t i) { return turned[i]; });
  part(v_bits, k_words, k_words + v_words + f.k_scale_words(), [&](int64_t i) { return double(v[i]); });
}

}  // namespace

int main() {
  using enum Stored;
  for (const auto& [k, v] : {std::pair{float32, float32}, {float16, float16}, {bfloat16, bfloat16}, {codes8, codes8},
                            {codes4, codes4}, {codes8, codes4}, {float16, codes4}}) {
    for (const bool prompt : {false, true}) {
      forward(2, 2, 1, 1, 1, 32, k, v, false, prompt);
      forward(1, 3, 1, 1, 77, 128, k, v, false, prompt);
      forward(1, 2, 4, 2, 141, 64, k, v, false, prompt);
      forward(1, 1, 8, 1, 1300, 128, k, v, false, prompt);  // split over the keys
      forward(1, 1, 3, 5, 200, 96, k, v, false, prompt);
    }
    forward(1, 2, 2, 70, 133, 128, k, v, false, true);
    forward(1, 1, 8, 33, 33, 256, k, v, false, true);
    for (const int64_t share : {1, 3, 8})
      for (const int64_t D : {64, 128}) {
        company(2, share, 8, 8, D, k, v, 0.1f, false);
        company(1, share, 8, 700, D, k, v, 2.0f, false);  // scores of some hundreds
        if (share == 3 && D == 64) company(1, share, 3, 9000, D, k, v, 0.1f, false);  // several spans
        company(1, share, 80, 300, D, k, v, 0.1f, true);
        if (D == 64) company(1, share, 9, 2100, D, k, v, 2.0f, true);
      }
    company(1, 2, 5, 650, 96, k, v, 0.1f, false);
  }
  for (const Stored type : {float32, float16, codes8, codes4})
    for (const bool prompt : {false, true})
      for (const int64_t share : {1, 3}) later_nan(share, 7, 61, type, prompt), later_nan(share, 7, 300, type, prompt);
  forward(2, 2, 2, 150, 150, 32, float32, float32, true, true);
  forward(1, 1, 1, 6, 6, 24, float32, float32, true, false);
  forward(1, 1, 1, 6, 6, 24, float32, float32, true, true);
  forward(1, 2, 2, 900, 900, 32, float32, float32, true, true);
  for (const Stored type : {float32, bfloat16, codes4}) {
    windowed(2, 1, 1, 700, 128, 4, 400, 432, type);
    windowed(1, 8, 3, 900, 64, 3, 130, 162, type);   // tiles, keys at both ends or not
    windowed(1, 2, 4, 3 + 2 * 90 + 2, 64, 3, 70, 90, type);
    windowed(1, 8, 20, 900, 64, 3, 130, 162, type);  // two tiles of queries, older keys behind the newest
    windowed(1, 1, 90, 1716, 64, 4, 300, 0, type);   // a chunk, with whole blocks hidden, one from the last queries only
    windowed(1, 3, 9, 9, 64, 5, 2, 0, type);         // sinks among the queries' own keys
  }
  for (const Stored type : {float32, float16, codes8, codes4})
    for (const int64_t L : {1, 20}) far_apart(L, 64, type);
  far_apart(1, 96, codes4);
  for (const bool packed : {false, true}) {
    backward(1, 2, 2, 70, 32, packed);
    backward(2, 1, 3, 131, 24, packed);
  }
  for (const int64_t D : {32, 64, 96, 128, 256})
    for (const int k_bits : {4, 8, 16})
      for (const int v_bits : {4, 8, 16}) append(D, k_bits, v_bits);
  return check::result("kv_attention", mcl::kernels().name, mcl::threads());
}
