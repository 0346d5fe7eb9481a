"""Attention of new queries over keys and values that lie in several pieces of storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_codellama.kernels import kv_attention as floats
from mlx_codellama.kernels import kv_attention_rows as packed
from mlx_codellama.kernels.dispatch import record
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.packed_kv import RowFormat


class Segment(NamedTuple):
    """Keys and values of one layer for consecutive tokens, where they are stored.

    arrays    [1, K, capacity, …]: keys and values as floats, or the one array of packed rows
    n_tokens  the first n_tokens of capacity count; the rest is never read
    """

    arrays: list[mx.array]
    n_tokens: int

    @property
    def used(self) -> list[mx.array]:
        """The arrays without the part that does not count."""
        return [array[:, :, : self.n_tokens] for array in self.arrays]


def joined(segments: Sequence[Segment]) -> list[mx.array]:
    """All tokens of the segments in one piece. A copy, unless there is one segment only."""
    parts = [segment.used for segment in segments if segment.n_tokens] or [segments[-1].used]
    if len(parts) == 1:
        return parts[0]
    return [mx.concatenate(list(each), axis=2) for each in zip(*parts, strict=True)]


def reference(
    q: mx.array, segments: Sequence[Segment], fmt: RowFormat | None, *, scale: float, prompt: bool = True
) -> mx.array:
    """Attend L new queries to the T tokens of all segments, causal from the end.

    q         [1, H, L, D]  float16 | bfloat16 | float32
    segments  oldest first, of T = Σ n_tokens tokens; the last L of them are q's own
    fmt       of packed rows; None for floats
    prompt    which family of kernels computes: True for a prompt, whose results do not depend on how it is cut into
              chunks; False for a step of at most 8 rows, whose results do not depend on how many rows there are
    → [1, H, L, D] in q.dtype, accumulated in float32; the same bits however the tokens are cut into segments
    """
    arrays = joined(segments)
    offset = arrays[0].shape[2] - q.shape[2]
    if fmt is not None:
        return packed.reference(q, arrays[0], fmt, scale=scale, offset=offset)
    return floats.reference(q, arrays[0], arrays[1], scale=scale, offset=offset)


def kv_attention_segments(
    q: mx.array, segments: Sequence[Segment], fmt: RowFormat | None, *, scale: float, prompt: bool = True
) -> mx.array:
    """`reference`, by the fastest path of this machine. Raises ValueError where queries and storage do not fit."""
    total = sum(segment.n_tokens for segment in segments)
    if q.shape[2] > total:
        raise ValueError(f"{q.shape[2]} queries for {total} tokens")
    if fmt is not None:
        for segment in segments:
            packed.check(q, segment.arrays[0], fmt, segment.n_tokens)
    whole = [segment for segment in segments if segment.n_tokens]
    many_or_packed = len(whole) > 1 or fmt is not None  # floats in one piece have a gradient
    if many_or_packed and (ops := floats.native_heads(q.shape[3])):
        record("kv_attention" if fmt is None else "kv_attention_rows", "native")
        arrays, tokens = [segment.arrays for segment in segments], [segment.n_tokens for segment in segments]
        bits = (0, 0) if fmt is None else (fmt.k_bits, fmt.v_bits)
        done = ops.kv_attention_segments(q, arrays, tokens, scale=scale, prompt=prompt, row_bits=bits)
        return cast(mx.array, done)
    offset = total - q.shape[2]
    if fmt is not None and len(whole) > 1:
        pieces = [(segment.arrays[0], segment.n_tokens) for segment in whole]
        found = gpu.kv_attention_segments(q, pieces, fmt, scale=scale, reference=packed.reference)
        if found is not None:
            return found
    one = whole[0].arrays if len(whole) == 1 else joined(segments)
    if fmt is not None:
        return packed.kv_attention_rows(q, one[0], fmt, scale=scale, offset=offset, prompt=prompt)
    keys, values = (array[:, :, :total] for array in one)
    return floats.kv_attention(q, keys, values, scale=scale, offset=offset, prompt=prompt)
