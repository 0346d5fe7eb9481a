"""Small fixed inputs on which a kernel is compared with its reference before it is trusted.

An error is given as a multiple of what is allowed: twice the error of the reference against float64, and the
rounding of float32 sums. Above 1 the kernel is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels.packed_kv import RowFormat

SCALE = 0.11  # of scores: weights differ, and none takes all
FLOAT32_SUMS = 4e-6  # of the largest value: a few hundred additions, and exp2 of a GPU
QUERIES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 8: (2, 4), 16: (3, 5)}  # tile rows → queries, heads per kv head


def attention_error(
    fmt: RowFormat,
    dtype: mx.Dtype,
    tile_rows: int,
    reference: Callable[..., mx.array],
    candidate: Callable[..., mx.array],
) -> float:
    """Worst error of kv_attention_rows over two lengths, one of them in two blocks; rows after the last are NaN."""
    length, n_rep = QUERIES[tile_rows]
    worst = 0.0
    for n_tokens, blocks in ((length + 2, 1), (331, 2)):
        q, rows, storage = _inputs(n_tokens, n_tokens, fmt, dtype, length, n_rep)
        offset = n_tokens - length
        truth = attention_truth(q, *fmt.unpack(rows), scale=SCALE, offset=offset)
        plain = reference(q, storage, fmt, scale=SCALE, offset=offset)
        worst = max(worst, _beside(plain, candidate(q, storage, offset=offset, blocks=blocks), truth))
    return worst


def segments_error(
    fmt: RowFormat,
    dtype: mx.Dtype,
    tile_rows: int,
    reference: Callable[..., mx.array],
    candidate: Callable[..., mx.array],
) -> float:
    """Worst error of kv_attention_segments: 331 tokens in all six pieces and in two, in two blocks; else as above."""
    length, n_rep = QUERIES[tile_rows]
    n_tokens, worst = 331, 0.0
    q, rows, _ = _inputs(n_tokens, n_tokens, fmt, dtype, length, n_rep)
    offset = n_tokens - length
    truth = attention_truth(q, *fmt.unpack(rows), scale=SCALE, offset=offset)
    plain = reference(q, rows, fmt, scale=SCALE, offset=offset)
    for ends in ((77, 78, 167, 300, n_tokens - length), (170,)):
        unused = mx.full((*rows.shape[:2], len(ends) + 3, fmt.words), 0xFFFFFFFF, mx.uint32)
        pieces = [mx.concatenate([part, unused], axis=2) for part in mx.split(rows, list(ends), axis=2)]
        later = list(zip(pieces[1:], ends, strict=True))
        found = candidate(q, pieces[0], offset=offset, later=later, blocks=2)
        worst = max(worst, _beside(plain, found, truth))
    return worst


def window_error(
    fmt: RowFormat,
    dtype: mx.Dtype,
    tile_rows: int,
    reference: Callable[..., mx.array],
    candidate: Callable[..., mx.array],
) -> float:
    """Worst error of kv_attention_window_rows over a ring that has gone round, in two blocks, and one that has not."""
    length, n_rep = QUERIES[tile_rows]
    sinks, ring, size, worst = 3, 328, 323, 0.0
    for newest, blocks in ((2 * ring + sinks - 1 + length // 2, 2), (ring - 1, 1)):  # of the first keys at both ends
        n_tokens = min(newest + 1, sinks + ring)
        q, rows, storage = _inputs(newest, n_tokens, fmt, dtype, length, n_rep)
        position = np.arange(n_tokens)
        position[sinks:] += (newest - position[sinks:]) // ring * ring
        own = newest - length + 1 + np.arange(length)[:, None]
        hidden = (position > own) | ((position >= sinks) & (position <= own - size))
        window = (sinks, size, int(np.flatnonzero(position == own[0])[0]), ring)
        truth = attention_truth(q, *fmt.unpack(rows), scale=SCALE, hidden=hidden)
        plain = reference(q, rows, fmt, window, scale=SCALE)
        found = candidate(q, storage, offset=n_tokens - length, window=window, blocks=blocks)
        worst = max(worst, _beside(plain, found, truth))
    return worst


def append_error(
    fmt: RowFormat,
    dtype: mx.Dtype,
    reference: Callable[..., tuple[mx.array, mx.array]],
    candidate: Callable[..., tuple[mx.array, mx.array]],
) -> float:
    """Worst error of rope_append: of the turned queries, and of what keys and values are after unpacking."""
    random = np.random.default_rng(fmt.words)
    length, half = 5, fmt.head_dim // 2
    q = _normal(random, 2, 6, length, fmt.head_dim).astype(dtype)
    k, v = (_normal(random, 2, 3, length, fmt.head_dim).astype(dtype) for _ in range(2))
    angle = random.uniform(0, 6.28, (length, half))
    cos, sin = mx.array(np.cos(angle).astype(np.float32)), mx.array(np.sin(angle).astype(np.float32))
    truths = [rotation_truth(q, cos, sin), rotation_truth(k, cos, sin), float64(v)]
    worst = 0.0
    plain = _values(reference(q, k, v, cos, sin, fmt), fmt)
    found = _values(candidate(q, k, v, cos, sin), fmt)
    for truth, ours, theirs in zip(truths, found, plain, strict=True):
        for measure in (np.max, np.mean):  # one wrong code shows in the first, codes askew in the second
            allowed = 1.05 * measure(np.abs(theirs - truth)) + FLOAT32_SUMS * np.abs(truth).max()
            worst = max(worst, _multiple(measure(np.abs(ours - truth)), allowed))
    return worst


def attention_truth(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, offset: int = 0, hidden: np.ndarray | None = None
) -> np.ndarray:
    """kv_attention in float64. hidden: bool [L, T] in place of the causal mask."""
    b, h, length, d = q.shape
    n_kv, n_tokens = k.shape[1:3]
    queries = float64(q).reshape(b, n_kv, h // n_kv, length, d)
    scores = scale * (queries @ float64(k)[:, :, None].swapaxes(-1, -2))
    if hidden is None:
        hidden = np.arange(n_tokens) > offset + np.arange(length)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out: np.ndarray = (weights @ float64(v)[:, :, None]).reshape(b, h, length, d)
    return out


def rotation_truth(x: mx.array, cos: mx.array, sin: mx.array) -> np.ndarray:
    """rope in float64."""
    a, b = np.split(float64(x), 2, axis=-1)
    c, s = float64(cos), float64(sin)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def float64(x: mx.array) -> np.ndarray:
    return np.asarray(x.astype(mx.float32), np.float64)


def _values(appended: tuple[mx.array, mx.array], fmt: RowFormat) -> list[np.ndarray]:
    turned, packed = appended
    return [float64(turned), *(float64(part) for part in fmt.unpack(packed))]


def _inputs(
    seed: int, n_tokens: int, fmt: RowFormat, dtype: mx.Dtype, length: int, n_rep: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, the rows of n_tokens, and a storage that has more rows, of NaN, after them."""
    random = np.random.default_rng(seed)
    q = _normal(random, 2, 3 * n_rep, length, fmt.head_dim).astype(dtype)
    k, v = (_normal(random, 2, 3, n_tokens, fmt.head_dim) for _ in range(2))
    rows = fmt.pack(k, v + 0.5)
    unused = mx.full((2, 3, 9, fmt.words), 0xFFFFFFFF, mx.uint32)
    return q, rows, mx.concatenate([rows, unused], axis=2)


def _beside(plain: mx.array, found: mx.array, truth: np.ndarray) -> float:
    """The error of `found` as a multiple of what that of the reference, `plain`, allows."""
    allowed = 2 * np.abs(float64(plain) - truth).max() + FLOAT32_SUMS * np.abs(truth).max()
    return _multiple(np.abs(float64(found) - truth).max(), allowed)


def _normal(random: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(random.standard_normal(shape).astype(np.float32))


def _multiple(error: Any, allowed: Any) -> float:
    """error / allowed; infinity for NaN, which compares with nothing."""
    found = float(error) / float(allowed)
    return found if found == found else float("inf")
