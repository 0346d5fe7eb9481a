// MLX's CPU allocator returns null where the system has no memory, and MLX's operations write through it. This library is
// loaded before MLX with its symbols global (as its BLAS is), so every caller of `mlx::core::allocator::allocator()`, MLX's
// own operations included, finds the one below: the same allocator, which throws std::bad_alloc instead. MLX and the kernels
// pass exceptions on to whoever asked for the result.
#include "mlx/allocator.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

#include "mlx/version.h"
#include "pool/out_of_memory.h"

namespace {

namespace mx = mlx::core;

// MLX counts what it could not allocate as held for ever. So larger buffers are tried first, and given back.
constexpr size_t kTriedFirst = size_t{1} << 20;

class Checked : public mx::allocator::Allocator {
 public:
  explicit Checked(Allocator& of) : of_(of) {}
  mx::allocator::Buffer malloc(size_t size) override {
    if (size > SIZE_MAX / 2) throw mcl::OutOfMemory();
    if (size >= kTriedFirst) {
      void* tried = std::malloc(size + sizeof(size_t));
      if (!tried) throw mcl::OutOfMemory();
      std::free(tried);
    }
    const mx::allocator::Buffer buffer = of_.malloc(size);
    if (!buffer.ptr()) throw mcl::OutOfMemory();
    return buffer;
  }
  void free(mx::allocator::Buffer buffer) override { of_.free(buffer); }
  size_t size(mx::allocator::Buffer buffer) const override { return of_.size(buffer); }
  mx::allocator::Buffer make_buffer(void* ptr, size_t size) override { return of_.make_buffer(ptr, size); }
  void release(mx::allocator::Buffer buffer) override { of_.release(buffer); }

 private:
  Allocator& of_;
};

// MLX's own, or the checked one around it. Another version of MLX may have another interface: its own, unchecked.
mx::allocator::Allocator& choose() {
  using Get = mx::allocator::Allocator& (*)();
  using Version = const char* (*)();
  void* lib = dlopen("libmlx.so", RTLD_LAZY | RTLD_NOLOAD);
  const auto get = lib ? reinterpret_cast<Get>(dlsym(lib, "_ZN3mlx4core9allocator9allocatorEv")) : nullptr;
  const auto version = lib ? reinterpret_cast<Version>(dlsym(lib, "_ZN3mlx4core7versionEv")) : nullptr;
  if (!get) throw std::runtime_error("mlx_codellama_cpu: libmlx.so with MLX's allocator is not loaded");
  char built[32];
  std::snprintf(built, sizeof built, "%d.%d.%d", MLX_VERSION_MAJOR, MLX_VERSION_MINOR, MLX_VERSION_PATCH);
  if (!version || std::strcmp(version(), built) != 0) return get();
  return *new Checked(get());  // never freed: arrays outlive static objects
}

}  // namespace

namespace mlx::core::allocator {

MLX_API Allocator& allocator() {
  static Allocator& chosen = choose();
  return chosen;
}

}  // namespace mlx::core::allocator
