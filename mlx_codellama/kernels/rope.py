"""Rotary positions, the pairs (i, i + D/2) of a head turned by position · theta^(-2i/D).

Angles reach 1e5 radians at the context lengths of Code Llama, where a float32 angle is wrong by 4e-3 radians. So
the angles, their cosines and sines are computed in float64 and rounded once. Source: RoFormer (arXiv:2104.09864);
the halves layout is Hugging Face's, to which checkpoints are permuted on conversion.
"""

from __future__ import annotations

import math
import threading
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels.dispatch import native_float32, record
from mlx_codellama.rotary import RopeScaling

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

STEP, BLOCKS = 256, 16  # positions of a block of a table, and how many blocks it keeps


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None, length: int = 0) -> Floats:
    """Radians per position of each pair, float64 [D/2]: theta^(-2i/D), stretched as mlx_codellama.rotary says.

    length  tokens that the text will have, for dynamic scaling; scaling.original must be set, but for linear and ntk
    """
    pairs = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    result: Floats
    if scaling is None:
        result = theta**-pairs
    elif scaling.kind == "linear":
        result = theta**-pairs / scaling.factor
    elif scaling.kind == "ntk":
        result = (theta * scaling.factor ** (head_dim / (head_dim - 2))) ** -pairs
    elif scaling.original is None:
        raise ValueError(f"{scaling.kind} scaling needs the length that the model was trained on")
    elif scaling.kind == "dynamic":
        stretch = max(1.0, scaling.factor * length / scaling.original - (scaling.factor - 1))
        result = (theta * stretch ** (head_dim / (head_dim - 2))) ** -pairs
    else:
        # the pairs, as real numbers, that turn beta times over the trained length
        turns = [scaling.original / (beta * 2 * math.pi) for beta in (scaling.beta_fast, scaling.beta_slow)]
        ends = [head_dim * math.log(n) / (2 * math.log(theta)) for n in turns]
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), head_dim - 1)
        width = last - first or 0.001
        slow = np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)  # 0: stays, 1: divided by the factor
        result = theta**-pairs * ((1 - slow) + slow / scaling.factor)
    return result


def angles(
    positions: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling | None = None, length: int = 0
) -> Floats:
    """positions [L] → float64 angles [L, D/2] in radians."""
    turned: Floats = positions.astype(np.float64)[:, None] * frequencies(head_dim, theta, scaling, length)
    return turned


def amplitude(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied with: 1 but for yarn."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * float(np.log(scaling.factor)) + 1


class RopeTable:
    """Cosines and sines for positions 0, 1, 2 …, made in blocks of STEP positions when they are asked for.

    The last BLOCKS of them used are kept, 2 MB with heads of 128: all 100,000 positions of a long text would be 51 MB,
    and twice that while they grow.

    `rows(offset, length)` → cos, sin, each float32 [length, D/2], within half an ulp of the true values.
    text_length  as `length` of `frequencies`: one table is for texts of one length
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None = None, *, text_length: int = 0
    ) -> None:
        self._how = head_dim, theta, scaling, text_length
        self._amplitude = amplitude(scaling)
        self._blocks: dict[int, tuple[mx.array, mx.array]] = {}  # the one used last at the end
        self._lock = threading.Lock()  # forks of one model may ask at once

    def rows(self, offset: int, length: int) -> tuple[mx.array, mx.array]:
        end = offset + length
        parts = []
        for n in range(offset // STEP, max(offset, end - 1) // STEP + 1):
            first, last = max(offset - n * STEP, 0), min(end - n * STEP, STEP)
            parts.append([half[first:last] for half in self._block(n)])
        if len(parts) == 1:
            return parts[0][0], parts[0][1]
        cos, sin = (mx.concatenate(list(halves)) for halves in zip(*parts, strict=True))
        return cos, sin

    def _block(self, n: int) -> tuple[mx.array, mx.array]:
        """Positions n · STEP … (n + 1) · STEP - 1."""
        with self._lock:
            found = self._blocks.pop(n, None)
            if found is None:
                turn = angles(np.arange(n * STEP, (n + 1) * STEP), *self._how)
                cos, sin = (mx.array((self._amplitude * part(turn)).astype(np.float32)) for part in (np.cos, np.sin))
                mx.eval(cos, sin)  # a lazy array can be evaluated only in the thread that made it
                found = cos, sin
            self._blocks[n] = found
            if len(self._blocks) > BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            return found


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
