// K and V as they are stored, to floats.
#pragma once
#include "kv_attention/kv_attention.h"
#include "quant_matmul/decode.simd.h"

namespace {

using mcl::Attention, mcl::AttentionTask, mcl::Held, mcl::Stored;

constexpr bool is_code(Stored t) { return t == Stored::codes8 || t == Stored::codes4; }

// float16 bits in the low halves of the lanes, zero above.
MCL_INLINE vf half_to_float(vi x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x))));
#else
  const vi magnitude = (x & 0x7fff) << 13, special = magnitude >= 0x0f800000;
  const vf finite = reinterpret_cast<vf>(magnitude) * 5.19229685853482762853e33f;  // 2^112 moves the exponent's offset
  const vi bits = (reinterpret_cast<vi>(finite) & ~special) | ((magnitude | 0x7f800000) & special);
  return reinterpret_cast<vf>(bits | ((x & 0x8000) << 16));
#endif
}

// W elements of a row from element e on.
template <Stored S>
MCL_INLINE vf read(const char* row, int64_t e) {
  if constexpr (S == Stored::float32) {
    return load(reinterpret_cast<const float*>(row) + e);
  } else {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * e));
    if constexpr (S == Stored::float16) return reinterpret_cast<vf>(_mm512_cvtph_ps(half));
    else return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
#if defined(__F16C__)
    if constexpr (S == Stored::float16)
      return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * e))));
#endif
    vh half;
    std::memcpy(&half, row + 2 * e, sizeof half);
    const vi x = __builtin_convertvector(half, vi);
    if constexpr (S == Stored::float16) return half_to_float(x);
    else return reinterpret_cast<vf>(x << 16);
#endif
  }
}

// The last n < W elements of a row, then zeros.
template <Stored S>
MCL_INLINE vf read_part(const char* row, int64_t e, int64_t n) {
  constexpr int bytes = S == Stored::float32 ? 4 : 2;
  alignas(64) char whole[4 * W] = {};
  std::memcpy(whole, row + bytes * e, static_cast<size_t>(bytes * n));
  return read<S>(whole, 0);
}

constexpr Code code_of(Stored t) { return t == Stored::codes4 ? kFour : kEight; }

// Scale and bias of group g; the bias is that of codes less `centre_of` them.
struct Affine {
  float scale, bias;
};
template <Code C>
MCL_INLINE Affine affine(const char* scales, int64_t g) {
  uint32_t word;
  std::memcpy(&word, scales + 4 * g, 4);
  vi pair{};
  pair[0] = word & 0xffff;
  pair[1] = word >> 16;
  const vf f = half_to_float(pair);
  return {f[0], fma(centre_of(C), f[0], f[1])};
}

// A row of codes as floats in order; D is a multiple of 32.
template <Code C>
MCL_INLINE void decode_codes(const char* row, const char* scales, int64_t D, int64_t group, float* to) {
  constexpr int N = per_word(C), bits = bits_of(C);
  vu shift;  // of lane l, whose code is number l % N of word l / N
  for (int l = 0; l < W; ++l) shift[l] = static_cast<uint32_t>(l % N * bits);
  for (int64_t g = 0; g < D / group; ++g) {
    const Affine a = affine<C>(scales, g);
    for (int64_t i = 0; i < group; i += W) {
      const int64_t e = g * group + i;
      vi words;
      if constexpr (W <= N) {
        uint32_t word;
        std::memcpy(&word, row + e / N * 4, 4);
        words = vi{} + static_cast<int32_t>(word >> (e % N * bits));
      } else {
        constexpr int COUNT = W / N;
        int32_t few[COUNT];
        std::memcpy(few, row + e / N * 4, 4 * COUNT);
        for (int l = 0; l < W; ++l) words[l] = few[l / N];
      }
      const vf c = code<C, true>(reinterpret_cast<vi>(reinterpret_cast<vu>(words) >> shift), 0);
      store(to + e, fma(c, a.scale, all(a.bias)));
    }
  }
}

