// The three BLAS functions that MLX's CPU backend calls. Loaded with RTLD_GLOBAL before MLX, they win over the reference
// BLAS that its wheel bundles. Each product is cut into parts that run on the shared pool; OpenBLAS does a part on one
// thread, so its own threads never wait (or spin) for each other. OpenBLAS is loaded at the first product.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <complex>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>

#include "pool/pool.h"

namespace {

// Of CBLAS: any other order is column-major, any other value transposed.
constexpr int kRowMajor = 101, kNoTrans = 111, kConjTrans = 113;

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
using Dgemm = void (*)(int, int, int, int, int, int, double, const double*, int, const double*, int, double, double*, int);
using Cgemm = void (*)(int, int, int, int, int, int, const void*, const void*, int, const void*, int, const void*, void*, int);

std::string path_;
Sgemm sgemm_ = nullptr;
Dgemm dgemm_ = nullptr;
Cgemm cgemm_ = nullptr;
std::string problem_;  // why OpenBLAS cannot be used, or empty

// OpenBLAS ends the process where it gets no memory (`ulimit -v`), so the room is tried first: for the library with a buffer
// and a stack for each of the threads that it starts as it is loaded, and for the buffer of each thread that comes to it.
constexpr size_t kBuffer = size_t{48} << 20, kLibrary = size_t{64} << 20;

bool room(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return false;
  munmap(at, bytes);
  return true;
}

// Run f, a call of OpenBLAS; false where this thread has no buffer yet and there is no room for one.
template <class F>
bool with_buffer(F&& f) {
  thread_local bool has_one = false;
  static std::mutex first;
  if (has_one) return f(), true;
  std::lock_guard<std::mutex> hold(first);
  if (!room(kBuffer)) return false;
  f();
  return has_one = true;
}

void load() {
  static std::once_flag once;
  std::call_once(once, [] {
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const bool fits = room(kLibrary + static_cast<size_t>(cores > 0 ? cores : 1) * kBuffer);
    void* lib = fits ? dlopen(path_.c_str(), RTLD_LAZY | RTLD_LOCAL) : nullptr;
    if (lib) {
      sgemm_ = reinterpret_cast<Sgemm>(dlsym(lib, "scipy_cblas_sgemm"));
      dgemm_ = reinterpret_cast<Dgemm>(dlsym(lib, "scipy_cblas_dgemm"));
      cgemm_ = reinterpret_cast<Cgemm>(dlsym(lib, "scipy_cblas_cgemm"));
      auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(lib, "scipy_openblas_set_num_threads"));
      if (set_threads) set_threads(1);
    }
    if (sgemm_ && dgemm_ && cgemm_) return;
    const char* why = lib ? nullptr : fits ? dlerror() : "this process may not hold the memory that it takes";
    problem_ = path_ + (why ? std::string(": ") + why : " lacks the functions scipy_cblas_*gemm");
    sgemm_ = nullptr, dgemm_ = nullptr, cgemm_ = nullptr;
    std::fprintf(stderr, "mlx_codellama_cpu: OpenBLAS cannot be used, so products of floats are slow: %s\n", problem_.c_str());
  });
}

template <class T>
struct Wide {
  using type = double;
  static T conjugate(T x) { return x; }
};
template <class T>
struct Wide<std::complex<T>> {
  using type = std::complex<double>;
  static std::complex<T> conjugate(std::complex<T> x) { return std::conj(x); }
};

// An operand: element (i, j) lies at i * row + j * column.
template <class T>
struct Operand {
  const T* data;
  int64_t row, column;
  bool conjugate;
  T at(int64_t i, int64_t j) const {
    const T x = data[i * row + j * column];
    return conjugate ? Wide<T>::conjugate(x) : x;
  }
};

// Without OpenBLAS: C = alpha A B + beta C, plainly. C is not read where beta is 0.
template <class T>
void plain(int64_t m, int64_t n, int64_t k, T alpha, Operand<T> a, Operand<T> b, T beta, T* c, int64_t row, int64_t column) {
  using Sum = typename Wide<T>::type;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Sum total{};
      for (int64_t l = 0; l < k; ++l) total += Sum(a.at(i, l)) * Sum(b.at(l, j));
      T& to = c[i * row + j * column];
      to = static_cast<T>(Sum(alpha) * total) + (beta == T(0) ? T(0) : beta * to);
    }
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

template <class T>
T value(T x) {
  return x;
}
template <class T>
T value(const void* x) {
  return *static_cast<const T*>(x);
}

template <class T, class Gemm, class Scalar>
void run(Gemm gemm, int order, int ta, int tb, int m, int n, int k, Scalar alpha, const void* a, int lda, const void* b,
         int ldb, Scalar beta, void* c, int ldc) {
  const bool row_major = order == kRowMajor;
  // From a row, or a column, of op(A), op(B) and C to the next, in elements.
  const auto strides = [&](int transposed, int64_t ld) {
    const bool along = (transposed == kNoTrans) == row_major;
    return std::pair<int64_t, int64_t>(along ? ld : 1, along ? 1 : ld);
  };
  const auto [a_row, a_column] = strides(ta, lda);
  const auto [b_row, b_column] = strides(tb, ldb);
  const int64_t c_row = row_major ? ldc : 1, c_column = row_major ? 1 : ldc;
  const T *from_a = static_cast<const T*>(a), *from_b = static_cast<const T*>(b);
  T* to = static_cast<T*>(c);
  split(m, n, k, [&, a_row = a_row, a_column = a_column, b_row = b_row, b_column = b_column](int64_t m0, int64_t m1,
                                                                                             int64_t n0, int64_t n1) {
    const T *its_a = from_a + m0 * a_row, *its_b = from_b + n0 * b_column;
    T* its_c = to + m0 * c_row + n0 * c_column;
    const bool done = gemm && with_buffer([&] {
      gemm(order, ta, tb, static_cast<int>(m1 - m0), static_cast<int>(n1 - n0), k, alpha, its_a, lda, its_b, ldb, beta,
           its_c, ldc);
    });
    if (!done)
      plain<T>(m1 - m0, n1 - n0, k, value<T>(alpha), {its_a, a_row, a_column, ta == kConjTrans},
               {its_b, b_row, b_column, tb == kConjTrans}, value<T>(beta), its_c, c_row, c_column);
  });
}

}  // namespace

extern "C" {

// Where OpenBLAS is; call once before the first product.
MCL_API void mcl_blas_use(const char* path) { path_ = path; }

// Why OpenBLAS cannot be used; empty where it can. Loads it.
MCL_API const char* mcl_blas_problem() {
  load();
  return problem_.c_str();
}

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
  run<std::complex<float>>(cgemm_, order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
