"""Repack codes with more bits each. The values do not change."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 1 << 20  # size of a piece of the result, so that it stays in the processor's cache


def widen_codes(weight: mx.array, bits: int, to: int) -> mx.array:
    """weight uint32 [O, I·bits/32] as MLX packs it, I a multiple of 32 → the same codes, uint32 [O, I·to/32].

    bits  2, 3, 5 or 6, below `to`, which is 4 or 8. Eight codes take `bits` bytes, the first in the lowest bits. We
          spread them by halves, quarters and eighths.
    """
    packed = np.asarray(weight).view(np.uint8).reshape(-1, bits)  # [O·I/8, bits]
    word = np.uint32 if to == 4 else np.uint64
    out: npt.NDArray[Any] = np.empty(len(packed), word)
    step = _CHUNK_BYTES // out.itemsize
    wide = np.zeros((min(step, len(packed)), to), np.uint8)
    for start in range(0, len(packed), step):
        eights = packed[start : start + step]
        wide[: len(eights), :bits] = eights
        x = wide.view(word)[: len(eights), 0].copy()
        for half in (4, 2, 1):
            low = sum(((1 << bits * half) - 1) << (2 * half * to * k) for k in range(4 // half))
            upper = (x & word(low << bits * half)) << word((to - bits) * half)
            x &= word(low)
            x |= upper
        out[start : start + len(eights)] = x
    return mx.array(out.view(np.uint32).reshape(weight.shape[0], -1))
