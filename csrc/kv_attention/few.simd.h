// Few query rows: the keys are streamed once, 64 at a time, and all rows of a kv head are done with each block while it
// lies in the first cache, each as if it were alone: with as many keys of the block as it sees. Codes are not turned into keys and values. With c = code - centre, q' = q scale,
//   score = Σ over groups of  s Σ c q'  +  (bias + centre s) Σ q',
//   out   = Σ over keys of  (p s) c  +  Σ over keys of  p (bias + centre s).
#pragma once
#include "kv_attention/mask.simd.h"
#include "kv_attention/stored.simd.h"

namespace {

using mcl::kFewKeys, mcl::kMaxDepth, mcl::kStateRest;

constexpr int64_t kAhead = 4096;  // bytes that are fetched ahead
constexpr int kMostGroups = 8;

// Lane l of the result, over the N vectors x, is the sum of those lanes of x[l % N] that lie in the same N lanes as l.
template <int S, class V, size_t... L>
MCL_INLINE V fold_pair(V a, V b, std::index_sequence<L...>) {
  const V mine = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L) : static_cast<int>(L))...);
  const V other = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L - S) : static_cast<int>(L + S))...);
  return mine + other;
}
template <int N, int S = 1, class V>
MCL_INLINE V fold(const V* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    V half[N / 2];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) half[i] = fold_pair<S>(x[2 * i], x[2 * i + 1], std::make_index_sequence<W>{});
    return fold<N / 2, 2 * S>(half);
  }
}

// The scaled queries of a task, [rows][depth]; where keys are codes, in the order in which their words give them away.
struct Queries {
  float *values, *sums;  // sums: [rows][depth / 4], Σ q' of the word's group, for every word of a row of codes
  int64_t stride;
};

// Words of codes that one vector holds belong to one group, or to two of half a vector each.
template <Code C>
struct Words {
  static constexpr int per_group = 64 / per_word(C), groups = W > per_group ? W / per_group : 1, keys = W / groups;
  static_assert(groups <= 2);
};

// Lanes of the first group get a, those of a second one b; or W / 2 floats from a and from b.
template <size_t... L>
MCL_INLINE vf halves(vf a, vf b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(L) < W / 2 ? static_cast<int>(L) : static_cast<int>(W + L))...);
}
template <int GROUPS>
MCL_INLINE vf halves(float a, float b) {
  return GROUPS == 1 ? all(a) : halves(all(a), all(b), std::make_index_sequence<W>{});
}
template <size_t... L>
MCL_INLINE vf join(const float* a, const float* b, std::index_sequence<L...>) {
  typedef float half __attribute__((vector_size(2 * MCL_WIDTH), aligned(4), may_alias));
  return __builtin_shufflevector(*reinterpret_cast<const half*>(a), *reinterpret_cast<const half*>(b),
                                 static_cast<int>(L)...);
}
template <int GROUPS>
MCL_INLINE vf join(const float* a, const float* b) {
  if constexpr (GROUPS == 1) return load(a);
  else return join(a, b, std::make_index_sequence<W>{});
}

// W words, kept in a register: rows of codes lie across cache lines, where every load counts twice.
MCL_INLINE vi load_once(const char* p) {
  vi words = load_words(reinterpret_cast<const uint32_t*>(p));
#if defined(__AVX2__)
  asm("" : "+v"(words));
#endif
  return words;
}

// Scales and biases of a block, [group][key].
struct Block {
  alignas(64) float scale[kMostGroups][kFewKeys], bias[kMostGroups][kFewKeys];
};

template <Code C>
void block_scales(const Rows& x, int64_t n, int64_t groups, Block& to) {
  alignas(64) int32_t words[kMostGroups][kFewKeys];
  const char* at = x.scales;
  if (groups == 2)
    for (int64_t t = 0; t < n; ++t, at += x.stride) {
      std::memcpy(&words[0][t], at, 4);
      std::memcpy(&words[1][t], at + 4, 4);
    }
  else
    for (int64_t t = 0; t < n; ++t, at += x.stride)
      for (int64_t g = 0; g < groups; ++g) std::memcpy(&words[g][t], at + 4 * g, 4);
  for (int64_t t = n; t < (n + W - 1) / W * W; ++t)
    for (int64_t g = 0; g < groups; ++g) words[g][t] = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t t = 0; t < n; t += W) {
      const vi w = *reinterpret_cast<const vi_any*>(&words[g][t]);
      const vf s = half_to_float(w & 0xffff);
      store(&to.scale[g][t], s);
      store(&to.bias[g][t], fma(s, centre_of(C), half_to_float(reinterpret_cast<vi>(reinterpret_cast<vu>(w) >> 16))));
    }
}

