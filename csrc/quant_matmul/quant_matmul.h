// y = x @ dequantised(W)ᵀ for MLX's packed weights: codes of 4 or 8 bits from the low end of 32-bit words, one scale
// and bias per group of inputs. Each of two number formats of x has two forms: `rows` streams the weights once for a few
// rows of x, `tile` unpacks a panel of weights for many rows. A row's bits depend on its x, the weights, and the form; not
// on the other rows. One that is not finite is done in float32, by itself.
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

constexpr int kFewRows = 8;  // up to here the `rows` forms
constexpr int64_t kTileDepth = 256;  // inputs of a float panel
constexpr int64_t kInt8Depth = 1024;  // inputs of an integer panel
constexpr int64_t kInt16Depth = 256;  // inputs of a panel of 16-bit pairs: 32 kB of 64 outputs
constexpr int64_t kInt8Scratch = kInt8Depth * 3 / 8;  // floats per output of a panel: codes, scales, biases, corrections
constexpr int64_t kInt8Piece = 1024;  // inputs that become lanes at a time: whole groups, whole blocks of words
constexpr int kTilePanels = 4;       // panels of two vectors of outputs that a task of the float `tile` form owns

constexpr int kInt8Rows = 4;         // rows of x in a block of the int8 `tile` form

// Rows of x, made ready for a form (see there), and a step and a sum per group.
struct QuantRows {
  float* values;
  int8_t* bytes;
  float *step, *sums;
  uint32_t* cross;  // of the 16-bit `tile` form alone: a correction per group
  int64_t value_stride, byte_stride, group_stride;  // of a row; the int8 `tile` form has no use for them
};

// Up to three products of one x whose weights have one format, in one launch.
struct QuantLinear {
  QuantMatmul part[3];
  int n;
  const float* norm;      // x is normalised first (root mean square, then times this), or nullptr
  float eps;
  const float* residual;  // added to y of the only part, or nullptr
  bool prompt;            // the `tile` form whatever the number of rows. Else `rows` up to kFewRows
  bool gated;             // parts are gate and up: y of the first becomes silu(gate) * up; the second's is not needed
};

MCL_API void quant_linear(QuantLinear l);

}  // namespace mcl
