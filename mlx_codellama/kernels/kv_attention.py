"""Attention of new queries over cached keys and values."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import backend, fall_back, native, record

NATIVE_WIDTH = 256  # of a head, at most


def reference(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int, starts: mx.array | None = None
) -> mx.array:
    """Attend L new queries to T cached keys, causal from the end.

    q       [B, H, L, D]  float16 | bfloat16 | float32
    k, v    [B, K, T, D]  query head h reads kv head h // (H // K);  T = offset + L. Any of the three types
    offset  tokens cached before these queries
    starts  int [B, L]: the first key that each query sees, for packed documents; None for 0
    → [B, H, L, D] in q.dtype, accumulated in float32.      L=2, T=5:  1 1 1 1 0
    Shown in tests/kernels/test_kv_attention.py.                       1 1 1 1 1
    """
    n_rep = q.shape[1] // k.shape[1]
    wide_k = mx.repeat(k.astype(mx.float32), n_rep, axis=1)
    wide_v = mx.repeat(v.astype(mx.float32), n_rep, axis=1)
    scores = scale * q.astype(mx.float32) @ wide_k.swapaxes(-1, -2)  # [B, H, L, T]
    seen = mx.arange(k.shape[2])[None, :] <= offset + mx.arange(q.shape[2])[:, None]
    if starts is not None:
        seen = seen & (mx.arange(k.shape[2]) >= starts[:, None, :, None])  # [B, 1, L, T]
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1)
    return (weights @ wide_v).astype(q.dtype)


def kv_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    offset: int,
    starts: mx.array | None = None,
    prompt: bool | None = None,
) -> mx.array:
    """`reference`, by the fastest path of this machine.

    prompt  which of two families of native kernels computes: True for a prompt, whatever the number of queries; False
            for a step of at most 8; None: by their number. Inside a family a query's bits depend on what it sees alone
    """
    if k.shape[2] != offset + q.shape[2]:
        raise ValueError(f"{k.shape[2]} keys for {offset} cached and {q.shape[2]} new tokens")
    if ops := native_heads(q.shape[3]):
        record("kv_attention", "native")
        return cast(mx.array, ops.kv_attention(q, k, v, scale=scale, starts=starts, prompt=prompt))
    if starts is not None:
        record("kv_attention", "mlx")
        return reference(q, k, v, scale=scale, offset=offset, starts=starts)
    mask = "causal" if q.shape[2] > 1 else None
    if backend() == "cpu" and any(a.dtype != mx.float32 for a in (q, k, v)):  # MLX would accumulate in 16 bits
        record("kv_attention", "mlx.fast in float32")
        wide = (a.astype(mx.float32) for a in (q, k, v))
        return mx.fast.scaled_dot_product_attention(*wide, scale=scale, mask=mask).astype(q.dtype)
    record("kv_attention", "mlx.fast")
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).astype(q.dtype)


def native_heads(width: int) -> ModuleType | None:
    """`native()` where it does heads of this width; else None, or BackendError where MLX_CODELLAMA_REQUIRE=cpu."""
    ops = native()
    if ops is None or width <= NATIVE_WIDTH:
        return ops
    fall_back(f"the native attention has heads of at most {NATIVE_WIDTH}, not {width}")
    return None
