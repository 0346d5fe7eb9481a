"""x @ dequantised(weight)ᵀ for MLX's packed weights."""

from __future__ import annotations

import mlx.core as mx

from mlx_codellama.kernels.dispatch import backend, record

# From this many rows on, MLX's CPU backend is faster with the weight unpacked first and a BLAS matmul after.
_UNPACK_ROWS = 8


def reference(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """x [..., I]; weight uint32 [O, I·bits/32]; scales, biases [O, I/group_size] (mxfp4: uint8 scales, no biases).

    → [..., O] in x's dtype. Affine: a stored code c stands for c · scale + bias of its group.
    """
    dense = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return (x.astype(mx.float32) @ dense.astype(mx.float32).T).astype(x.dtype)


def quant_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """`reference`, by the fastest path of this machine."""
    if backend() == "cpu" and x.dtype == mx.float32 and x.size // x.shape[-1] >= _UNPACK_ROWS:
        record("quant_matmul", "mlx: unpack and matmul")
        return reference(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    record("quant_matmul", "mlx")
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode)
