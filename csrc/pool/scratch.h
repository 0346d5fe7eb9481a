// Memory that a thread keeps from call to call, so that a layer does not map and unmap it.
#pragma once
#include <cstdint>
#include <memory>

#include "pool/out_of_memory.h"

namespace mcl {

// Each is memory of its own: what a matmul prepared must outlive the panels that its tasks unpack.
enum class Scratch { attention, attention_tile, prepared_rows, weight_panel, normed_rows, up_rows, decoder_block };

// At least so many floats, aligned to a cache line, until the calling thread asks for WHICH again. Values are undefined.
// Throws OutOfMemory.
template <Scratch WHICH>
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local int64_t size = 0;
  if (floats > size) {
    buffer.reset();  // first, so that the old and the new one never exist at once
    size = 0;
    buffer.reset(new (std::nothrow) float[static_cast<size_t>(floats) + 16]);
    if (!buffer) throw OutOfMemory();
    size = floats;
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) / 64 * 64);
}

}  // namespace mcl
