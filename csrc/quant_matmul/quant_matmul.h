// y = x @ dequantised(W)ᵀ for MLX's packed weights: codes of 4 or 8 bits from the low end of 32-bit words, one scale
// and bias per group of inputs. Three forms: `rows` streams the weights once for a few rows of x, `tile` unpacks a panel
// of weights for many rows, `int8` multiplies integers (one row, or a panel by many).
#pragma once
#include <cstdint>

#include "pool/pool.h"

namespace mcl {

enum class Scale { float32, float16, bfloat16, e8m0 };  // e8m0: 2^(code - 127), and codes are 4-bit floats (mxfp4)

struct QuantMatmul {
  const float* x;         // [rows, depth]
  const uint32_t* weight;  // [outs, depth * bits / 32]
  const void* scales;      // [outs, depth / group]
  const void* biases;      // like scales; nullptr for mxfp4
  float* y;                // [rows, outs]
  int64_t rows, depth, outs;
  int bits;   // 4, 8
  int group;  // 32, 64, 128
  Scale scale;
  int terms;  // 0: activations stay float32. 1, 2: each is the sum of so many int8 terms times a scale of its group

  int64_t groups() const { return depth / group; }
  int64_t words() const { return depth * bits / 32; }  // per output
};

constexpr int kFewRows = 4;         // up to here the `rows` form
constexpr int64_t kTileDepth = 256;  // inputs of a float panel
constexpr int64_t kInt8Depth = 4096;  // inputs of an integer panel
constexpr int kTilePanels = 4;       // panels of two vectors of outputs that a task of the `tile` form owns

// Rows of x, made ready. `rows` form: values[r] in the order in which the codes come out of W words at a time, sums over
// groups. `int8` form: terms[t][r] bytes in the order of the codes' planes, a scale and a sum per group.
struct QuantRows {
  float* values;
  int8_t* bytes;
  int32_t* lanes;  // one row alone: its bytes once more, for words read in order
  float *step, *sums;          // [rows, padded groups]
  int64_t value_stride, group_stride;
};

MCL_API void quant_matmul(const QuantMatmul& s);

}  // namespace mcl
