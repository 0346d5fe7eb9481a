// Many rows of x in float32: a panel of weights is unpacked to [kTileDepth][2W] floats, code · scale + bias rounded once,
// and multiplied by all rows. NaN and infinity behave as in a matrix product.
#pragma once
#include "quant_matmul/decode.simd.h"

namespace {

template <Code C>
MCL_INLINE void unpack(const QuantMatmul& s, int64_t o, int64_t k0, int64_t depth, float* to) {
  constexpr int per = per_word(C);
  const int64_t words = s.group / per;
  for (int64_t k = 0; k < depth; k += s.group) {
    const vf by = group_column(s, s.scales, o, (k0 + k) / s.group), bias = group_column(s, s.biases, o, (k0 + k) / s.group);
    float* out = to + k * 2 * W;
    for_words(s, o, (k0 + k) / per, words, [&](int64_t t, vi w) {
#pragma GCC unroll 16
      for (int i = 0; i < per; ++i) store(out + (t * per + i) * 2 * W, fma(code<C, false>(w, i), by, bias));
    });
  }
}

constexpr int64_t kSumDepth = 64;  // products added up from zero before they join the result: keeps rounding errors small

template <int MR>
MCL_INLINE void float_block(const float* a, int64_t am, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
  for (int64_t k0 = 0; k0 < depth; k0 += kSumDepth) {
    const int64_t end = k0 + kSumDepth < depth ? k0 + kSumDepth : depth;
    vf acc[MR][2] = {};
    for (int64_t k = k0; k < end; ++k) {
      const vf w0 = load(b + k * 2 * W), w1 = load(b + k * 2 * W + W);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const float v = a[i * am + k];
        acc[i][0] = fma(w0, v, acc[i][0]);
        acc[i][1] = fma(w1, v, acc[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        float* y = c + i * ldc + j * W;
        store(y, add || k0 > 0 ? load(y) + acc[i][j] : acc[i][j]);
      }
  }
}

void multiply_rows(int64_t m, int64_t depth, const float* a, int64_t am, const float* b, float* c, int64_t ldc, bool add) {
  constexpr int MR = W == 16 ? 8 : 4;
  int64_t i = 0;
  for (; i + MR <= m; i += MR) float_block<MR>(a + i * am, am, b, depth, c + i * ldc, ldc, add);
  for (; i + 2 <= m; i += 2) float_block<2>(a + i * am, am, b, depth, c + i * ldc, ldc, add);
  for (; i < m; ++i) float_block<1>(a + i * am, am, b, depth, c + i * ldc, ldc, add);
}

constexpr int64_t kTileRows = 32;  // rows whose kTileDepth inputs stay in the first cache while the panels pass

// Rows [r0, r1) of outputs [o0, o1); scratch holds kTilePanels panels and one block of results.
void quant_tile(const QuantMatmul& s, int64_t r0, int64_t r1, int64_t o0, int64_t o1, float* scratch) {
  with_code(s, [&](auto c) {
    constexpr Code C = decltype(c)::value;
    float* edge = scratch + mcl::kTilePanels * mcl::kTileDepth * 2 * W;
    for (int64_t p0 = o0; p0 < o1; p0 += mcl::kTilePanels * 2 * W) {
      const int64_t p1 = p0 + mcl::kTilePanels * 2 * W < o1 ? p0 + mcl::kTilePanels * 2 * W : o1;
      for (int64_t k0 = 0; k0 < s.depth; k0 += mcl::kTileDepth) {
        const int64_t depth = s.depth - k0 < mcl::kTileDepth ? s.depth - k0 : mcl::kTileDepth;
        float* to = scratch;
        for (int64_t o = p0; o < p1; o += 2 * W, to += mcl::kTileDepth * 2 * W) {
          unpack<C>(s, o, k0, depth, to);
          unpack<C>(s, o + W, k0, depth, to + W);
        }
        for (int64_t r = r0; r < r1; r += kTileRows) {
          const int64_t m = r1 - r < kTileRows ? r1 - r : kTileRows;
          const float *a = s.x + r * s.depth + k0, *b = scratch;
          for (int64_t o = p0; o < p1; o += 2 * W, b += mcl::kTileDepth * 2 * W) {
            float* y = s.y + r * s.outs + o;
            const int64_t n = p1 - o;
            if (n >= 2 * W) {
              multiply_rows(m, depth, a, s.depth, b, y, s.outs, k0 > 0);
              continue;
            }
            for (int64_t i = 0; k0 > 0 && i < m; ++i) std::memcpy(edge + i * 2 * W, y + i * s.outs, n * sizeof(float));
            multiply_rows(m, depth, a, s.depth, b, edge, 2 * W, k0 > 0);
            for (int64_t i = 0; i < m; ++i) std::memcpy(y + i * s.outs, edge + i * 2 * W, n * sizeof(float));
          }
        }
      }
    }
  });
}

}  // namespace
