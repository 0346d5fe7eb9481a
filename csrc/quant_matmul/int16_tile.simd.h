// The `tile` form of two int8 terms where the processor multiplies pairs of 16 bits (x86): both terms are one integer of
// 15 bits, and codes become 16 bits wide. An instruction does half as many products as with bytes, in one pass for both
// terms. Factors as wide as that leave room for Winograd's inner product (1968), where one product does the work of two:
//   x1 w1 + x2 w2 = (x1 + w2)(x2 + w1) - x1 x2 - w1 w2.
// The last two depend on a row or on an output alone and are formed once. Sums are int32 and may wrap on the way; the
// result is exact all the same. The two additions are worth it where units that cannot multiply do them.
//
// x in chunks of kInt16Depth inputs: [chunks][blocks][groups][group / 2][R][2] of int16, step, sums and cross
// [chunks][blocks][groups][R], so that all blocks of rows are read in order while one chunk of a panel stays in the
// first cache.
#pragma once
#include "quant_matmul/int8_tile.simd.h"

namespace {

using mcl::kInt16Depth;

#if defined(__AVX2__)
constexpr bool kInt16 = true;
#else
constexpr bool kInt16 = false;  // NEON's dot products take bytes
#endif

constexpr int kStep = 4;  // quads of inputs (two pairs) that a step multiplies; the first of them by joined products

// Joined quads of a step. Three leave as many additions as products: AMD's cores do both at once. Intel's have two
// units for vectors of 512 bits in all, and without VNNI each product costs an addition as it is.
MCL_INLINE int joined_quads() {
#if defined(__AVX512VNNI__)
  static const bool apart = __builtin_cpu_is("amd");
  return apart ? 3 : 0;
#else
  return 0;
#endif
}

typedef uint32_t v4u __attribute__((vector_size(16)));
static_assert(R == 4);

// Eight inputs of R rows as four pairs of each: [4][R]. Pair n of a word has its codes n and n + half of their number.
MCL_INLINE void to_pairs(const int16_t (&q)[R][128], int64_t k, int bits, v4i (&to)[4]) {
  v4i r[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    v8s eight;
    std::memcpy(&eight, q[i] + k, sizeof eight);
    r[i] = reinterpret_cast<v4i>(bits == 4 ? __builtin_shufflevector(eight, eight, 0, 4, 1, 5, 2, 6, 3, 7)
                                           : __builtin_shufflevector(eight, eight, 0, 2, 1, 3, 4, 6, 5, 7));
  }
  const v4i a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const v4i c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  to[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), to[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  to[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), to[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// x1 · x2 of both halves of every lane.
MCL_INLINE v4u products(v4i a, v4i b) {
  return reinterpret_cast<v4u>((a << 16 >> 16) * (b << 16 >> 16)) + reinterpret_cast<v4u>((a >> 16) * (b >> 16));
}

// Block b of the rows of x. → bits of those that are not finite.
uint32_t quant_int16_tile_prepare(const QuantMatmul& s, const QuantRows& to, int64_t b) {
  const int64_t blocks = (s.rows + R - 1) / R, rows = s.rows - b * R < R ? s.rows - b * R : R;
  const int joined = joined_quads();
  int16_t q[R][128] = {};
  float whole[R] = {};
  for (int64_t k = 0; k < s.depth; k += s.group) {
    const int64_t k0 = k / kInt16Depth * kInt16Depth;
    const int64_t depth = s.depth - k0 < kInt16Depth ? s.depth - k0 : kInt16Depth;
    const int64_t at = (k0 * blocks + b * depth + k - k0) * R, of = at / s.group;
    for (int64_t i = 0; i < R; ++i) {
      float &step = to.step[of + i], &sums = to.sums[of + i];
      step = sums = 0;
      if (i < rows) int16_group(s.x + (b * R + i) * s.depth + k, s.group, q[i], step, sums);
      whole[i] += step - step;
    }
    int16_t* pairs = reinterpret_cast<int16_t*>(to.bytes) + at;
    v4u cross{};
    for (int64_t n = 0; n < s.group; n += 8, pairs += 8 * R) {  // two quads at a time
      v4i four[4];
      to_pairs(q, n, s.bits, four);
      std::memcpy(pairs, four, sizeof four);
      if (n / 4 % kStep < joined) cross -= products(four[0], four[1]);
      if (n / 4 % kStep + 1 < joined) cross -= products(four[2], four[3]);
    }
    std::memcpy(to.cross + of, &cross, sizeof cross);
  }
  uint32_t wild = 0;
  for (int i = 0; i < R; ++i) wild |= static_cast<uint32_t>(!(whole[i] == 0)) << i;
  return wild;
}

// Codes of a chunk, one chunk's groups of a panel: pairs [depth / 2][NV · W], and what joined products are too large by.
struct Int16Panel {
  uint32_t* pairs;
  uint32_t* cross;  // [groups][NV · W]
  const float *by, *bias;
};

// R rows, all groups of a panel's chunk, added to sum [R][NV · W].
template <int JOINED>
MCL_INLINE void int16_block(const int16_t* x, const float* step, const float* sums, const uint32_t* cross, int64_t group,
                            int64_t groups, Int16Panel p, float* sum) {
  const auto both = [](const int16_t* from) __attribute__((always_inline)) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return reinterpret_cast<vp>(vi{} + pair);
  };
  for (int64_t g = 0; g < groups; ++g) {
    vi acc[R][NV] = {};
    if constexpr (JOINED > 0) {
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = reinterpret_cast<vi>(reinterpret_cast<vu>(load_words(p.cross + j * W)) + cross[i]);
    }
    for (int64_t k = 0; k < group; k += 4 * kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kStep; ++u, x += 4 * R, p.pairs += 2 * NV * W) {
        vp first[NV], second[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          first[j] = reinterpret_cast<vp>(load_words(p.pairs + j * W));
          second[j] = reinterpret_cast<vp>(load_words(p.pairs + (NV + j) * W));
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const vp a = both(x + 2 * i), b = both(x + 2 * (R + i));
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j)
            acc[i][j] = u < JOINED ? dot(acc[i][j], a + second[j], b + first[j]) : dot(dot(acc[i][j], a, first[j]), b, second[j]);
        }
      }
    }
    vf scale[NV], shift[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) scale[j] = load(p.by + j * W), shift[j] = load(p.bias + j * W);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const vf a = all(step[i]), b = all(sums[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = sum + (i * NV + j) * W;
        store(to, fma(to_float(acc[i][j]) * scale[j], a, fma(shift[j], b, load(to))));
      }
    }
    step += R, sums += R, cross += R, p.by += NV * W, p.bias += NV * W, p.cross += NV * W;
  }
}

// Inputs [k0, k0 + depth) of outputs o … o + NV · W - 1 as pairs.
template <Code C>
MCL_INLINE void int16_panel(const QuantMatmul& s, int64_t o, int64_t k0, int64_t depth, const Int16Panel& to) {
  constexpr int half = per_word(C) / 2;
  constexpr int mask = C == kEight ? 0x00ff00ff : 0x000f000f;
  for (int64_t j = 0; j < NV; ++j)
    for_words(s, o + j * W, k0 / per_word(C), depth / per_word(C), [&](int64_t t, vi w) {
#pragma GCC unroll 4
      for (int p = 0; p < half; ++p) {
        const vi pair = reinterpret_cast<vi>(reinterpret_cast<vu>(w) >> static_cast<unsigned>(p * bits_of(C))) & mask;
        *reinterpret_cast<vi_any*>(to.pairs + ((t * half + p) * NV + j) * W) = pair;
      }
    });
  const int joined = joined_quads();
  if (joined == 0) return;
  for (int64_t g = 0; g < depth / s.group; ++g)
    for (int64_t j = 0; j < NV; ++j) {
      vi cross{};
      const uint32_t* at = to.pairs + (g * s.group / 2 * NV + j) * W;
      for (int64_t n = 0; n < s.group / 4; ++n, at += 2 * NV * W)
        if (n % kStep < joined)
          cross = dot(cross, reinterpret_cast<vp>(load_words(at)), reinterpret_cast<vp>(load_words(at + NV * W)));
      *reinterpret_cast<vi_any*>(to.cross + (g * NV + j) * W) = -cross;
    }
}

// Lines [n0, n1) of the words that `int16_panel` will read, into the second cache: rows of weights lie too far apart for
// the processor to see it coming.
MCL_INLINE void fetch_panel(const QuantMatmul& s, int64_t o, int64_t k0, int64_t depth, int64_t n0, int64_t n1) {
  const int64_t bytes = depth * s.bits / 8, lines = (bytes + 63) / 64;
  const char* first = reinterpret_cast<const char*>(s.weight + o * s.words()) + k0 * s.bits / 8;
  const int64_t end = (s.outs - o < NV * W ? s.outs - o : NV * W) * lines;
  for (int64_t n = n0; n < n1 && n < end; ++n) __builtin_prefetch(first + n / lines * s.words() * 4 + n % lines * 64, 0, 2);
}

// Blocks of rows [b0, b1), outputs [o0, o1). scratch: a chunk of a panel, scales and biases of kInt8Depth inputs, and all
// results until they are complete.
void quant_int16_tile(const QuantMatmul& s, const QuantRows& x, int64_t b0, int64_t b1, int64_t o0, int64_t o1,
                      float* scratch) {
  const int64_t blocks = (s.rows + R - 1) / R;
  const int joined = joined_quads();
  Int16Panel panel{};
  panel.pairs = reinterpret_cast<uint32_t*>(scratch);
  panel.cross = panel.pairs + kInt16Depth / 2 * NV * W;
  float* by = scratch + (kInt16Depth / 2 + kInt16Depth / 32) * NV * W;
  float* bias = by + mcl::kInt8Depth / 32 * NV * W;
  float* results = bias + mcl::kInt8Depth / 32 * NV * W;  // [panels][rows][NV · W]: y's own rows lie whole pages apart
  for (int64_t part = 0; part < s.depth; part += mcl::kInt8Depth) {
    const int64_t end = s.depth - part < mcl::kInt8Depth ? s.depth : part + mcl::kInt8Depth;
    for (int64_t o = o0; o < o1; o += NV * W) {
      for (int64_t j = 0; j < NV; ++j) {
        group_columns(s, s.scales, o + j * W, part / s.group, (end - part) / s.group, by + j * W);
        group_columns(s, s.biases, o + j * W, part / s.group, (end - part) / s.group, bias + j * W);
      }
      float* const sums = results + (o - o0) * (b1 - b0) * R;
      if (part == 0) std::memset(sums, 0, static_cast<size_t>((b1 - b0) * R * NV * W) * sizeof(float));
      for (int64_t k0 = part; k0 < end; k0 += kInt16Depth) {
        const int64_t depth = end - k0 < kInt16Depth ? end - k0 : kInt16Depth;
        if (s.bits == 4) int16_panel<kFour>(s, o, k0, depth, panel);
        else int16_panel<kEight>(s, o, k0, depth, panel);
        panel.by = by + (k0 - part) / s.group * NV * W, panel.bias = bias + (k0 - part) / s.group * NV * W;
        // The next chunk of this panel, or the first one of the next panel.
        const bool last = k0 + depth == end;
        const int64_t next_o = last ? o + NV * W : o, next_k0 = last ? part : k0 + depth;
        const int64_t next = end - next_k0 < kInt16Depth ? end - next_k0 : kInt16Depth;
        const int64_t lines = NV * W * kInt16Depth / 128 * s.bits / 4, ahead = (lines + b1 - b0 - 1) / (b1 - b0);
        for (int64_t b = b0; b < b1; ++b) {
          if (next_o < o1) fetch_panel(s, next_o, next_k0, next, (b - b0) * ahead, (b - b0 + 1) * ahead);
          const int64_t at = (k0 * blocks + b * depth) * R, of = at / s.group;
          const int16_t* pairs = reinterpret_cast<const int16_t*>(x.bytes) + at;
          float* sum = sums + (b - b0) * R * NV * W;
          if (joined) int16_block<3>(pairs, x.step + of, x.sums + of, x.cross + of, s.group, depth / s.group, panel, sum);
          else int16_block<0>(pairs, x.step + of, x.sums + of, x.cross + of, s.group, depth / s.group, panel, sum);
        }
      }
      if (end < s.depth) continue;
      const size_t width = static_cast<size_t>(o1 - o < NV * W ? o1 - o : NV * W) * sizeof(float);
      const int64_t r0 = b0 * R, r1 = b1 * R < s.rows ? b1 * R : s.rows;
      for (int64_t r = r0; r < r1; ++r) std::memcpy(s.y + r * s.outs + o, sums + (r - r0) * NV * W, width);
    }
  }
}

// The form for s.
uint32_t quant_int8_tile_prepare(const QuantMatmul& s, const QuantRows& to, int64_t b) {
  return kInt16 && s.terms == 2 ? quant_int16_tile_prepare(s, to, b) : quant_bytes_tile_prepare(s, to, b);
}
void quant_int8_tile(const QuantMatmul& s, const QuantRows& x, int64_t b0, int64_t b1, int64_t o0, int64_t o1,
                     float* scratch) {
  if (kInt16 && s.terms == 2) quant_int16_tile(s, x, b0, b1, o0, o1, scratch);
  else quant_bytes_tile(s, x, b0, b1, o0, o1, scratch);
}

}  // namespace
