#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "simd/kernels.h"

namespace mcl {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neondot;
#endif

namespace {

const Kernels* choose() {
  const Kernels* best = &kernels_portable;
  const char* wanted = std::getenv("MLX_CODELLAMA_ISA");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const Kernels* known[] = {&kernels_portable, avx2 ? &kernels_avx2 : nullptr, avx512 ? &kernels_avx512 : nullptr,
                            vnni ? &kernels_avx512vnni : nullptr};
#elif defined(__aarch64__)
  const Kernels* known[] = {&kernels_portable, getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &kernels_neondot : nullptr};
#else
  const Kernels* known[] = {&kernels_portable};
#endif
  for (const Kernels* k : known)
    if (k) best = k;
  if (wanted && *wanted) {
    for (const Kernels* k : known)
      if (k && std::strcmp(k->name, wanted) == 0) return k;
    std::fprintf(stderr, "mlx_codellama_cpu: MLX_CODELLAMA_ISA=%s is not available here; using %s\n", wanted, best->name);
  }
  return best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace mcl
