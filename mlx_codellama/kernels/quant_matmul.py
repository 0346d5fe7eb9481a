"""x @ dequantised(weight)ᵀ for MLX's packed weights."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import backend, fall_back, native, record

# From this many rows on, MLX's CPU backend is faster with the weight unpacked first and a BLAS matmul after.
_UNPACK_ROWS = 8

NATIVE_BITS = (4, 8)  # that the native kernel multiplies by; the others are unpacked first

# int8 terms that stand for an activation where `exact` is not asked for. Measured on 6144 tokens of a 6-layer model of
# code: one term changes 0.5 % of the next tokens (KL 5e-5), two (15 bits) change none (KL 4e-9).
_TERMS = 2


def reference(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """x [..., I]; weight uint32 [O, I·bits/32]; scales, biases [O, I/group_size] (mxfp4: uint8 scales, no biases).

    → [..., O] in x's dtype. Affine: a stored code c stands for c · scale + bias of its group, in float32 whatever the
    dtype of scale and bias.
    """
    if mode == "affine" and biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return (x.astype(mx.float32) @ dense.astype(mx.float32).T).astype(x.dtype)


def quant_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    exact: bool = True,
) -> mx.array:
    """`reference`, by the fastest path of this machine.

    exact  keep the activations in float32. Otherwise the native CPU kernel may round them, in each group, to two int8
           terms: an error of at most max |x| of the group / 32512, some 10^-4 of the result, for twice the speed on
           many rows. The default keeps logits within the rounding of float32, as the parity tests ask.
    """
    if (ops := native()) and not _is_native(x, scales, group_size, bits, mode):
        fall_back(f"no native CPU kernel multiplies {bits}-bit {mode} weights", hint="quantise to 4 or 8 bits")
    elif ops:
        terms = 0 if exact or mode == "mxfp4" or ops.isa() == "portable" else _TERMS
        record("quant_matmul", "native int8" if terms else "native")
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "terms": terms}
        return cast(mx.array, ops.quant_matmul(x, weight, scales, biases, **settings))
    if backend() == "cpu" and x.dtype == mx.float32 and x.size >= _UNPACK_ROWS * x.shape[-1]:
        record("quant_matmul", "mlx: unpack and matmul")
        return reference(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    record("quant_matmul", "mlx")
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode)


def _is_native(x: mx.array, scales: mx.array, group_size: int, bits: int, mode: str) -> bool:
    floats = (mx.float32, mx.float16, mx.bfloat16)
    if x.dtype not in floats:
        return False
    if mode == "mxfp4":
        return bits == 4 and group_size == 32
    return mode == "affine" and bits in NATIVE_BITS and scales.dtype in floats
