"""Attention of new queries over the first tokens and a window of the last ones."""

from __future__ import annotations

import mlx.core as mx

from mlx_codellama.kernels.dispatch import backend, record

SCORES_BYTES = 32 * 2**20  # of the float32 scores [B, H, L, T] that one block of queries may make


def seen(positions: mx.array, length: int, *, offset: int, sinks: int, window: int) -> mx.array:
    """bool [L, T]: whether the query at offset + i sees the key at positions[j]: not after it, and among the first
    `sinks` or within the `window` positions that end with its own."""
    own = offset + mx.arange(length)[:, None]
    return (positions <= own) & ((positions < sinks) | (positions > own - window))


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    positions: mx.array,
    *,
    scale: float,
    offset: int,
    sinks: int,
    window: int,
) -> mx.array:
    """Attend L new queries to those of T keys that each sees.

    q          [B, H, L, D]  float16 | bfloat16 | float32, at positions offset … offset + L - 1
    k, v       [B, K, T, D]  query head h reads kv head h // (H // K)
    positions  int [T], of the keys
    → [B, H, L, D] in q.dtype, accumulated in float32.      sinks 1, window 2, L = 2 after 4:   1 0 0 1 1 0
                                                                                                1 0 0 0 1 1
    """
    n_rep = q.shape[1] // k.shape[1]
    wide_k = mx.repeat(k.astype(mx.float32), n_rep, axis=1)
    wide_v = mx.repeat(v.astype(mx.float32), n_rep, axis=1)
    scores = scale * q.astype(mx.float32) @ wide_k.swapaxes(-1, -2)  # [B, H, L, T]
    mask = seen(positions, q.shape[2], offset=offset, sinks=sinks, window=window)
    return (mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1) @ wide_v).astype(q.dtype)


def kv_attention_window(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    positions: mx.array,
    *,
    scale: float,
    offset: int,
    sinks: int,
    window: int,
) -> mx.array:
    """`reference` by MLX's own attention, in blocks of queries whose scores take at most SCORES_BYTES."""
    record("kv_attention_window", "mlx.fast")
    wide = mx.float32 if backend() == "cpu" else q.dtype  # MLX's CPU path would accumulate in 16 bits
    k, v = k.astype(wide), v.astype(wide)
    b, heads, length, _ = q.shape
    block = max(1, SCORES_BYTES // (4 * b * heads * k.shape[2]))
    parts = []
    for start in range(0, length, block):
        part = q[:, :, start : start + block].astype(wide)
        mask = seen(positions, part.shape[2], offset=offset + start, sinks=sinks, window=window)
        parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=mask).astype(q.dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
