// The product of a few rows of x as a stage: see pool/stages.h.
#pragma once
#include "pool/stages.h"
#include "quant_matmul/quant_matmul.h"

namespace mcl {

struct Kernels;

class RowsProduct {
 public:
  // Whether it is the form for l.
  static bool does(const QuantLinear& l) {
    const QuantMatmul& s = l.part[0];
    return !l.prompt && s.rows <= kFewRows && (s.terms == 0 || s.scale != Scale::e8m0);
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
  // outputs.
  int64_t units_of(int part) const;
  int parts() const { return l_.gated ? 1 : l_.n; }
  bool int8() const { return l_.part[0].terms > 0; }
  void finish(int part, int64_t a, int64_t b) const;
  void wild_rows(const QuantMatmul& s, int64_t o0, int64_t o1) const;

  QuantLinear l_{};
  QuantRows x_{};
  const Kernels* kernels_ = nullptr;
  uint32_t wild_ = 0;  // rows that are not finite
  int64_t floats_ = 0, normed_ = 0, prepared_ = 0, first_[4] = {}, grain_ = 1;
  const float* given_ = nullptr;
  float* to_ = nullptr;
};

}  // namespace mcl
