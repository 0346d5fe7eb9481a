// A new token of one kv head as a packed row: the key turned by its position, then key and value as codes (or float16).
// The layout and the arithmetic are those of mlx_codellama/kernels/packed_kv.py.
#pragma once
#include "rope/rope.simd.h"
#include "rope_append/rope_append.h"

namespace {

// float16 bits, rounded to nearest, ties to even.
MCL_INLINE vi float_to_half(vf x) {
  const vi bits = reinterpret_cast<vi>(x), sign = (bits >> 16) & 0x8000, m = bits & 0x7fffffff;
  const vi normal = (m + (0xfff - (112 << 23)) + ((m >> 13) & 1)) >> 13;
  // The smallest float16 is 2^-24, the unit of the last place of a float32 in [0.5, 1).
  const vi subnormal = reinterpret_cast<vi>(reinterpret_cast<vf>(m) + 0.5f) - 0x3f000000;
  const vi finite = m < 0x38800000 ? subnormal : normal;
  const vi infinite = vi{} + 0x7c00, nan = vi{} + 0x7e00;
  const vi limited = m >= 0x477ff000 ? infinite : finite;
  return (m > 0x7f800000 ? nan : limited) | sign;
}
MCL_INLINE float half_of(float x, uint32_t& bits) {
  bits = static_cast<uint32_t>(float_to_half(all(x))[0]);
  const uint32_t m = (bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &m, 4);
  y *= 5.19229685853482762853e33f;  // 2^112
  return bits & 0x8000 ? -y : y;
}

// x [D], a multiple of 32 → D bits / 32 words, and a word per group.
void pack_codes(const float* x, int64_t D, int64_t group, int bits, uint32_t* words, uint32_t* scales) {
  const float top = static_cast<float>((1 << bits) - 1), part = static_cast<float>(1.0 / ((1 << bits) - 1));
  const vf most = all(65504.0f), least = all(-65504.0f);
  alignas(64) float limited[64];
  alignas(64) int32_t codes[64];
  const int per_word = 32 / bits;
  for (int64_t g = 0; g < D / group; ++g, x += group, words += group / per_word) {
    vf low = most, high = least;
    for (int64_t i = 0; i < group; i += W) {
      vf v = load(x + i);
      v = v > most ? most : v;
      v = v < least ? least : v;
      store(limited + i, v);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const float first = -largest(-low), last = largest(high);
    uint32_t scale_bits, bias_bits;
    const float scale = half_of((last - first) * part, scale_bits), bias = half_of(first, bias_bits);
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    scales[g] = scale_bits | bias_bits << 16;
    const vf zero{}, ceiling = all(top);
    for (int64_t i = 0; i < group; i += W) {
      vf c = (load(limited + i) - bias) * inverse;
      c = c < zero ? zero : c;
      c = c > ceiling ? ceiling : c;
      const vi whole = reinterpret_cast<vi>(c + 12582912.0f) & 0xff;  // 1.5 * 2^23: rounds to even
      std::memcpy(codes + i, &whole, sizeof whole);
    }
    for (int64_t w = 0; w < group / per_word; ++w) {
      uint32_t word = 0;
      for (int k = 0; k < per_word; ++k) word |= static_cast<uint32_t>(codes[w * per_word + k]) << (k * bits);
      words[w] = word;
    }
  }
}

void pack_halves(const float* x, int64_t D, uint32_t* words) {
  for (int64_t d = 0; d < D; d += W) {
    const int64_t n = D - d < W ? D - d : W;
    vf v = load_part(x + d, n, 0);
    v = v > 65504.0f ? all(65504.0f) : v;
    v = v < -65504.0f ? all(-65504.0f) : v;
    const vi bits = float_to_half(v);
    for (int64_t i = 0; i < n; i += 2)
      words[(d + i) / 2] = static_cast<uint32_t>(bits[i]) | static_cast<uint32_t>(bits[i + 1]) << 16;
  }
}

void append_row(const mcl::RowLayout& f, const float* k, const float* v, const float* cosine, const float* sine,
                uint32_t* row) {
  alignas(64) float turned[mcl::kMostRowDepth];
  rope(k, cosine, sine, turned, f.D / 2, 1.0f);
  const int64_t group = f.group(), k_words = f.D * f.k_bits / 32, v_words = f.D * f.v_bits / 32;
  uint32_t* scales = row + k_words + v_words;
  if (f.k_bits == 16) {
    pack_halves(turned, f.D, row);
  } else {
    pack_codes(turned, f.D, group, f.k_bits, row, scales);
    scales += f.D / group;
  }
  if (f.v_bits == 16) pack_halves(v, f.D, row + k_words);
  else pack_codes(v, f.D, group, f.v_bits, row + k_words, scales);
}

}  // namespace
