// Compiled once per instruction set: MCL_WIDTH and MCL_ISA (portable, avx2, avx512, avx512vnni, neondot) come from
// kernels.cmake.
#include "adamw/adamw.simd.h"
#include "cross_entropy/cross_entropy.simd.h"
#include "kv_attention/few.simd.h"
#include "kv_attention/grad.simd.h"
#include "kv_attention/tile.simd.h"
#include "quant_matmul/int8_rows.simd.h"
#include "quant_matmul/int16_tile.simd.h"
#include "quant_matmul/rows.simd.h"
#include "quant_matmul/tile.simd.h"
#include "rms_norm/rms_norm.simd.h"
#include "rope/rope.simd.h"
#include "rope_append/rope_append.simd.h"
#include "simd/kernels.h"
#include "simd/vec.h"
#include "swiglu/swiglu.simd.h"

#define MCL_TEXT_(x) #x
#define MCL_TEXT(x) MCL_TEXT_(x)
#define MCL_JOIN_(a, b) a##b
#define MCL_JOIN(a, b) MCL_JOIN_(a, b)

namespace mcl {

extern const Kernels MCL_JOIN(kernels_, MCL_ISA);
const Kernels MCL_JOIN(kernels_, MCL_ISA) = {
    MCL_TEXT(MCL_ISA),
    W,
    rms_norm,
    rms_norm_grad,
    swiglu,
    swiglu_grad,
    rope,
    cross_entropy,
    cross_entropy_grad,
    adamw,
    sum_squares,
    attention_few,
    attention_tile,
    attention_merge,
    attention_pack,
    attention_grad,
    append_row,
    quant_rows_prepare,
    quant_rows,
    quant_tile,
    quant_int8_rows_prepare,
    quant_int8_rows,
    quant_int8_tile_prepare,
    quant_int8_tile,
};

}  // namespace mcl
