// Types of scales and biases.
#pragma once
#include "binding/native.h"
#include "quant_matmul/quant_matmul.h"

namespace mcl {

inline bool is_scale(mx::Dtype t) { return t == mx::float32 || t == mx::float16 || t == mx::bfloat16; }

// t is one of them.
inline Scale scale_of(mx::Dtype t) {
  return t == mx::float32 ? Scale::float32 : t == mx::float16 ? Scale::float16 : Scale::bfloat16;
}

}  // namespace mcl