// Bytes from a row to the one that is to be fetched with it. A single row may have any stride, 0 too.
MCL_INLINE int64_t rows_ahead(const Rows& x) {
  return x.stride == 0 || x.stride > kAhead ? x.stride : kAhead / x.stride * x.stride;
}

// Scores of n keys for R rows: s [R][kFewKeys]. Keys beyond n give the last one's score.
template <Stored S, int R>
void scores_of_floats(const Rows& k, int64_t n, int64_t D, const float* q, int64_t stride, float* s) {
  const int64_t whole = D / W * W, ahead = rows_ahead(k);
  for (int64_t t0 = 0; t0 < n; t0 += W) {
    vf dots[R][W];
    for (int j = 0; j < W; ++j) {
      const char* row = k.data + (t0 + j < n ? t0 + j : n - 1) * k.stride;
      for (int64_t b = 0; b < D * (S == Stored::float32 ? 4 : 2); b += 64) __builtin_prefetch(row + ahead + b);
      vf acc[R] = {};
      for (int64_t e = 0; e < whole; e += W) {
        const vf x = read<S>(row, e);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = fma(x, load(q + r * stride + e), acc[r]);
      }
      if (whole < D) {
        const vf x = read_part<S>(row, whole, D - whole);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = fma(x, load(q + r * stride + whole), acc[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dots[r][j] = acc[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(s + r * kFewKeys + t0, fold<W>(dots[r]));
  }
}

template <Code C, int R>
void scores_of_codes(const Rows& k, const Block& by, int64_t n, int64_t D, const Queries& q, int64_t r0, float* s) {
  using Lay = Words<C>;
  constexpr int P = per_word(C), N = Lay::keys;
  const int64_t vectors = D / P / W, ahead = kFewKeys * k.stride;  // a block: its scales are read first
  const char* first = k.data;
  for (int64_t t0 = 0; t0 < n; t0 += N, first += N * k.stride) {
    vf total[R] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      vf dots[R][N];
      const float* value = q.values + r0 * q.stride + v * P * W;
      const char* row = first + v * W * 4;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const vi words = load_once(row);
        for (int64_t b = 0; v == 0 && b < k.stride && b < 512; b += 64) __builtin_prefetch(row + ahead + b);
        row += t0 + j + 1 < n ? k.stride : 0;
        vf acc[R] = {};
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const vf c = code<C, true>(words, p);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r] = fma(c, load(value + r * q.stride + p * W), acc[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) dots[r][j] = acc[r];
      }
      const int64_t g = v * W / Lay::per_group, h = g + Lay::groups - 1;
      const vf scale = join<Lay::groups>(by.scale[g] + t0, by.scale[h] + t0);
      const vf bias = join<Lay::groups>(by.bias[g] + t0, by.bias[h] + t0);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        total[r] = fma(fold<N>(dots[r]), scale, total[r]);
        if (v * W % Lay::per_group == 0) total[r] = fma(bias, load(q.sums + (r0 + r) * (q.stride / 4) + v * W), total[r]);  // once per group
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (Lay::groups == 2) total[r] += swapped<W / 2>(total[r], std::make_index_sequence<W>{});
      store_part(s + r * kFewKeys + t0, total[r], N);
    }
  }
}

// o [R][stride] += p [R][kFewKeys] times n values, for elements [e, e + NV W).
template <Stored S, int R, int NV>
MCL_INLINE void add_floats(const Rows& v, int64_t n, const float* p, int64_t e, int64_t part, float* o, int64_t stride) {
  vf acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) acc[r][i] = load(o + r * stride + e + i * W);
  const char* row = v.data;
  const int64_t ahead = rows_ahead(v);
  for (int64_t t = 0; t < n; ++t, row += v.stride) {
    vf x[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) {
      x[i] = part ? read_part<S>(row, e, part) : read<S>(row, e + i * W);
      if (S != Stored::float32 && i % 2) continue;
      __builtin_prefetch(row + ahead + (e + i * W) * (S == Stored::float32 ? 4 : 2));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float w = p[r * kFewKeys + t];
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) acc[r][i] = fma(x[i], w, acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) store(o + r * stride + e + i * W, acc[r][i]);
}

template <Stored S, int R>
void values_of_floats(const Rows& v, int64_t n, int64_t D, const float* p, float* o, int64_t stride) {
  constexpr int NV = (W == 16 ? 16 : 8) / R;
  int64_t e = 0;
  for (; e + NV * W <= D; e += NV * W) add_floats<S, R, NV>(v, n, p, e, 0, o, stride);
  if constexpr (NV > 8)
    for (; e + 8 * W <= D; e += 8 * W) add_floats<S, R, 8>(v, n, p, e, 0, o, stride);
  for (; e + W <= D; e += W) add_floats<S, R, 1>(v, n, p, e, 0, o, stride);
  if (e < D) add_floats<S, R, 1>(v, n, p, e, D - e, o, stride);
}

// The same for codes: o in the order of the words, and `biases` [R][stride] += Σ p (bias + centre scale).
template <Code C, int R>
void values_of_codes(const Rows& v, const Block& by, int64_t n, int64_t D, const float* p, float* o, int64_t stride,
                     float* biases) {
  using Lay = Words<C>;
  constexpr int P = per_word(C), NP = R * P > (W == 16 ? 16 : 8) ? (W == 16 ? 16 : 8) / R : P;  // positions at once
  const int64_t vectors = D / P / W, groups = D / 64;
  alignas(64) float weight[kMostGroups][R][kFewKeys];
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < R; ++r) {
      vf total{};
      int64_t t = 0;
      for (; t + W <= n; t += W) {
        const vf w = load(p + r * kFewKeys + t);
        store(weight[g][r] + t, w * load(by.scale[g] + t));
        total = fma(w, load(by.bias[g] + t), total);
      }
      if (t < n) {  // p is 0 beyond n, but what others see there may be NaN
        const vf w = load(p + r * kFewKeys + t);
        store(weight[g][r] + t, w * load(by.scale[g] + t));
        total = fma(w, load_part(by.bias[g] + t, n - t, 0), total);
      }
      biases[r * stride + g] += sum(total);
    }
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t g = i * W / Lay::per_group, h = g + Lay::groups - 1;
#pragma GCC unroll 4
    for (int p0 = 0; p0 < P; p0 += NP) {
      vf acc[R][NP];
      float* to = o + (i * P + p0) * W;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < NP; ++k) acc[r][k] = load(to + r * stride + k * W);
      const char* row = v.data + i * W * 4;
      for (int64_t t = 0; t < n; ++t, row += v.stride) {
        const vi words = load_once(row);
        vf w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) w[r] = halves<Lay::groups>(weight[g][r][t], weight[h][r][t]);
#pragma GCC unroll 8
        for (int k = 0; k < NP; ++k) {
          const vf c = code<C, true>(words, p0 + k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][k] = fma(w[r], c, acc[r][k]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < NP; ++k) store(to + r * stride + k * W, acc[r][k]);
    }
  }
}

// f(an integral_constant, first row) for rows [r, rows) in fours, twos and ones.
template <class F>
MCL_INLINE void by_rows(int64_t r, int64_t rows, F&& f) {
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>{}, r);
  if (r < rows) f(std::integral_constant<int, 1>{}, r);
}

