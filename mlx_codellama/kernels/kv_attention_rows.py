"""Attention of new queries over packed rows of keys and values."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_codellama.kernels import kv_attention as floats
from mlx_codellama.kernels.dispatch import backend, record
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.packed_kv import RowFormat

SCORES_BYTES = 32 * 2**20  # of the float32 scores [B, H, L, T] that one block of queries may make


def reference(q: mx.array, rows: mx.array, fmt: RowFormat, *, scale: float, offset: int) -> mx.array:
    """Attend L new queries to T = offset + L keys in packed rows, causal from the end.

    q       [B, H, L, D]  float16 | bfloat16 | float32
    rows    uint32 [B, K, capacity, fmt.words], capacity ≥ T: the first T count, the rest is never looked at
    offset  tokens cached before these queries, whose own rows are among the T
    → [B, H, L, D] in q.dtype, accumulated in float32 from the values that `fmt.unpack` gives in float32
    """
    k, v = fmt.unpack(rows[:, :, : offset + q.shape[2]])
    return floats.reference(q, k, v, scale=scale, offset=offset)


def kv_attention_rows(
    q: mx.array, rows: mx.array, fmt: RowFormat, *, scale: float, offset: int, prompt: bool | None = None
) -> mx.array:
    """`reference`, by the fastest path of this machine. prompt: as in kernels/kv_attention.py.

    Raises ValueError where rows and queries do not fit together.
    """
    check(q, rows, fmt, offset + q.shape[2])
    found = gpu.kv_attention_rows(q, rows, fmt, scale=scale, offset=offset, reference=reference)
    if found is not None:
        return found
    if ops := floats.native_heads(q.shape[3]):
        record("kv_attention_rows", "native")
        bits = {"k_bits": fmt.k_bits, "v_bits": fmt.v_bits}
        return cast(mx.array, ops.kv_attention_rows(q, rows, **bits, scale=scale, offset=offset, prompt=prompt))
    record("kv_attention_rows", "mlx")
    return unpacked(q, rows, fmt, scale=scale, offset=offset)


def unpacked(q: mx.array, rows: mx.array, fmt: RowFormat, *, scale: float, offset: int) -> mx.array:
    """Attention over one layer's rows unpacked, in blocks of queries whose scores take at most SCORES_BYTES.

    Memory: K and V of one layer in float32 (in q's dtype on a GPU), and one block of scores.
    """
    b, h, length, _ = q.shape
    total = offset + length
    k, v = fmt.unpack(rows[:, :, :total], mx.float32 if backend() == "cpu" else q.dtype)
    block = max(1, SCORES_BYTES // (4 * b * h * total))
    if length <= block:
        return floats.kv_attention(q, k, v, scale=scale, offset=offset)
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = offset + end
        part = floats.kv_attention(
            q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=scale, offset=offset + start
        )
        mx.eval(part)  # or MLX would allocate the scores of all blocks ahead
        parts.append(part)
    return mx.concatenate(parts, axis=2)


def check(q: mx.array, rows: mx.array, fmt: RowFormat, total: int) -> None:
    """Raise ValueError where rows and queries do not fit together, or fewer than `total` rows are there."""
    b, h, _, d = q.shape
    if rows.dtype != mx.uint32 or rows.ndim != 4 or rows.shape[0] != b or rows.shape[3] != fmt.words:
        raise ValueError(f"rows {rows.shape} {rows.dtype} for queries {q.shape} and {fmt}")
    if d != fmt.head_dim or h % rows.shape[1] or rows.shape[2] < total:
        raise ValueError(f"rows {rows.shape} for queries {q.shape} among {total} tokens, and {fmt}")