// n rows as floats, [n][stride], whatever they are stored as; elements [D, stride) are left alone.
template <Stored S>
void decode_rows_as(const char* rows, const char* scales, int64_t row, int64_t n, int64_t D, int64_t group, float* to,
                    int64_t stride) {
  for (int64_t t = 0; t < n; ++t, rows += row, to += stride) {
    if constexpr (is_code(S)) {
      decode_codes<code_of(S)>(rows, scales + t * row, D, group, to);
    } else {
      int64_t e = 0;
      for (; e + W <= D; e += W) store(to + e, read<S>(rows, e));
      if (e < D) store_part(to + e, read_part<S>(rows, e, D - e), D - e);
    }
  }
}

// f(an integral_constant of Stored).
template <class F>
MCL_INLINE void with_stored(Stored t, F&& f) {
  switch (t) {
    case Stored::float32: return f(std::integral_constant<Stored, Stored::float32>{});
    case Stored::float16: return f(std::integral_constant<Stored, Stored::float16>{});
    case Stored::bfloat16: return f(std::integral_constant<Stored, Stored::bfloat16>{});
    case Stored::codes8: return f(std::integral_constant<Stored, Stored::codes8>{});
    case Stored::codes4: return f(std::integral_constant<Stored, Stored::codes4>{});
  }
}

// Rows of one kv head, `stride` bytes apart.
struct Rows {
  const char *data, *scales;
  int64_t stride;
};
MCL_INLINE Rows rows_in(const Held& x, int64_t b, int64_t kv, int64_t t) {
  const int64_t at = b * x.strides.batch + kv * x.strides.head + t * x.strides.row;
  return {x.data + at, x.scales ? x.scales + at : nullptr, x.strides.row};
}

// f(a piece, its first row, how many, how many before) for those of keys [t, t + n), in order.
template <class F>
MCL_INLINE void for_pieces(const Attention& s, int64_t t, int64_t n, F&& f) {
  int64_t done = 0, start = 0;
  const mcl::Piece* piece = s.pieces.data();
  const mcl::Piece* const last = piece + s.pieces.size() - 1;
  for (; done < n; start += piece->n, ++piece) {
    const int64_t left = piece == last ? n - done : start + piece->n - (t + done);
    if (left <= 0) continue;
    const int64_t count = left < n - done ? left : n - done;
    f(*piece, t + done - start, count, done);
    done += count;
    if (piece == last) return;
  }
}

// K (or V) of keys [t, t + n), n at most kFewKeys: where they lie, or copied to `store` where they lie in several pieces.
MCL_INLINE Rows rows_of(const Attention& s, Held mcl::Piece::*part, int64_t b, int64_t kv, int64_t t, int64_t n, float* store) {
  Rows found{};
  char* const to = reinterpret_cast<char*>(store);
  for_pieces(s, t, n, [&](const mcl::Piece& piece, int64_t first, int64_t count, int64_t before) {
    const Held& x = piece.*part;
    const Rows from = rows_in(x, b, kv, first);
    if (count == n) {
      found = from;
      return;
    }
    const int64_t bytes = x.type == Stored::float32  ? 4 * s.D
                          : x.type == Stored::codes8 ? s.D
                          : x.type == Stored::codes4 ? s.D / 2
                                                     : 2 * s.D;
    const int64_t scales = from.scales ? s.D / x.group * 4 : 0;
    found = {to, scales ? to + bytes : nullptr, bytes + scales};
    for (int64_t i = 0; i < count; ++i) {
      char* row = to + (before + i) * found.stride;
      std::memcpy(row, from.data + i * from.stride, static_cast<size_t>(bytes));
      if (scales) std::memcpy(row + bytes, from.scales + i * from.stride, static_cast<size_t>(scales));
    }
  });
  return found;
}

// K (or V) of keys [t, t + n) as floats, [n][stride].
void decode_rows(const Attention& s, Held mcl::Piece::*part, int64_t b, int64_t kv, int64_t t, int64_t n, float* to,
                 int64_t stride) {
  for_pieces(s, t, n, [&](const mcl::Piece& piece, int64_t first, int64_t count, int64_t before) {
    const Held& x = piece.*part;
    const Rows from = rows_in(x, b, kv, first);
    with_stored(x.type, [&](auto type) {
      decode_rows_as<decltype(type)::value>(from.data, from.scales, from.stride, count, s.D, x.group, to + before * stride, stride);
    });
  });
}

}  // namespace
