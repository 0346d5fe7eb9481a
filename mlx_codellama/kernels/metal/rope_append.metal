// Turn new queries and keys to their positions and pack new keys and values into rows of the cache, in one pass.
//
// One simdgroup takes one vector of D values; its lane holds values lane, lane + 32, … . cosine and sine come from the
// host, made in float64: a float32 angle is wrong by 4e-3 radians where contexts end. Packing follows kernels/packed_kv.py:
// the codes are those of the float16 scale and bias that are stored.
// header: packed_kv

constant constexpr float LARGEST = 65504.0f;                   // of float16

METAL_FUNC float limited(float x) {
  return metal::clamp(x, -LARGEST, LARGEST);
}

// The word of packed codes that this lane's value belongs to; lanes of one word hold it alike.
template <int BITS>
METAL_FUNC uint packed_word(uint value, ushort lane) {
  constexpr int PER_WORD = 32 / BITS;
  uint word = value << (lane % PER_WORD * BITS);
  for (int d = 1; d < PER_WORD; d *= 2) {
    word |= simd_shuffle_xor(word, ushort(d));
  }
  return word;
}

// Writes the N·32 values x of a simdgroup as codes at `codes` and group words at `groups`.
template <int BITS, int GS, int N>
METAL_FUNC void pack(const thread float* x, device uint* codes, device uint* groups, ushort lane) {
  constexpr int PER_LANE = GS / 32;                            // values of a group that a lane holds
  constexpr int PER_WORD = 32 / BITS;
  for (int g = 0; g < N / PER_LANE; g++) {
    float inverse = 0, offset = 0;
    if (BITS != 16) {
      float least = LARGEST, most = -LARGEST;
      for (int i = 0; i < PER_LANE; i++) {
        const float value = limited(x[g * PER_LANE + i]);
        least = metal::min(least, value);
        most = metal::max(most, value);
      }
      least = simd_min(least);
      most = simd_max(most);
      const half low = half((most - least) * (1.0f / float((1 << (BITS % 16)) - 1))), high = half(least);
      offset = float(high);
      inverse = float(low) > 0 ? 1.0f / float(low) : 0.0f;
      if (lane == 0) {
        groups[g] = uint(as_type<ushort>(low)) | (uint(as_type<ushort>(high)) << 16);
      }
    }
    for (int i = 0; i < PER_LANE; i++) {
      const float value = limited(x[g * PER_LANE + i]);
      uint bits;
      if (BITS == 16) {
        bits = as_type<ushort>(half(value));
      } else {
        bits = uint(metal::clamp(metal::rint((value - offset) * inverse), 0.0f, float((1 << (BITS % 16)) - 1)));
      }
      const uint word = packed_word<BITS>(bits, lane);
      if (lane % PER_WORD == 0) {
        codes[((g * PER_LANE + i) * 32 + lane) / PER_WORD] = word;
      }
    }
  }
}

// kernel: rope_append
//   T dtype of q, k and v; D, KB, VB, GS: head size, bits of K and V, values per scale group
//   q [B, H, L, D], k, v [B, K, L, D], cosine, sine [L, D/2] float32; dims: L, H, K
//   → turned [B, H, L, D], packed [B, K, L, W] uint32
//   grid (32·B·L, H + 2·K, 1), threadgroup (32, 1, 1): a query head, then a key, then a value. Tokens along x: CUDA allows
//   65,535 along the other axes
  constexpr int N = D / 32;
  constexpr int KW = D * KB / 32, VW = D * VB / 32;
  constexpr int KG = KB == 16 ? 0 : D / GS, VG = VB == 16 ? 0 : D / GS;
  constexpr int W = KW + VW + KG + VG;
  const ushort lane = thread_index_in_simdgroup;
  const int length = dims[0], H = dims[1], K = dims[2];
  const int head = threadgroup_position_in_grid.y;
  const int batch = int(threadgroup_position_in_grid.x) / length, at = int(threadgroup_position_in_grid.x) % length;

  float x[N];
  if (head < H) {
    const size_t from = ((size_t(batch) * H + head) * length + at) * D;
    for (int i = 0; i < N; i++) {
      x[i] = float(q[from + 32 * i + lane]);
    }
  } else if (head < H + K) {
    const size_t from = ((size_t(batch) * K + head - H) * length + at) * D;
    for (int i = 0; i < N; i++) {
      x[i] = float(k[from + 32 * i + lane]);
    }
  } else {
    const size_t from = ((size_t(batch) * K + head - H - K) * length + at) * D;
    for (int i = 0; i < N; i++) {
      x[i] = float(v[from + 32 * i + lane]);
    }
  }
  if (head < H + K) {
    if (N == 1) {                                              // D = 32: the partner is 16 lanes away
      const float other = simd_shuffle_xor(x[0], ushort(16));
      const float c = cosine[at * (D / 2) + lane % 16], s = sine[at * (D / 2) + lane % 16];
      x[0] = lane < 16 ? x[0] * c - other * s : x[0] * c + other * s;
    } else {
      for (int i = 0; i < N / 2; i++) {
        const float c = cosine[at * (D / 2) + 32 * i + lane], s = sine[at * (D / 2) + 32 * i + lane];
        const float a = x[i], b = x[i + N / 2];
        x[i] = a * c - b * s;
        x[i + N / 2] = b * c + a * s;
      }
    }
  }
  if (head < H) {
    const size_t to = ((size_t(batch) * H + head) * length + at) * D;
    for (int i = 0; i < N; i++) {
      turned[to + 32 * i + lane] = T(x[i]);
    }
  } else if (head < H + K) {
    device uint* row = packed + ((size_t(batch) * K + head - H) * length + at) * W;
    pack<KB, GS, N>(x, row, row + KW + VW, lane);
  } else {
    device uint* row = packed + ((size_t(batch) * K + head - H - K) * length + at) * W;
    pack<VB, GS, N>(x, row + KW, row + KW + VW + KG, lane);
  }
