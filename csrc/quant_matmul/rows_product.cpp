#include "quant_matmul/rows_product.h"

#include <algorithm>

#include "pool/scratch.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kBytesAtOnce = int64_t{48} << 10;   // of weights that a thread takes at a time
constexpr int64_t kBytesFetched = int64_t{256} << 10;  // at most, of the next product's: a second cache holds 1 MB or more

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

RowsProduct::RowsProduct(const QuantLinear& l) : l_(l), kernels_(&kernels()) {
  const QuantMatmul& s = l.part[0];
  x_.group_stride = round_up(s.groups(), 16);
  const int64_t bytes = round_up(s.words(), kernels_->width) * (32 / s.bits);
  if (s.terms) x_.byte_stride = s.terms * (bytes + 64);  // rows and terms do not lie whole pages apart
  else x_.value_stride = bytes;
  normed_ = l.norm ? round_up(s.rows * s.depth, 16) : 0;
  prepared_ = s.rows * (2 * x_.group_stride + round_up(x_.byte_stride / 4 + x_.value_stride, 16));
  floats_ = normed_ + prepared_ + (l.gated ? round_up(s.rows * s.outs, 16) : 0);
}

void RowsProduct::use(float* memory) {
  const QuantMatmul& s = l_.part[0];
  given_ = s.x;
  if (l_.norm) {
    to_ = memory;
    for (int p = 0; p < l_.n; ++p) l_.part[p].x = to_;
  }
  x_.step = memory + normed_;
  x_.sums = x_.step + s.rows * x_.group_stride;
  x_.values = x_.sums + s.rows * x_.group_stride;
  x_.bytes = reinterpret_cast<int8_t*>(x_.values);
  if (l_.gated) l_.part[1].y = memory + normed_ + prepared_;
}

int64_t RowsProduct::units_of(int part) const {
  const int64_t outs = l_.part[part].outs;
  if (int8()) return l_.gated ? outs : (outs + 1) / 2;
  return (outs + 3) / 4;
}

int64_t RowsProduct::begin() {
  const QuantMatmul& s = l_.part[0];
  if (l_.norm) kernels_->rms_norm(given_, l_.norm, to_, s.rows, s.depth, l_.eps);
  if (s.terms == 0) x_.sums = x_.step;
  wild_ = 0;
  for (int64_t r = 0; r < s.rows; ++r)
    if (!(int8() ? kernels_->quant_int8_rows_prepare : kernels_->quant_rows_prepare)(s, x_, r)) wild_ |= 1u << r;
  for (int p = 0; p < parts(); ++p) first_[p + 1] = first_[p] + units_of(p);
  const int64_t row_bytes = s.words() * 4 + 2 * s.groups() * (s.scale == Scale::float32 ? 4 : 2);
  grain_ = std::max<int64_t>(1, kBytesAtOnce / (row_bytes * (int8() ? 2 : l_.gated ? 8 : 4)));
  return first_[parts()];
}

// Rows of x that are not finite, as a matrix product treats them: outputs [o0, o1).
void RowsProduct::wild_rows(const QuantMatmul& s, int64_t o0, int64_t o1) const {
  for (int64_t r = 0; r < s.rows; ++r)
    if (wild_ >> r & 1)
      kernels_->quant_tile(s, r, r + 1, o0, o1,
                           scratch<Scratch::weight_panel>((kTilePanels * kTileDepth + 64) * 2 * kernels_->width));
}

// What is left to do with y of outputs [a, b) once it is there.
void RowsProduct::finish(int part, int64_t a, int64_t b) const {
  const QuantMatmul& s = l_.part[part];
  for (int64_t r = 0; r < s.rows; ++r) {
    float* y = s.y + r * s.outs;
    if (l_.gated) kernels_->swiglu(y + a, l_.part[1].y + r * s.outs + a, y + a, b - a);
    if (l_.residual)
      for (int64_t o = a; o < b; ++o) y[o] += l_.residual[r * s.outs + o];
  }
}

void RowsProduct::run(int64_t from, int64_t to) {
  for (int p = 0; p < parts(); ++p) {
    const int64_t a = std::max(from, first_[p]) - first_[p], b = std::min(to, first_[p + 1]) - first_[p];
    if (a >= b) continue;
    const QuantMatmul& s = l_.part[p];
    if (int8()) {
      const int64_t half = l_.gated ? 0 : (s.outs + 1) / 2;
      kernels_->quant_int8_rows(s, l_.gated ? l_.part[1] : s, x_, a, half + a, b - a);
      if (wild_) wild_rows(s, a, b);
      if (wild_ && l_.gated) wild_rows(l_.part[1], a, b);
      if (wild_ && !l_.gated && half + a < s.outs) wild_rows(s, half + a, std::min(half + b, s.outs));
      finish(p, a, b);
      if (!l_.gated && half + a < s.outs) finish(p, half + a, std::min(half + b, s.outs));
      continue;
    }
    const int64_t o0 = a * 4, o1 = std::min(b * 4, s.outs);
    for (int i = p; i <= (l_.gated ? 1 : p); ++i) {
      kernels_->quant_rows(l_.part[i], x_, o0, o1);
      if (wild_) wild_rows(l_.part[i], o0, o1);
    }
    finish(p, o0, o1);
  }
}

void RowsProduct::fetch(int me, int threads, const Over& over, int64_t& done) const {
  int64_t units = 0;
  for (int p = 0; p < parts(); ++p) units += units_of(p);
  int64_t unit = units * me / threads;
  for (int p = 0; p < parts(); ++p) {
    const QuantMatmul& s = l_.part[p];
    const int64_t n = units_of(p), step = int8() ? 1 : 4;
    if (unit >= n) {
      unit -= n;
      continue;
    }
    const char* at[2] = {reinterpret_cast<const char*>(s.weight + unit * step * s.words()), nullptr};
    if (l_.gated) at[1] = reinterpret_cast<const char*>(l_.part[1].weight + unit * step * s.words());
    else if (int8()) at[1] = reinterpret_cast<const char*>(s.weight + std::min(s.outs - 1, n + unit) * s.words());
    const int64_t most = std::min((n - unit) * step * s.words() * 4, at[1] ? kBytesFetched / 2 : kBytesFetched);
    for (; done < most && !over; done += 512)
      for (int64_t b = done; b < done + 512; b += 64) {
        __builtin_prefetch(at[0] + b, 0, 2);
        if (at[1]) __builtin_prefetch(at[1] + b, 0, 2);
      }
    return;
  }
}

}  // namespace mcl
