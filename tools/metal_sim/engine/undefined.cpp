// Checked mode: kernels carry clang's tests for undefined behaviour of C++ as well; their handlers end here. The first
// bytes of each handler's data, a place in the source, are not needed: the return address says the same.
#include "engine.h"

#include <stdio.h>

#define HANDLER(NAME, ARGUMENTS, ...) \
  extern "C" void __ubsan_handle_##NAME ARGUMENTS { find(__builtin_return_address(0), __VA_ARGS__); }

struct TypeMismatch {
  struct {
    const char* file;
    uint32_t line, column;
  } place;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  const unsigned long alignment = 1ul << data->log_alignment;
  if (pointer & (alignment - 1))
    find(__builtin_return_address(0), "misaligned: a type of alignment %lu, %lu bytes past such an address", alignment,
         (unsigned long)(pointer & (alignment - 1)));
}
HANDLER(out_of_bounds, (void*, intptr_t index), "out of bounds of an array: index %ld", (long)index)
HANDLER(shift_out_of_bounds, (void*, intptr_t, intptr_t by), "shift by %ld bits", (long)by)
HANDLER(divrem_overflow, (void*, intptr_t, intptr_t), "integer division by zero, or of the least number by -1")
HANDLER(add_overflow, (void*, intptr_t, intptr_t), "signed integer overflow in an addition")
HANDLER(sub_overflow, (void*, intptr_t, intptr_t), "signed integer overflow in a subtraction")
HANDLER(mul_overflow, (void*, intptr_t, intptr_t), "signed integer overflow in a multiplication")
HANDLER(negate_overflow, (void*, intptr_t), "signed integer overflow in a negation")
HANDLER(float_cast_overflow, (void*, intptr_t), "a float becomes an integer that cannot hold it")