// Codes are read as they are where whole vectors of words do it; else they become floats a block at a time.
MCL_INLINE bool as_codes(const Held& x, int64_t D) {
  return is_code(x.type) && x.group == 64 && D / per_word(code_of(x.type)) % W == 0;
}

// Element of a head that place `at` of a query or of sums holds, where words of codes give it away.
MCL_INLINE int64_t element(Code c, int64_t at) {
  const int64_t P = per_word(c), v = at / (P * W), k = at / W % P, lane = at % W;
  return (v * W + lane) * P + k;
}

void load_queries(const Attention& s, const AttentionTask& t, bool codes, Code c, const Queries& q) {
  const int64_t share = s.share(), rows = t.rows(s);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = s.q + t.b * s.qs.batch + (t.kv * share + r % share) * s.qs.head + (t.i0 + r / share) * s.qs.row;
    float* to = q.values + r * q.stride;
    for (int64_t d = 0; d < s.D; ++d) to[d] = from[d] * s.scale;
    for (int64_t d = s.D; d < q.stride; ++d) to[d] = 0;
  }
  if (!codes) return;
  const int64_t P = per_word(c);
  for (int64_t r = 0; r < rows; ++r) {
    float own[kMaxDepth], *values = q.values + r * q.stride;
    std::memcpy(own, values, static_cast<size_t>(s.D) * sizeof(float));
    for (int64_t at = 0; at < s.D; ++at) values[at] = own[element(c, at)];
    for (int64_t g = 0; g < s.D / 64; ++g) {
      float total = 0;
      for (int64_t d = g * 64; d < g * 64 + 64; ++d) total += own[d];
      for (int64_t w = g * 64 / P; w < (g + 1) * 64 / P; ++w) q.sums[r * (q.stride / 4) + w] = total;
    }
  }
}

