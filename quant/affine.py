"""Affine group quantisation: the definition in NumPy, and MLX's implementation on blocks of rows.

Each row is cut into groups of g weights. Let lo and hi be the extremes of a group and n = 2^bits - 1. The grid is
anchored at the extreme of larger magnitude, so this weight is exact:

    step  = max((hi - lo) / n, 1e-7), negative when |hi| >= |lo|
    edge  = whichever of lo, hi has the larger magnitude;  q0 = rint(edge / step)
    q0 != 0:  scale = edge / q0, bias = edge          q0 == 0:  scale = step, bias = 0
    code  = clip(rint((w - bias) / scale), 0, n)      w ≈ code · scale + bias

Anchoring at the edge and dividing by q0 also puts zero on the grid, up to rounding. The formula restates `mx.quantize`;
tests/quant/test_affine.py compares the two bit by bit.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_codellama.config import QuantArgs
from mlx_codellama.quant import mxfp4

Floats = npt.NDArray[np.float32]


def reference(w: Floats, quant: QuantArgs) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
    """Quantise by the definition above.

    w  float32 [O, I], I a multiple of quant.group_size
    → codes uint8 [O, I], scales and biases float32 [O, I/g]
    """
    n = np.float32(2**quant.bits - 1)
    grouped = w.reshape(w.shape[0], -1, quant.group_size)
    lo, hi = grouped.min(-1), grouped.max(-1)
    low_edge = np.abs(lo) > np.abs(hi)
    step = np.maximum((hi - lo) / n, np.float32(1e-7))
    step = np.where(low_edge, step, -step)
    edge = np.where(low_edge, lo, hi)
    q0 = np.rint(edge / step)
    on_grid = q0 != 0
    scales = np.where(on_grid, edge / np.where(on_grid, q0, np.float32(1)), step).astype(np.float32)
    biases = np.where(on_grid, edge, np.float32(0)).astype(np.float32)
    codes = np.clip(np.rint((grouped - biases[..., None]) / scales[..., None]), 0, n)
    return codes.astype(np.uint8).reshape(w.shape), scales, biases


def unpack(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """Codes [O, I] of MLX's packed words [O, I·bits/32]: the first code in the lowest bits; codes may cross words."""
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: npt.NDArray[np.uint8] = (stream.reshape(packed.shape[0], -1, bits) * weights).sum(-1, dtype=np.uint8)
    return codes


def quantize(w: mx.array, quant: QuantArgs) -> tuple[mx.array, ...]:
    """Quantise w [O, I] on the current stream, which must be a CPU stream.

    → (weight uint32 [O, I·bits/32], scales, biases [O, I/g] in w.dtype); for mxfp4 (weight, scales uint8 [O, I/32])
    """
    if quant.mode == "mxfp4":
        return mxfp4.quantize(w)
    weight, scales, biases = mx.quantize(w, group_size=quant.group_size, bits=quant.bits)
    return weight, scales, biases


def dequantize(arrays: tuple[mx.array, ...], quant: QuantArgs, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The weights [O, I] that `quantize` made of them, in dtype.

    Scales and biases are widened first, so code · scale + bias is rounded only once, to dtype.
    """
    weight, scales, *rest = arrays
    biases = rest[0].astype(mx.float32) if rest else None
    scales = scales if quant.mode == "mxfp4" else scales.astype(mx.float32)
    return mx.dequantize(
        weight, scales, biases, group_size=quant.group_size, bits=quant.bits, mode=quant.mode, dtype=dtype
    )
