// Packed rows of a quantised K/V cache, as kernels/packed_kv.py lays them out. No kernel of its own: a header of the others.
//
// One row is one token of one key-value head, in 32-bit words:
//     K codes (D·KB/32) | V codes (D·VB/32) | a word per group of K | a word per group of V
// A part of 4 or 8 bits holds codes, the first in the low bits; its group word holds the float16 scale (low half) and
// bias (high half), and a value is scale·code + bias. A part of 16 bits holds float16 values and has no group words.

// The float16 numbers in the two halves of a word.
METAL_FUNC float low_half(uint word) {
  return float(as_type<half>(ushort(word & 0xffffu)));
}
METAL_FUNC float high_half(uint word) {
  return float(as_type<half>(ushort(word >> 16)));
}

// Value i of a run that begins at word[0], before scale and bias.
template <int BITS>
METAL_FUNC float code(const thread uint* word, int i) {
  if (BITS == 16) {
    return i % 2 == 0 ? low_half(word[i / 2]) : high_half(word[i / 2]);
  }
  return float((word[i * BITS / 32] >> (i * BITS % 32)) & ((1u << (BITS % 32)) - 1u));
}

// Whether the query whose own key lies at place p of a window sees the key at place t: kernels/kv_attention_window.py.
METAL_FUNC bool in_window(int t, int p, int sinks, int size, int ring) {
  return t > p + ring - size || (t <= p && (t < sinks || t > p - size));
}

// N words from device memory, or zeros. EVEN: the address is a multiple of 8 bytes, so that pairs are loaded at once.
template <int N, bool EVEN>
METAL_FUNC void load_words(const device uint* from, bool wanted, thread uint* word) {
  for (int i = 0; i < N; i++) {
    word[i] = 0;
  }
  if (!wanted) {
    return;
  }
  if (EVEN && N % 2 == 0) {
    for (int i = 0; i < N / 2; i++) {
      const uint2 pair = ((const device uint2*)from)[i];
      word[2 * i] = pair.x;
      word[2 * i + 1] = pair.y;
    }
  } else {
    for (int i = 0; i < N; i++) {
      word[i] = from[i];
    }
  }
}

// The words of token t of a kv head. In one piece they lie in `rows`; with SEGMENTED in `rows` and up to five pieces after it,
// piece i from token dims[4 + 2·i] on and with dims[5 + 2·i] tokens of capacity. One accumulator crosses their borders, so a
// result has the same bits however the tokens are cut.
#ifdef SEGMENTED
#define PIECE(piece, i, t) (piece + (size_t(head) * dims[5 + 2 * i] + ((t) - dims[4 + 2 * i])) * W)
#define ROW_OF(t)                             \
  ((t) < dims[6] ? rows + (base + (t)) * W    \
   : (t) < dims[8] ? PIECE(rows_1, 1, t)      \
   : (t) < dims[10] ? PIECE(rows_2, 2, t)     \
   : (t) < dims[12] ? PIECE(rows_3, 3, t)     \
   : (t) < dims[14] ? PIECE(rows_4, 4, t)     \
                    : PIECE(rows_5, 5, t))
#else
#define ROW_OF(t) (rows + (base + (t)) * W)
#endif