// n beyond 0: the new maximum and total of a row of scores, which become weights (0 beyond n). Returns what sums so far
// have to be multiplied by.
MCL_INLINE float soften(float* s, int64_t n, int64_t padded, float& most, float& total) {
  for (int64_t j = n; j < padded; ++j) s[j] = -__builtin_inff();
  vf top = load(s);
  for (int64_t j = W; j < padded; j += W) top = larger(load(s + j), top);
  const float here = largest(top), now = here > most ? here : most;
  const float base = now == -__builtin_inff() ? 0 : now;
  vf added{};
  for (int64_t j = 0; j < padded; j += W) {
    const vf e = exp(load(s + j) - base);
    added += e;
    store(s + j, e);
  }
  float shrink = 1;
  if (now != most) {
    shrink = most == -__builtin_inff() ? 0 : __builtin_expf(most - base);
    most = now;
  }
  total = fma(total, shrink, sum(added));
  return shrink;
}

// What is known of rows after some keys: see attention_state_floats.
struct States {
  float* at;
  int64_t depth;
  int64_t stride() const { return depth + kStateRest; }
  float* sums(int64_t r) const { return at + r * stride(); }
  float* biases(int64_t r) const { return sums(r) + depth; }
  float& most(int64_t r) const { return biases(r)[8]; }
  float& total(int64_t r) const { return biases(r)[9]; }
  States next(int64_t rows) const { return {at + rows * stride(), depth}; }

  void clear(int64_t rows) const {
    std::memset(at, 0, static_cast<size_t>(rows * stride()) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) most(r) = -__builtin_inff();
  }
  void shrink(int64_t r, float by) const {
    float* sum = sums(r);
    for (int64_t d = 0; d < depth; d += W) store(sum + d, load(sum + d) * by);
    for (int64_t g = 0; g < 8; ++g) sum[depth + g] *= by;
  }
  // Join what later keys gave. A row that saw none of those, or none before, keeps the one that there is.
  void join(const States& later, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float m = most(r), l = later.most(r);
      if (l == -__builtin_inff()) continue;
      float* mine = sums(r);
      const float* other = later.sums(r);
      if (m == -__builtin_inff()) {
        std::memcpy(mine, other, static_cast<size_t>(stride()) * sizeof(float));
        continue;
      }
      const float now = l > m ? l : m, a = __builtin_expf(m - now), b = __builtin_expf(l - now);
      const vf before = all(a), after = all(b);
      for (int64_t d = 0; d < depth; d += W) store(mine + d, fma(after, load(other + d), before * load(mine + d)));
      for (int64_t g = depth; g < depth + 8; ++g) mine[g] = fma(b, other[g], a * mine[g]);
      most(r) = now;
      total(r) = fma(b, later.total(r), a * total(r));
    }
  }
};

