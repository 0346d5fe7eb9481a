// Conversions between float and the 16-bit types that compilers leave to their own runtime, which is not linked here.
#include <stdint.h>
#include <string.h>

static uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
// To nearest, ties to even; a NaN stays one.
extern "C" __bf16 __truncsfbf2(float f) {
  const uint32_t u = bits_of(f);
  const uint16_t r = (uint16_t)(f != f ? (u >> 16) | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  __bf16 b;
  memcpy(&b, &r, 2);
  return b;
}
extern "C" __bf16 __truncdfbf2(double d) {
  float f = (float)d;  // round to odd first, so that the second rounding is the only one
  if ((double)f != d && f == f) {
    uint32_t u = bits_of(f);
    if (!(u & 1)) u += ((double)f < d) == (f > 0 || (f == 0 && d > 0)) ? 1 : -1;
    memcpy(&f, &u, 4);
  }
  return __truncsfbf2(f);
}
