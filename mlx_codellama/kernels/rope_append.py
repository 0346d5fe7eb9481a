"""Rotation of new queries and keys, and the keys and values as packed rows for the cache: one op of the decode step."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_codellama.kernels import rope as rope_op
from mlx_codellama.kernels.dispatch import record
from mlx_codellama.kernels.gpu import rope_append as gpu
from mlx_codellama.kernels.kv_attention import native_heads
from mlx_codellama.kernels.packed_kv import RowFormat


def reference(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array, fmt: RowFormat
) -> tuple[mx.array, mx.array]:
    """Turn q and k by their positions' angles; pack k and v.

    q         [B, H, L, D]  float16 | bfloat16 | float32
    k, v      [B, K, L, D]  as q
    cos, sin  float32 [L, D/2], from kernels/rope.py
    → q turned, in its own dtype; rows uint32 [B, K, L, fmt.words]. Keys are turned in float32 and packed from there,
      without a rounding to their dtype in between.
    A kernel may round the two products of the rotation once less (fma): its keys are then within 2^-22 of the larger
    of their pair, and their rows are those of keys that close. Values' words follow kernels/packed_kv.py to the bit.
    """
    return (
        rope_op.reference(q, cos, sin),
        fmt.pack(rope_op.reference(k.astype(mx.float32), cos, sin), v),
    )


def rope_append(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array, fmt: RowFormat
) -> tuple[mx.array, mx.array]:
    """`reference`, by the fastest path of this machine."""
    if (found := gpu.rope_append(q, k, v, cos, sin, fmt, reference)) is not None:
        return found
    if ops := native_heads(q.shape[3]):
        record("rope_append", "native")
        found = ops.rope_append(q, k, v, cos, sin, k_bits=fmt.k_bits, v_bits=fmt.v_bits)
        return cast("tuple[mx.array, mx.array]", found)
    record("rope_append", "mlx")
    return reference(q, k, v, cos, sin, fmt)
