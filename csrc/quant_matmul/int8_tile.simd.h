// Many rows of x as bytes, in blocks of R = kInt8Rows: [blocks][groups][terms][group / 4][R][4 bytes], step and
// sums [blocks][groups][R]. A panel of weights is unpacked to bytes once and multiplied by all blocks.
#pragma once
#include "quant_matmul/int8.simd.h"

namespace {

constexpr int R = mcl::kInt8Rows;

// Block b of the rows of x. → bits of those that are not finite.
uint32_t quant_bytes_tile_prepare(const QuantMatmul& s, const QuantRows& to, int64_t b) {
  const int64_t groups = s.groups();
  int8_t* block = to.bytes + b * R * s.terms * s.depth;
  float *step = to.step + b * groups * R, *sums = to.sums + b * groups * R;
  uint32_t wild = 0;
  for (int64_t i = 0; i < R; ++i) {
    const int64_t r = b * R + i;
    float whole = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int8_t bytes[2][128] = {};
      int8_t* const at[2] = {bytes[0], bytes[1]};
      float &by = step[g * R + i], &of = sums[g * R + i];
      by = of = 0;
      if (r < s.rows) {
        const float* x = s.x + r * s.depth + g * s.group;
        if (s.terms == 2) int8_group<2>(x, s.group, at, by, of);
        else int8_group<1>(x, s.group, at, by, of);
        whole += by - by;
      }
      for (int t = 0; t < s.terms; ++t) {
        int8_t* out = block + ((g * s.terms + t) * s.group * R) + i * 4;
        for (int64_t k = 0; k < s.group; k += 8, out += 8 * R) {
          uint64_t eight;
          std::memcpy(&eight, &bytes[t][k], 8);
          if (s.bits == 4) eight = evens_first(eight);
          std::memcpy(out, &eight, 4);
          eight >>= 32;
          std::memcpy(out + 4 * R, &eight, 4);
        }
      }
    }
    wild |= static_cast<uint32_t>(!(whole == 0)) << i;
  }
  return wild;
}

constexpr int NV = W == 16 ? 4 : 2;  // vectors of outputs in a panel: with R rows, what the registers hold

// R rows, all groups of a panel, added to sum [R][NV · W].
template <Code C, int TERMS>
MCL_INLINE void int8_block(const int8_t* x, const float* step, const float* sums, int64_t group, int64_t groups,
                           const uint32_t* panel, const float* by, const float* bias, float* sum) {
  for (int64_t g = 0; g < groups; ++g) {
    vi acc[R][NV] = {};
#pragma GCC unroll 2
    for (int t = 0; t < TERMS; ++t) {
      if (t) {
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] <<= 7;
      }
      const uint32_t* w = panel;
      for (int64_t k = 0; k < group; k += 4, w += NV * W, x += 4 * R) {
        vi v[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) v[j] = load_words(w + j * W);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          int32_t four;
          std::memcpy(&four, x + 4 * i, 4);
          const vi each = vi{} + four;
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] = dot<C>(acc[i][j], v[j], each);
        }
      }
    }
    panel += group / 4 * NV * W;
    vf scale[NV], shift[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) scale[j] = load(by + j * W), shift[j] = load(bias + j * W);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const vf a = all(step[i]), b = all(sums[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = sum + (i * NV + j) * W;
        store(to, fma(to_float(acc[i][j]) * scale[j], a, fma(shift[j], b, load(to))));
      }
    }
    step += R, sums += R, by += NV * W, bias += NV * W;
  }
}

// Groups [0, n) from `first` on of outputs o … o + W - 1, transposed: to[g · NV · W + l].
__attribute__((noinline)) void group_columns(const QuantMatmul& s, const void* from, int64_t o, int64_t first, int64_t n,
                                             float* to) {
  for (int64_t g = 0; g < n; g += W) {
    const int64_t m = n - g < W ? n - g : W;
    vi r[W];
    for (int i = 0; i < W; ++i) {
      const int64_t out = o + i < s.outs ? o + i : s.outs - 1;
      r[i] = reinterpret_cast<vi>(scales_of(from, s.scale, out * s.groups() + first + g, m));
    }
    transpose_from<1>(r);
    for (int64_t i = 0; i < m; ++i) store(to + (g + i) * NV * W, reinterpret_cast<vf>(r[i]));
  }
}

// Blocks of rows [b0, b1), outputs [o0, o1). scratch: a panel of kInt8Depth inputs, its scales and biases, and all
// results until they are complete.
void quant_bytes_tile(const QuantMatmul& s, const QuantRows& x, int64_t b0, int64_t b1, int64_t o0, int64_t o1,
                      float* scratch) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    constexpr int planes = per_word(C) / 4;
    constexpr int mask = C == kEight ? -1 : 0x0f0f0f0f;
    if constexpr (C != kFloat4) {
      uint32_t* panel = reinterpret_cast<uint32_t*>(scratch);
      float* by = scratch + mcl::kInt8Depth / 4 * NV * W;
      float* bias = by + mcl::kInt8Depth / 32 * NV * W;
      float* sums = bias + mcl::kInt8Depth / 32 * NV * W;  // [panels][rows][NV · W]: y's own rows lie whole pages apart
      for (int64_t k0 = 0; k0 < s.depth; k0 += mcl::kInt8Depth) {
        const int64_t depth = s.depth - k0 < mcl::kInt8Depth ? s.depth - k0 : mcl::kInt8Depth;
        const int64_t groups = depth / s.group, first = k0 / s.group;
        for (int64_t o = o0; o < o1; o += NV * W) {
          for (int64_t j = 0; j < NV; ++j) {
            uint32_t* to = panel + j * W;
            for_words(s, o + j * W, k0 / per_word(C), depth / per_word(C), [&](int64_t t, vi w) {
#pragma GCC unroll 2
              for (int p = 0; p < planes; ++p) {
                const vi bytes = reinterpret_cast<vi>(reinterpret_cast<vu>(w) >> static_cast<unsigned>(p * bits_of(C)));
                *reinterpret_cast<vi_any*>(to + (t * planes + p) * NV * W) = bytes & mask;
              }
            });
            group_columns(s, s.scales, o + j * W, first, groups, by + j * W);
            group_columns(s, s.biases, o + j * W, first, groups, bias + j * W);
          }
          const size_t width = static_cast<size_t>(o1 - o < NV * W ? o1 - o : NV * W) * sizeof(float);
          for (int64_t b = b0; b < b1; ++b) {
            float* sum = sums + ((o - o0) * (b1 - b0) + (b - b0) * NV * W) * R;
            if (k0 == 0) std::memset(sum, 0, R * NV * W * sizeof(float));
            const int8_t* bytes = x.bytes + (b * s.depth + k0) * R * s.terms;
            const int64_t of = (b * s.groups() + first) * R;
            if (s.terms == 2)
              int8_block<C, 2>(bytes, x.step + of, x.sums + of, s.group, groups, panel, by, bias, sum);
            else
              int8_block<C, 1>(bytes, x.step + of, x.sums + of, s.group, groups, panel, by, bias, sum);
            if (k0 + depth < s.depth) continue;
            const int64_t n = s.rows - b * R < R ? s.rows - b * R : R;
            for (int64_t i = 0; i < n; ++i) std::memcpy(s.y + (b * R + i) * s.outs + o, sum + i * NV * W, width);
          }
        }
      }
    }
  });
}

}  // namespace