// o = sums / total, and the log-sum-exp. A query that sees no key gives 0 and, in backward, P = exp(S - infinity) = 0.
MCL_INLINE void finish_row(const Attention& s, int64_t b, int64_t h, int64_t i, const float* sums, float most, float total) {
  const bool nothing = total == 0 && s.starts;
  const float inverse = nothing ? 0 : 1.0f / total;
  if (s.lse)
    s.lse[(b * s.H + h) * s.L + i] = nothing ? __builtin_inff() : most + __builtin_logf(total);
  float* o = s.o + b * s.os.batch + h * s.os.head + i * s.os.row;
  for (int64_t d = 0; d < s.D; ++d) o[d] = fma(sums[d], inverse, 0.0f);  // not -0: keys with weight 0 may have been added
}

// The end of all keys of a task's rows.
void finish(const Attention& s, const AttentionTask& t, const States& all) {
  const int64_t rows = t.rows(s), share = s.share();
  const Held& v = s.pieces[0].v;
  const bool words = !s.prompt && as_codes(v, s.D);  // sums are in the order of the words
  for (int64_t r = 0; r < rows; ++r) {
    float* row = all.sums(r);
    if (words) {
      alignas(64) float own[kMaxDepth];
      std::memcpy(own, row, static_cast<size_t>(s.D) * sizeof(float));
      for (int64_t at = 0; at < s.D; ++at) {
        const int64_t e = element(code_of(v.type), at);
        row[e] = own[at] + all.biases(r)[e / 64];
      }
    }
    finish_row(s, t.b, t.kv * share + r % share, t.i0 + r / share, row, all.most(r), all.total(r));
  }
}

// All keys of a task: states(first, end, to) gives those of a split. They are joined by spans, as far as the task goes.
// memory: three states of the rows.
template <class F>
MCL_INLINE void join_splits(const Attention& s, const AttentionTask& t, int64_t padded, float* memory, F&& states) {
  const int64_t rows = t.rows(s), split = s.split(), span = mcl::kSpan * split;
  const States here{memory, s.depth()}, of_span = here.next(padded), all = of_span.next(padded);
  States to{t.partial, s.depth()};
  all.clear(rows), of_span.clear(rows);
  for (int64_t k = t.first; k < t.end; k += split) {
    const int64_t end = k + split < t.end ? k + split : t.end;
    here.clear(padded);
    states(k, end, here);
    if (t.partial && t.unit == split) {
      std::memcpy(to.at, here.at, static_cast<size_t>(rows * here.stride()) * sizeof(float));
      to = to.next(rows);
      continue;
    }
    of_span.join(here, rows);
    if (end < t.end && end % span != 0) continue;
    if (t.partial) {
      std::memcpy(to.at, of_span.at, static_cast<size_t>(rows * here.stride()) * sizeof(float));
      to = to.next(rows);
    } else {
      all.join(of_span, rows);
    }
    of_span.clear(rows);
  }
  if (!t.partial) finish(s, t, all);
}

// Join what n tasks over parts of the keys of the same rows left: the first of them at t. scratch: two states of the rows.
void attention_merge(const Attention& s, const AttentionTask* t, int64_t n, float* scratch) {
  const int64_t rows = t->rows(s), span = mcl::kSpan * s.split();
  const States of_span{scratch, s.depth()}, all = of_span.next(rows);
  all.clear(rows), of_span.clear(rows);
  for (int64_t i = 0; i < n; ++i) {
    States from{t[i].partial, s.depth()};
    for (int64_t k = t[i].first; k < t[i].end; k += t[i].unit, from = from.next(rows)) {
      of_span.join(from, rows);
      if ((k + t[i].unit) % span != 0) continue;
      all.join(of_span, rows);
      of_span.clear(rows);
    }
  }
  all.join(of_span, rows);
  finish(s, *t, all);
}

