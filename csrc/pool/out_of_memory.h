// The exception for memory that the system does not give. Its text is how Python tells it from other errors: MLX passes
// on from its own threads only what an exception says.
#pragma once
#include <new>

namespace mcl {

class OutOfMemory : public std::bad_alloc {
 public:
  const char* what() const noexcept override { return "mlx_codellama_cpu: out of memory"; }
};

}  // namespace mcl
