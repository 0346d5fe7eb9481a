"""Rotary positions, the pairs (i, i + D/2) of a head turned by position · theta^(-2i/D).

Angles reach 1e5 radians at the context lengths of Code Llama, where a float32 angle is wrong by 4e-3 radians. So
the angles, their cosines and sines are computed in float64 and rounded once. Source: RoFormer (arXiv:2104.09864);
the halves layout is Hugging Face's, to which checkpoints are permuted on conversion.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels.dispatch import native_float32, record

_STEP = 1024  # positions by which a table grows


def angles(positions: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """positions [L] → float64 angles [L, D/2] in radians."""
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return positions.astype(np.float64)[:, None] * inverse


class RopeTable:
    """Cosines and sines for positions 0, 1, 2 …, grown when a later position is asked for.

    `rows(offset, length)` → cos, sin, each float32 [length, D/2], within half an ulp of the true values.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta
        self._cos = self._sin = mx.zeros((0, head_dim // 2))
        mx.eval(self._cos)  # a lazy array can be evaluated only in the thread that made it

    def rows(self, offset: int, length: int) -> tuple[mx.array, mx.array]:
        end = offset + length
        if end > (have := self._cos.shape[0]):
            grown = max(have + _STEP, -(-end // _STEP) * _STEP)
            turn = angles(np.arange(have, grown), self.head_dim, self.theta)
            self._cos = mx.concatenate([self._cos, mx.array(np.cos(turn).astype(np.float32))])
            self._sin = mx.concatenate([self._sin, mx.array(np.sin(turn).astype(np.float32))])
            mx.eval(self._cos, self._sin)
        return self._cos[offset:end], self._sin[offset:end]


def reference(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn x [B, H, L, D] by cos, sin [L, D/2] in float32; the result has x's dtype."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(mx.float32), x[..., half:].astype(mx.float32)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """`reference`, by the fastest path of this machine."""
    if ops := native_float32(x):
        record("rope", "native")
        return cast(mx.array, ops.rope(x, cos, sin))
    record("rope", "mlx")
    return reference(x, cos, sin)
