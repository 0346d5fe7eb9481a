// CUDA's product of a 16 x 8 and an 8 x 8 matrix, dealt to 32 lanes as PTX's mma.m16n8k8 has it. On CUDA it is one
// instruction (cuda/matrix.cu). Here it is the same sum by shuffles, so that the simulator can run kernels which use it.
// With high = lane / 4 and low = lane % 4 a lane holds
//   of A [16, 8]  a0 (high, low), a1 (high + 8, low), a2 (high, low + 4), a3 (high + 8, low + 4)
//   of B [8, 8]   b0 (low, high), b1 (low + 4, high)
//   of D [16, 8]  d0 (high, 2 low), d1 (high, 2 low + 1), d2 (high + 8, 2 low), d3 (high + 8, 2 low + 1)

// The nearest number of 11 bits: what the instruction takes.
METAL_FUNC float to_tf32(float x) {
  return as_type<float>((as_type<uint>(x) + 0x1000u) & 0xffffe000u);
}

// D += A · B
METAL_FUNC void multiply_16x8x8(
    thread float* d, float a0, float a1, float a2, float a3, float b0, float b1, ushort lane) {
  for (int k = 0; k < 8; k++) {
    const ushort from = ushort(lane / 4 * 4 + k % 4);
    const float upper = simd_shuffle(k < 4 ? a0 : a2, from);
    const float lower = simd_shuffle(k < 4 ? a1 : a3, from);
    for (int e = 0; e < 2; e++) {
      const float b = simd_shuffle(k < 4 ? b0 : b1, ushort((lane % 4 * 2 + e) * 4 + k % 4));
      d[e] += upper * b;
      d[2 + e] += lower * b;
    }
  }
}
