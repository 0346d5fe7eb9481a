// Conversions between float and the 16-bit types that compilers leave to their own runtime, which is not linked here.
#include <math.h>
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

// half, where the CPU has no instruction for it. Every step but rint is exact: a half has 11 bits, a double 53.
extern "C" _Float16 __truncdfhf2(double d) {
  const double a = fabs(d);
  uint16_t r;
  if (a != a) {
    r = 0x7e00;
  } else if (a >= 65520) {  // the first that rounds past the largest half
    r = 0x7c00;
  } else if (a < 0x1p-14) {
    r = (uint16_t)rint(a * 0x1p24);
  } else {
    const int e = ilogb(a);
    r = (uint16_t)(((e + 15) << 10) + (int)rint(ldexp(a, 10 - e)) - 1024);
  }
  if (signbit(d)) r |= 0x8000;
  _Float16 h;
  memcpy(&h, &r, 2);
  return h;
}
extern "C" _Float16 __truncsfhf2(float f) { return __truncdfhf2(f); }
extern "C" float __extendhfsf2(_Float16 h) {
  uint16_t u;
  memcpy(&u, &h, 2);
  const int e = u >> 10 & 31, m = u & 1023;
  const float a = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf((float)(m + 1024), e - 25) : (float)m * 0x1p-24f;
  return u & 0x8000 ? -a : a;
}
