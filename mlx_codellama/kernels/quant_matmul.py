"""x @ dequantised(weight)ᵀ for MLX's packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import mlx.core as mx

from mlx_codellama.config import NATIVE_BITS
from mlx_codellama.kernels.dispatch import backend, fall_back, native, record
from mlx_codellama.kernels.rms_norm import rms_norm
from mlx_codellama.kernels.swiglu import swiglu

Packed: TypeAlias = tuple[mx.array, mx.array, "mx.array | None"]  # weight, scales, biases

# From this many rows on, MLX's CPU backend is faster with the weight unpacked first and a BLAS matmul after.
_UNPACK_ROWS = 8

# int8 terms that stand for an activation where `exact` is not asked for. Measured on 6144 tokens of a 6-layer model of
# code: one term changes 0.5 % of the next tokens (KL 5e-5), two (15 bits) change none (KL 4e-9).
TERMS = 2


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
    prompt: bool = False,
) -> mx.array:
    """`reference`, by the fastest path of this machine.

    exact   keep the activations in float32. Otherwise the native CPU kernel may round them, in each group, to two int8
            terms: an error of at most max |x| of the group / 32512, some 10^-4 of the result, for nearly twice the
            speed. The default keeps logits within the rounding of float32, as the parity tests ask.
    prompt  which of two families of native kernels multiplies: True for a prompt, whatever the number of rows; False
            for a step of at most 8 rows (more go as a prompt). Inside a family a row's bits depend on no other row
    """
    if (ops := native()) and not _is_native(x, scales, group_size, bits, mode):
        fall_back(
            f"no native CPU kernel multiplies {bits}-bit {mode} weights",
            hint="load the model with this package: it holds codes in 4 or 8 bits",
        )
    elif ops:
        terms = _terms(ops, mode, exact)
        record("quant_matmul", "native int8" if terms else "native")
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "terms": terms, "prompt": prompt}
        return cast(mx.array, ops.quant_matmul(x, weight, scales, biases, **settings))
    op = f"quant_matmul, {bits}-bit" if ops else "quant_matmul"  # beside the widths that are multiplied natively
    if unpacks(x, bits):
        record(op, "mlx: unpack and matmul")
        return reference(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    record(op, "mlx")
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode)


def unpacks(x: mx.array, bits: int) -> bool:
    """Whether `quant_matmul` of x [..., I] with codes of so many bits makes a float32 matrix of the weight first."""
    if backend() != "cpu" or x.dtype != mx.float32 or (native() is not None and bits in NATIVE_BITS):
        return False
    return x.size >= _UNPACK_ROWS * x.shape[-1]


def quant_linear(
    x: mx.array,
    weights: Sequence[Packed],
    *,
    group_size: int,
    bits: int,
    mode: str,
    norm: tuple[mx.array, float] | None = None,
    residual: mx.array | None = None,
    gated: bool = False,
    exact: bool = True,
    prompt: bool = False,
) -> list[mx.array]:
    """`quant_matmul` of one x by one to three weights, with what stands before and after it in a model.

    weights   (weight, scales, biases) of each, all of one width and group size
    norm      (weight [I], eps): x goes through rms_norm first
    residual  [..., O], added to the product of the only weight
    gated     the two weights are gate and up: swiglu of their products is the only result
    exact, prompt  as in `quant_matmul`
    → one [..., O] for each weight, or for the gated pair. One launch on the native path, else one op after the other.
    """
    if (ops := native()) and _all_native(x, weights, group_size, bits, mode):
        terms = _terms(ops, mode, exact)
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "terms": terms, "prompt": prompt}
        record("quant_matmul", "native int8" if terms else "native")
        for op, used in (("rms_norm", norm is not None), ("swiglu", gated)):
            if used:
                record(op, "native in quant_matmul")
        fused: list[mx.array] = ops.quant_linear(x, weights, **settings, norm=norm, residual=residual, gated=gated)
        return fused
    if norm is not None:
        x = rms_norm(x, *norm)
    parts: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode, "exact": exact, "prompt": prompt}
    ys = [quant_matmul(x, *packed, **parts) for packed in weights]
    if gated:
        ys = [swiglu(*ys)]
    return ys if residual is None else [residual + ys[0]]


def _terms(ops: Any, mode: str, exact: bool) -> int:
    """How many int8 terms stand for an activation; 0: it stays float32."""
    return 0 if exact or mode == "mxfp4" or ops.isa() == "portable" else TERMS


def _all_native(x: mx.array, weights: Sequence[Packed], group_size: int, bits: int, mode: str) -> bool:
    alike = all(scales.dtype == weights[0][1].dtype for _, scales, _ in weights)
    return alike and _is_native(x, weights[0][1], group_size, bits, mode)


def _is_native(x: mx.array, scales: mx.array, group_size: int, bits: int, mode: str) -> bool:
    floats = (mx.float32, mx.float16, mx.bfloat16)
    if x.dtype not in floats:
        return False
    if mode == "mxfp4":
        return bits == 4 and group_size == 32
    return mode == "affine" and bits in NATIVE_BITS and scales.dtype in floats
