"""Root-mean-square normalisation (arXiv:1910.07467): x / sqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import native_float32, record


def reference(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., E], weight [E] → [..., E] in x's dtype: the norm in float32, cast, then scaled, as Meta's code does."""
    wide = x.astype(mx.float32)
    return (wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype) * weight


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`reference`, by the fastest path of this machine."""
    if ops := native_float32(x, weight):
        record("rms_norm", "native")
        return cast(mx.array, ops.rms_norm(x, weight, eps))
    record("rms_norm", "mlx.fast")
    return mx.fast.rms_norm(x, weight, eps)
