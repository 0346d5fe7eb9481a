"""Attention over several segments is attention over their tokens in one piece."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels.kv_attention import reference as floats_reference
from mlx_codellama.kernels.kv_attention_segments import Segment, joined, kv_attention_segments, reference
from mlx_codellama.kernels.packed_kv import RowFormat

# Dimensions differ pairwise, and capacity is larger than what counts, so that stale storage would be seen.
T, K, H, D, SPARE = 301, 2, 6, 64, 7


def storage(fmt: RowFormat | None, seed: int = 0) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    k, v = (mx.array(rng.standard_normal((1, K, T, D), np.float32)) for _ in range(2))
    return [k, v] if fmt is None else [fmt.pack(k, v)]


def cut(arrays: list[mx.array], *ends: int) -> list[Segment]:
    """Segments that end at `ends`, each in storage of its own that is longer than what counts and ends in garbage."""
    segments, start = [], 0
    for end in (*ends, T):
        parts = [array[:, :, start:end] for array in arrays]
        garbage = [
            mx.full((1, K, SPARE, a.shape[3]), 7.5 if a.dtype == mx.float32 else 0x7F7F7F7F, a.dtype) for a in parts
        ]
        stored = [mx.concatenate([part, more], axis=2) for part, more in zip(parts, garbage, strict=True)]
        segments.append(Segment(stored, end - start))
        start = end
    return segments


@pytest.mark.parametrize("fmt", [None, RowFormat(D, 8, 4), RowFormat(D, 4, 4)], ids=["floats", "8/4", "4"])
@pytest.mark.parametrize("ends", [(), (1,), (63, 64, 256), (255, 257), (0, 300)])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_segments_are_one_piece(fmt: RowFormat | None, ends: tuple[int, ...], length: int) -> None:
    arrays = storage(fmt)
    q = mx.array(np.random.default_rng(1).standard_normal((1, H, length, D), np.float32))
    whole = reference(q, [Segment(arrays, T)], fmt, scale=0.125)
    k, v = arrays if fmt is None else fmt.unpack(arrays[0])
    assert mx.array_equal(whole, floats_reference(q, k, v, scale=0.125, offset=T - length))
    assert mx.array_equal(reference(q, cut(arrays, *ends), fmt, scale=0.125), whole)
    for prompt in (True, False) if length <= 8 else (True,):
        found = kv_attention_segments(q, cut(arrays, *ends), fmt, scale=0.125, prompt=prompt)
        assert mx.allclose(found, whole, rtol=0, atol=2e-6)
        one = kv_attention_segments(q, [Segment(arrays, T)], fmt, scale=0.125, prompt=prompt)
        assert mx.array_equal(found, one)  # the same bits


def test_one_segment_is_not_copied() -> None:
    arrays = storage(None)
    assert joined([Segment(arrays, T)])[0].shape == (1, K, T, D)
    assert mx.array_equal(joined(cut(arrays, 100, 200))[1], arrays[1])


def test_more_queries_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="302 queries for 301 tokens"):
        kv_attention_segments(mx.zeros((1, H, T + 1, D)), [Segment(storage(None), T)], None, scale=1.0)
