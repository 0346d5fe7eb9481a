// The product of a few rows of x as a stage: see pool/stages.h.
#pragma once
#include "pool/stages.h"
#include "quant_matmul/quant_matmul.h"

namespace mcl {

struct Kernels;

class RowsProduct {
 public:
  // Whether there is a form for so many rows.
  static bool does(const QuantMatmul& s) {
    return s.terms == 0 ? s.rows <= kFewRows : s.rows <= kFewInt8Rows && s.scale != Scale::e8m0;
  }

  RowsProduct() = default;
  explicit RowsProduct(const QuantLinear& l);
  // Floats of memory that it needs, and where they are: a cache line's alignment.
  int64_t floats() const { return floats_; }
  void use(float* memory);

  int64_t begin();  // normalise and prepare x → units
  void run(int64_t a, int64_t b);
  int64_t grain() const { return grain_; }
  // While others are busy: fetch the beginning of the part that thread `me` will read, from where `done` (bytes) left it.
  void fetch(int me, int threads, const Over& over, int64_t& done) const;

 private:
  // int8: a unit is a pair of outputs, gate and up or one in each half, so that a thread reads two streams; floats: four
  // outputs; tile: a panel, where x is not finite.
  enum class Form { int8, floats, tile };
  int64_t units_of(int part, Form form) const;
  int parts() const { return l_.gated ? 1 : l_.n; }
  void finish(int part, int64_t a, int64_t b) const;

  QuantLinear l_{};
  QuantRows x_{};
  const Kernels* kernels_ = nullptr;
  Form form_ = Form::int8;
  int64_t floats_ = 0, normed_ = 0, prepared_ = 0, first_[4] = {}, grain_ = 1;
  const float* given_ = nullptr;
  float* to_ = nullptr;
};

}  // namespace mcl
