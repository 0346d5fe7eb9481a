"""The gate of the feed-forward block (arXiv:2002.05202): silu(gate) · up."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import backend, native_float32, record


def reference(gate: mx.array, up: mx.array) -> mx.array:
    """gate, up [..., F] of one dtype → [..., F]."""
    return gate * mx.sigmoid(gate) * up


_compiled = mx.compile(reference, shapeless=True)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`reference`, fused into one kernel where MLX compiles for the GPU."""
    if ops := native_float32(gate, up):
        record("swiglu", "native")
        return cast(mx.array, ops.swiglu(gate, up))
    if backend() == "cpu":
        record("swiglu", "mlx")
        return reference(gate, up)
    record("swiglu", "mlx.compile")
    return _compiled(gate, up)
