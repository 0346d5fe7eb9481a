"""Attention inside each of several documents that stand one after the other in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels import kv_attention as one
from mlx_codellama.kernels.dispatch import record


def reference(q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float) -> mx.array:
    """Causal attention of each document to itself.

    q        [B, H, N, D]  float16 | bfloat16 | float32              lengths 2, 3:  1 0 . . .
    k, v     [B, K, N, D]  query head h reads kv head h // (H // K)                 1 1 . . .
    lengths  of the documents, N in all                                            . . 1 0 0
    → [B, H, N, D] in q.dtype, accumulated in float32                              . . 1 1 0
    Shown in tests/kernels/test_kv_attention_documents.py.                         . . 1 1 1
    """
    return _each(one.reference, q, k, v, lengths, scale=scale)


def kv_attention_documents(q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float) -> mx.array:
    """`reference`, by the fastest path of this machine, with gradients. No mask over the whole row is made.

    Raises ValueError where the lengths do not sum to N.
    """
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"documents of {sum(lengths)} tokens in a row of {q.shape[2]}")
    if len(lengths) > 1 and (ops := one.native_heads(q.shape[3])):
        record("kv_attention_documents", "native")
        begins = np.cumsum([0, *lengths[:-1]])
        starts = mx.array(np.repeat(begins, lengths).astype(np.int32))
        starts = mx.broadcast_to(starts, (q.shape[0], q.shape[2]))
        return cast(mx.array, ops.kv_attention(q, k, v, scale=scale, starts=starts))
    return _each(one.kv_attention, q, k, v, lengths, scale=scale)


def _each(
    attention: Callable[..., Any], q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float
) -> mx.array:
    """One document after the other."""
    if len(lengths) == 1:
        return cast(mx.array, attention(q, k, v, scale=scale, offset=0))
    ends = np.cumsum(lengths).tolist()[:-1]
    parts = zip(*(mx.split(x, ends, axis=2) for x in (q, k, v)), strict=True)
    return mx.concatenate([attention(*part, scale=scale, offset=0) for part in parts], axis=2)
