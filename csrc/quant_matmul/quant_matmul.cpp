#include "quant_matmul/quant_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "pool/pool.h"
#include "pool/scratch.h"
#include "quant_matmul/rows_product.h"
#include "simd/kernels.h"

namespace mcl {
namespace {

// Tasks of one product per thread: a core taken away delays one of them. Integer panels share nothing, so there may be more.
constexpr int64_t kFloatTasks = 3, kIntegerTasks = 8;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What is left to do with y of rows [r0, r1), outputs [o0, o1), once it is there.
void finish(const QuantLinear& l, const Kernels& run, int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
  const int64_t outs = l.part[0].outs;
  for (int64_t r = r0; r < r1; ++r) {
    float* y = l.part[0].y + r * outs;
    if (l.gated) run.swiglu(y + o0, l.part[1].y + r * outs + o0, y + o0, o1 - o0);
    if (l.residual)
      for (int64_t o = o0; o < o1; ++o) y[o] += l.residual[r * outs + o];
  }
}

// f(part, r0, r1, o0, o1) over all rows and outputs, so many tasks per thread. Outputs are cut at multiples of `unit`,
// rows at multiples of `row_unit`.
template <class F>
void cut(const QuantLinear& l, const Kernels& run, int64_t tasks, int64_t unit, int64_t row_unit, F&& f) {
  const int n = l.gated ? 1 : l.n;
  int64_t first[4] = {};
  for (int p = 0; p < n; ++p) first[p + 1] = first[p] + (l.part[p].outs + unit - 1) / unit;
  const int64_t most = threads() == 1 ? 1 : tasks * threads(), rows = l.part[0].rows;
  const int64_t columns = std::clamp<int64_t>(first[n], 1, most);
  const int64_t blocks = (rows + row_unit - 1) / row_unit;
  const int64_t bands = std::clamp<int64_t>(std::min(most / columns, rows / 64), 1, blocks);
  auto body = [&](int64_t i) {
    const int64_t band = i / columns, c = i % columns;
    const int64_t r0 = blocks * band / bands * row_unit, r1 = std::min(rows, blocks * (band + 1) / bands * row_unit);
    const int64_t u0 = first[n] * c / columns, u1 = first[n] * (c + 1) / columns;
    for (int p = 0; p < n; ++p) {
      const int64_t a = std::max(u0, first[p]), b = std::min(u1, first[p + 1]);
      if (a >= b) continue;
      const int64_t o0 = (a - first[p]) * unit, o1 = std::min(l.part[p].outs, (b - first[p]) * unit);
      f(l.part[p], r0, r1, o0, o1);
      if (l.gated) f(l.part[1], r0, r1, o0, o1);
      finish(l, run, r0, r1, o0, o1);
    }
  };
  parallel(bands * columns, body);
}

int64_t tile_floats(const Kernels& run) { return (kTilePanels * kTileDepth + 64) * 2 * run.width; }

void float_tile(const QuantLinear& l, const Kernels& run) {
  cut(l, run, kFloatTasks, 2 * run.width, 1, [&](const QuantMatmul& s, int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
    run.quant_tile(s, r0, r1, o0, o1, scratch<Scratch::weight_panel>(tile_floats(run)));
  });
}

void int8_tile(const QuantLinear& l, const Kernels& run) {
  const QuantMatmul& s = l.part[0];
  constexpr int64_t block = kInt8Rows;
  const int64_t blocks = (s.rows + block - 1) / block, panel = (run.width == 16 ? 4 : 2) * run.width;
  QuantRows x{};
  const int64_t of = blocks * block * s.groups();
  x.step = scratch<Scratch::prepared_rows>(3 * of + blocks * block * s.terms * s.depth / 4);
  x.sums = x.step + of;
  x.cross = reinterpret_cast<uint32_t*>(x.sums + of);
  x.bytes = reinterpret_cast<int8_t*>(x.cross + of);
  std::vector<uint8_t> wild(static_cast<size_t>(blocks));  // bits of the rows of a block that are not finite
  std::atomic<bool> any{false};
  const auto prepare = [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i)
      if ((wild[static_cast<size_t>(i)] = static_cast<uint8_t>(run.quant_int8_tile_prepare(s, x, i)))) any.store(true, std::memory_order_relaxed);
  };
  if (blocks == 1) prepare(0, 1);
  else parallel_ranges(blocks, 1, prepare);
  const bool some = any.load(std::memory_order_relaxed);
  const int64_t floats = kInt8Scratch * panel;
  cut(l, run, kIntegerTasks, panel, block, [&](const QuantMatmul& p, int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
    const int64_t b0 = r0 / block, b1 = (r1 + block - 1) / block;
    const int64_t results = round_up(o1 - o0, panel) * (b1 - b0) * block;
    run.quant_int8_tile(p, x, b0, b1, o0, o1, scratch<Scratch::weight_panel>(floats + results));
    for (int64_t r = r0; some && r < r1; ++r)  // integers would not treat NaN and infinity as a matrix product does
      if (wild[static_cast<size_t>(r / block)] >> r % block & 1)
        run.quant_tile(p, r, r + 1, o0, o1, scratch<Scratch::weight_panel>(tile_floats(run)));
  });
}

struct Alone : StageWork {
  RowsProduct product;
  explicit Alone(RowsProduct&& p) : product(p) {}
  int64_t begin(int) override { return product.begin(); }
  void run(int, int64_t a, int64_t b) override { product.run(a, b); }
  int64_t grain(int) const override { return product.grain(); }
};

}  // namespace

void quant_linear(QuantLinear l) {
  const QuantMatmul& s = l.part[0];
  const Kernels& run = kernels();
  if (s.rows == 0) return;
  if (s.depth == 0) {
    for (int p = 0; p < l.n; ++p) std::memset(l.part[p].y, 0, static_cast<size_t>(s.rows * l.part[p].outs) * sizeof(float));
    finish(l, run, 0, s.rows, 0, s.outs);
    return;
  }
  if (RowsProduct::does(l)) {
    Alone work{RowsProduct(l)};
    work.product.use(scratch<Scratch::prepared_rows>(work.product.floats()));
    run_stages(1, work);
    return;
  }
  if (l.norm) {
    float* to = scratch<Scratch::normed_rows>(s.rows * s.depth);
    const float* from = s.x;
    parallel_ranges(s.rows, 4, [&](int64_t a, int64_t b) {
      run.rms_norm(from + a * s.depth, l.norm, to + a * s.depth, b - a, s.depth, l.eps);
    });
    for (int p = 0; p < l.n; ++p) l.part[p].x = to;
  }
  if (l.gated) l.part[1].y = scratch<Scratch::up_rows>(s.rows * s.outs);
  if (s.terms > 0 && s.scale != Scale::e8m0) int8_tile(l, run);
  else float_tile(l, run);
}

}  // namespace mcl
