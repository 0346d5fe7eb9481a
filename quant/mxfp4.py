"""MXFP4, bit for bit as `mx.quantize(mode="mxfp4")` on a CPU, but fast enough for a 70B model.

A group of 32 weights shares a power of two: the smallest that scales the largest magnitude to 6 or below. Each weight
becomes the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign. Ties take the smaller magnitude; there is no minus zero.
(OCP Microscaling Formats v1.0 gives the format; the choice of exponent and ties is MLX's.)

MLX computes the distance of each weight to sixteen values, at about 0.01 GB/s on one core. We subtract the group's
exponent from the weight's and look up the code by its top 16 bits. This is exact: dividing by a power of two changes
only the exponent, and all borders between codes have at most two mantissa bits. The bits below the top 16 matter only
as "more than a tie"; the last of the 16 bits records that.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantize(w: mx.array) -> tuple[mx.array, mx.array]:
    """w [O, I], float16, bfloat16 or float32, I a multiple of 32 → weight uint32 [O, I/8], scales uint8 [O, I/32].

    The scale of a group is 2^(its code - 127). Runs on the current stream, which must be a CPU stream.
    """
    rows, width = w.shape
    wide = w.dtype == mx.float32
    bits = np.array(w.view(mx.uint32 if wide else mx.uint16)).reshape(rows, -1, GROUP)
    magnitude = bits & bits.dtype.type(0x7FFFFFFF if wide else 0x7FFF)
    exponents = _exponents(_group_max(magnitude), w.dtype)
    if w.dtype == mx.bfloat16:
        top = magnitude.astype(np.int32)
        negative = bits & np.uint16(0x8000)
    else:
        bits = np.array(w.astype(mx.float32).view(mx.uint32)).reshape(rows, -1, GROUP)
        top = ((bits >> np.uint32(16)) & np.uint32(0x7FFF)).astype(np.int32)
        negative = ((bits >> np.uint32(16)) & np.uint32(0x8000)).astype(np.uint16)
    top -= exponents[..., None] << 7
    if w.dtype != mx.bfloat16:
        top |= (bits & np.uint32(0xFFFF)) != 0
    np.clip(top, 0, 0x7FFF, out=top)
    codes = np.take(_TABLE, top.astype(np.uint16) | negative).reshape(rows, width // 2, 2)
    packed = codes[..., 0] | (codes[..., 1] << 4)
    return mx.array(packed.view(np.uint32)), mx.array((exponents + 127).astype(np.uint8))


def _group_max(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[O, I/32, 32] → [O, I/32], by comparing neighbours across the whole array: NumPy is slow on short axes."""
    flat = values.reshape(-1)
    for _ in range(GROUP.bit_length() - 1):
        flat = np.maximum(flat[0::2], flat[1::2])
    return flat.reshape(values.shape[:-1])


def _exponents(largest: npt.NDArray[np.unsignedinteger[Any]], dtype: mx.Dtype) -> npt.NDArray[np.int32]:
    """ceil(log2(max|w| / 6)) from the bits of each group's max|w|, the quotient rounded to dtype; 0 for zeros."""
    quotient = (mx.array(largest).view(dtype) / 6).astype(mx.float32)
    exponents = mx.where(quotient == 0, 0.0, mx.ceil(mx.log2(quotient)))
    return np.array(exponents.astype(mx.int32))


def _table() -> npt.NDArray[np.uint8]:
    """Code of every bfloat16 bit pattern: 3 bits of magnitude, the sign above them."""
    patterns = np.arange(0x8000, dtype=np.uint32)
    magnitudes = (patterns << 16).view(np.float32)
    borders = np.array([(a + b) / 2 for a, b in pairwise(VALUES)], np.float32)
    codes = np.searchsorted(borders, magnitudes, side="left").astype(np.uint8)  # a border belongs to the smaller code
    codes[np.isnan(magnitudes)] = 0
    return np.concatenate([codes, np.where(codes, codes | 8, 0).astype(np.uint8)])


_TABLE = _table()