// Rows [r0, r1) of a task over n of the keys from k0 on; K and V of the block are given.
struct FewBlock {
  Rows k, v;
  Stored k_as, v_as;
  Block k_by, v_by;
};
void few_rows(const Attention& s, const AttentionTask& t, const Queries& q, const FewBlock& at, int64_t r0, int64_t r1,
              int64_t k0, int64_t n, float* scores, const States& to) {
  const int64_t padded = (n + W - 1) / W * W;
  with_stored(at.k_as, [&](auto type) {
    constexpr Stored S = decltype(type)::value;
    by_rows(r0, r1, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value;
      float* p = scores + r * kFewKeys;
      if constexpr (is_code(S)) scores_of_codes<code_of(S), R>(at.k, at.k_by, n, s.D, q, r, p);
      else scores_of_floats<S, R>(at.k, n, s.D, q.values + r * q.stride, q.stride, p);
    });
  });
  const bool hidden = must_hide(s, t.i0, k0, n);
  for (int64_t r = r0; r < r1; ++r) {
    float* row = scores + r * kFewKeys;
    if (hidden) hide(s, t.b, t.i0 + r / s.share(), k0, n, row);
    const float shrink = soften(row, n, padded, to.most(r), to.total(r));
    if (shrink != 1) to.shrink(r, shrink);
  }
  with_stored(at.v_as, [&](auto type) {
    constexpr Stored S = decltype(type)::value;
    by_rows(r0, r1, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value;
      const float* p = scores + r * kFewKeys;
      if constexpr (is_code(S))
        values_of_codes<code_of(S), R>(at.v, at.v_by, n, s.D, p, to.sums(r), to.stride(), to.biases(r));
      else values_of_floats<S, R>(at.v, n, s.D, p, to.sums(r), to.stride());
    });
  });
}

void attention_few(const Attention& s, const AttentionTask& t, float* scratch) {
  const int64_t rows = t.rows(s), share = s.share(), depth = s.depth(), groups = s.D / 64;
  const Held &k_held = s.pieces[0].k, &v_held = s.pieces[0].v;
  const bool k_codes = as_codes(k_held, s.D), v_codes = as_codes(v_held, s.D);
  float* const memory = scratch;
  scratch += 3 * mcl::attention_state_floats(s, rows);
  const Queries q{scratch, scratch + rows * depth, depth};
  float* const scores = q.sums + rows * (depth / 4);
  float* const k_store = scores + rows * kFewKeys;
  float* const v_store = k_store + kFewKeys * (depth + 16);
  load_queries(s, t, k_codes, k_codes ? code_of(k_held.type) : kFour, q);
  FewBlock at{};
  // K or V of a block: where it lies, or as floats where it is of codes that cannot be read in place.
  const auto block = [&](Held mcl::Piece::*part, bool in_place, int64_t k0, int64_t n, float* store, Rows& to, Stored& as, Block& by) {
    as = (s.pieces[0].*part).type;
    if (is_code(as) && !in_place) {
      decode_rows(s, part, t.b, t.kv, k0, n, store, depth);
      to = {reinterpret_cast<const char*>(store), nullptr, depth * static_cast<int64_t>(sizeof(float))};
      as = Stored::float32;
      return;
    }
    to = rows_of(s, part, t.b, t.kv, k0, n, store);
    with_stored(as, [&](auto type) {
      if constexpr (is_code(decltype(type)::value)) block_scales<code_of(decltype(type)::value)>(to, n, groups, by);
    });
  };
  join_splits(s, t, rows, memory, [&](int64_t first, int64_t end, const States& to) {
    for (int64_t k0 = first; k0 < end; k0 += kFewKeys) {
      const int64_t n = end - k0 < kFewKeys ? end - k0 : kFewKeys;
      if (all_hidden(s, t.i0, t.i1, k0, n)) continue;
      block(&mcl::Piece::k, k_codes, k0, n, k_store, at.k, at.k_as, at.k_by);
      block(&mcl::Piece::v, v_codes, k0, n, v_store, at.v, at.v_as, at.v_by);
      if (s.end(t.i0 + 1) - k0 >= n) {
        few_rows(s, t, q, at, 0, rows, k0, n, scores, to);
        continue;
      }
      for (int64_t i = t.i0; i < t.i1; ++i) {  // the rows' own keys
        const int64_t seen = s.end(i + 1) - k0 < n ? s.end(i + 1) - k0 : n;
        if (seen > 0) few_rows(s, t, q, at, (i - t.i0) * share, (i - t.i0 + 1) * share, k0, seen, scores, to);
      }
    }
  });
}

}  // namespace
