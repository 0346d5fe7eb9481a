// What the test programs share: random numbers, buffers that end where their allocation ends, and a count of what is off.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace check {

inline std::mt19937& engine() {
  static std::mt19937 one(7);
  return one;
}

// n normal floats, in memory that ends with the last of them, so that a sanitiser sees one read too many.
inline std::vector<float> normal(int64_t n, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = draw(engine());
  x.shrink_to_fit();
  return x;
}

// Address space of which only the pages that are written take memory: for offsets beyond 32 bits.
class Expanse {
 public:
  explicit Expanse(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    at_ = at == MAP_FAILED ? nullptr : static_cast<char*>(at);
  }
  Expanse(const Expanse&) = delete;
  ~Expanse() {
    if (at_) munmap(at_, bytes_);
  }
  char* data() const { return at_; }

 private:
  size_t bytes_;
  char* at_;
};

inline uint32_t bits(uint32_t below) { return static_cast<uint32_t>(engine()() % below); }

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float x) {  // rounds to nearest, ties to even; what is below the normal halves becomes 0
  if (std::fabs(x) < 6.2e-5f) return 0;
  int exponent;
  const float m = std::frexp(std::fabs(x), &exponent);  // m in [0.5, 1)
  const long fraction = std::lrint(std::ldexp(m, 11));  // 1024 … 2048
  const int biased = exponent + 14;
  const long word = (static_cast<long>(biased) << 10) + (fraction - 1024);
  return static_cast<uint16_t>(word | (x < 0 ? 0x8000 : 0));
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t word = static_cast<uint32_t>(b) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

inline int& wrong() {
  static int count = 0;
  return count;
}
inline int& compared() {
  static int count = 0;
  return count;
}

// NaN agrees with NaN, an infinity with itself, a finite value with what lies within `within`.
inline void near(const char* what, int64_t at, double expected, double got, double within) {
  ++compared();
  const bool same = std::isnan(expected) ? std::isnan(got)
                    : std::isinf(expected) ? got == expected
                                           : std::fabs(expected - got) <= within;
  if (!same && ++wrong() <= 20)
    std::printf("%s [%lld]: %.9g instead of %.9g (within %.3g)\n", what, static_cast<long long>(at), got, expected, within);
}

inline int result(const char* program, const char* isa, int threads) {
  std::printf("%s, %s, %d threads: %d values compared, %d off\n", program, isa, threads, compared(), wrong());
  return wrong() != 0 || compared() == 0;
}

}  // namespace check
