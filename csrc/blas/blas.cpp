// The three BLAS functions that MLX's CPU backend calls. Loaded with RTLD_GLOBAL before MLX, they win over the reference
// BLAS that its wheel bundles. Each product is cut into parts that run on the shared pool; OpenBLAS does a part on one
// thread, so its own threads never wait (or spin) for each other. OpenBLAS is loaded at the first product.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "pool/pool.h"

namespace {

constexpr int kRowMajor = 101, kNoTrans = 111;  // of CBLAS; any other order is column-major, any other value transposed

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
using Dgemm = void (*)(int, int, int, int, int, int, double, const double*, int, const double*, int, double, double*, int);
using Cgemm = void (*)(int, int, int, int, int, int, const void*, const void*, int, const void*, int, const void*, void*, int);

std::string path_;
Sgemm sgemm_ = nullptr;
Dgemm dgemm_ = nullptr;
Cgemm cgemm_ = nullptr;

void load() {
  static std::once_flag once;
  std::call_once(once, [] {
    void* lib = dlopen(path_.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (lib) {
      sgemm_ = reinterpret_cast<Sgemm>(dlsym(lib, "scipy_cblas_sgemm"));
      dgemm_ = reinterpret_cast<Dgemm>(dlsym(lib, "scipy_cblas_dgemm"));
      cgemm_ = reinterpret_cast<Cgemm>(dlsym(lib, "scipy_cblas_cgemm"));
      auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(lib, "scipy_openblas_set_num_threads"));
      if (set_threads) set_threads(1);
    }
    if (!sgemm_ || !dgemm_ || !cgemm_) {
      const char* why = dlerror();
      std::fprintf(stderr, "mlx_codellama_cpu: cannot use OpenBLAS at %s: %s\n", path_.c_str(),
                   why ? why : "it lacks the scipy_cblas_*gemm functions");
      std::abort();  // MLX has no way to report an error from a BLAS call
    }
  });
}

// Run gemm(m0, m1, n0, n1) over a grid of parts of the m×n result, about as square as the shape allows.
template <class F>
void split(int64_t m, int64_t n, int64_t k, F&& gemm) {
  const int64_t t = mcl::threads();
  if (t == 1 || m * n * k < 64 * 64 * 64) return gemm(0, m, 0, n);
  const int64_t parts = m * n * k > (int64_t{1} << 27) ? 2 * t : t;
  int64_t rows = 1, columns = 1;  // halve the longer side until there are enough parts
  while (rows * columns < parts) {
    if (m / rows >= n / columns && m / rows >= 32) ++rows;
    else if (n / columns >= 32) ++columns;
    else if (m / rows >= 32) ++rows;
    else break;
  }
  const int64_t unit_m = m / rows >= 64 ? 16 : 1, unit_n = n / columns >= 64 ? 16 : 1;
  auto cut = [](int64_t total, int64_t i, int64_t parts, int64_t unit) {
    return i == parts ? total : total * i / parts / unit * unit;
  };
  auto body = [&](int64_t i) {
    const int64_t r = i / columns, c = i % columns;
    const int64_t m0 = cut(m, r, rows, unit_m), m1 = cut(m, r + 1, rows, unit_m);
    const int64_t n0 = cut(n, c, columns, unit_n), n1 = cut(n, c + 1, columns, unit_n);
    if (m1 > m0 && n1 > n0) gemm(m0, m1, n0, n1);
  };
  mcl::parallel(rows * columns, body);
}

template <class T, class Gemm, class Scalar>
void run(Gemm gemm, int order, int ta, int tb, int m, int n, int k, Scalar alpha, const void* a, int lda, const void* b,
         int ldb, Scalar beta, void* c, int ldc) {
  const bool row_major = order == kRowMajor;
  // Offsets of row i of op(A), column j of op(B) and element (i, j) of C, in elements.
  const int64_t step_a = (ta == kNoTrans) == row_major ? lda : 1;
  const int64_t step_b = (tb == kNoTrans) == row_major ? 1 : ldb;
  const int64_t step_ci = row_major ? ldc : 1, step_cj = row_major ? 1 : ldc;
  split(m, n, k, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    gemm(order, ta, tb, static_cast<int>(m1 - m0), static_cast<int>(n1 - n0), k, alpha,
         static_cast<const T*>(a) + m0 * step_a, lda, static_cast<const T*>(b) + n0 * step_b, ldb, beta,
         static_cast<T*>(c) + m0 * step_ci + n0 * step_cj, ldc);
  });
}

struct Complex {
  float re, im;
};

}  // namespace

extern "C" {

// Where OpenBLAS is; call once before the first product.
MCL_API void mcl_blas_use(const char* path) { path_ = path; }

MCL_API void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda,
                         const float* b, int ldb, float beta, float* c, int ldc) {
  load();
  run<float>(sgemm_, order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

MCL_API void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double* a, int lda,
                         const double* b, int ldb, double beta, double* c, int ldc) {
  load();
  run<double>(dgemm_, order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

MCL_API void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int lda,
                         const void* b, int ldb, const void* beta, void* c, int ldc) {
  load();
  run<Complex>(cgemm_, order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
