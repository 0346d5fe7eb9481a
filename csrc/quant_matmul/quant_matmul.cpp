#include "quant_matmul/quant_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool/pool.h"
#include "pool/scratch.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

constexpr int64_t kBytesPerTask = int64_t{32} << 10;  // weights that a task of the `rows` form reads at least

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// f(r0, r1, o0, o1) over a grid of parts, several per thread; parts of the outputs are whole panels.
template <class F>
void grid(const QuantMatmul& s, int64_t panel, F&& f) {
  const int64_t panels = (s.outs + panel - 1) / panel, most = threads() == 1 ? 1 : 4 * threads();
  const int64_t columns = std::min(panels, most);
  const int64_t parts = std::max<int64_t>(1, std::min(most / columns, s.rows / 64));
  auto body = [&](int64_t i) {
    const int64_t r = i / columns, c = i % columns;
    f(s.rows * r / parts, s.rows * (r + 1) / parts, panels * c / columns * panel,
      std::min(s.outs, panels * (c + 1) / columns * panel));
  };
  parallel(parts * columns, body);
}

void tile(const QuantMatmul& s, const Kernels& run) {
  grid(s, 2 * run.width, [&](int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
    run.quant_tile(s, r0, r1, o0, o1, scratch<Scratch::weight_panel>((kTilePanels * kTileDepth + 64) * 2 * run.width));
  });
}

// Make all rows ready with `prepare`; false where one of them holds NaN or infinity.
template <class F>
bool ready(int64_t rows, F&& prepare) {
  std::atomic<bool> finite{true};
  parallel_ranges(rows, 4, [&](int64_t a, int64_t b) {
    for (int64_t r = a; r < b; ++r)
      if (!prepare(r)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load(std::memory_order_relaxed);
}

// f(o0, o1) over parts of the outputs, four at a time.
template <class F>
void by_fours(const QuantMatmul& s, F&& f) {
  const int64_t grain = kBytesPerTask / (16 * s.words());
  parallel_ranges((s.outs + 3) / 4, std::max<int64_t>(1, grain),
                  [&](int64_t a, int64_t b) { f(4 * a, std::min(s.outs, 4 * b)); });
}

bool few(const QuantMatmul& s, const Kernels& run) {
  QuantRows x{};
  x.value_stride = round_up(s.words(), run.width) * (32 / s.bits);
  x.group_stride = round_up(s.groups(), 16);
  x.values = scratch<Scratch::prepared_rows>(s.rows * (x.value_stride + x.group_stride));
  x.sums = x.values + s.rows * x.value_stride;
  if (!ready(s.rows, [&](int64_t r) { return run.quant_rows_prepare(s, x, r); })) return false;
  by_fours(s, [&](int64_t o0, int64_t o1) { run.quant_rows(s, x, o0, o1); });
  return true;
}

bool int8(const QuantMatmul& s, const Kernels& run) {
  QuantRows x{};
  x.group_stride = round_up(s.groups(), 16);
  const int64_t byte_floats = round_up(s.rows * s.terms * s.depth, 64) / 4;
  const int64_t lanes = s.rows == 1 ? s.terms * round_up(s.words(), run.width) * (8 / s.bits) : 0;
  x.step = scratch<Scratch::prepared_rows>(2 * s.rows * x.group_stride + byte_floats + lanes);
  x.sums = x.step + s.rows * x.group_stride;
  x.bytes = reinterpret_cast<int8_t*>(x.sums + s.rows * x.group_stride);
  if (lanes) x.lanes = reinterpret_cast<int32_t*>(x.bytes) + byte_floats;
  if (!ready(s.rows, [&](int64_t r) { return run.quant_int8_prepare(s, x, r); })) return false;
  if (lanes) {
    by_fours(s, [&](int64_t o0, int64_t o1) { run.quant_int8_row(s, x, o0, o1); });
    return true;
  }
  const int64_t floats = (kInt8Depth / 4 + 2 * kInt8Depth / 32 + 64) * 2 * run.width;
  grid(s, 2 * run.width, [&](int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
    run.quant_int8(s, x, r0, r1, o0, o1, scratch<Scratch::weight_panel>(floats));
  });
  return true;
}

}  // namespace

void quant_matmul(const QuantMatmul& s) {
  if (s.rows == 0 || s.outs == 0) return;
  if (s.depth == 0) {
    std::memset(s.y, 0, static_cast<size_t>(s.rows * s.outs) * sizeof(float));
    return;
  }
  const Kernels& run = kernels();
  if (s.terms > 0 && s.scale != Scale::e8m0 && int8(s, run)) return;
  if (s.terms == 0 && s.rows <= kFewRows && few(s, run)) return;
  tile(s, run);  // also where the sums of other forms would not treat NaN and infinity as a matrix product does
}

}  // namespace mcl
