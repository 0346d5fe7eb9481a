"""Packed rows: keys and values of one token and one kv head in one row of 32-bit words.

A row of a cache with both parts quantised, D = head_dim, G = group_size, the first word to the left:

    | K codes: D·k_bits/32 | V codes: D·v_bits/32 | K scale, bias: D/G | V scale, bias: D/G |

A part at 4 or 8 bits holds unsigned codes, little end first (element i of a word at bit i · bits), as MLX packs
them, and one word for each group of G elements: float16 scale in the low half, float16 bias in the high half. A part
at 16 bits holds float16 values, two to a word, and has no scale words. All of a row lies together, so one step of
generation is one slice update, and a kernel reads a token from one place.

What `pack` does to a group, every step in float32 unless another type is named (`rint` takes halves to even):

    x      = the input as float32, limited to ±65504
    scale  = float16((max(x) - min(x)) · float32(1 / (2^bits - 1)))
    bias   = float16(min(x))
    code   = limited to 0 … 2^bits - 1:  rint((x - bias) · (1 / scale));  0 where scale is 0
    value  = code · scale + bias

The codes are those of the *rounded* scale and bias, so the rounding of the pair costs no accuracy inside the range.
This is simpler than mx.quantize, which moves the scale until 0 is a code and finds the codes with the unrounded
scale: keys and values have no reason to keep 0 exact, and this form leaves a kernel nothing that depends on how a
machine divides, but for the one 1 / scale. A kernel must give the same scale and bias to the bit, and the same codes
except where (x - bias) · (1 / scale) is within 2^-20 of its own size of a tie; there it may be off by one.
The range of NaN is not defined; a kernel may do what it likes with it, in its own group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_codellama.errors import ConfigError

Bits = Literal[4, 8, 16]

LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class RowFormat:
    """How a row is laid out; counts and starts are in 32-bit words.

    D=128: 4/4 bits → 36 words (144 bytes), 8/4 → 52, 8/8 → 68, 16/16 → 128.
    Raises ConfigError for other widths than 4, 8, 16, and for a head that does not divide into groups.
    """

    head_dim: int
    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        for bits in (self.k_bits, self.v_bits):
            if bits not in (4, 8, 16):
                raise ConfigError(f"keys and values cannot have {bits} bits", hint="use 16, 8 or 4")
        quantised = min(self.k_bits, self.v_bits) < 16
        if self.head_dim % (32 if quantised else 2):
            raise ConfigError(
                f"heads of {self.head_dim} cannot be packed at {self.k_bits} and {self.v_bits} bits",
                hint="8 and 4 bits need heads of a multiple of 32 values; use 16 bits",
            )

    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias: 64, or 32 where the head does not divide by 64."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def k_words(self) -> int:
        return self.head_dim * self.k_bits // 32

    @property
    def v_words(self) -> int:
        return self.head_dim * self.v_bits // 32

    @property
    def k_scale_words(self) -> int:
        return 0 if self.k_bits == 16 else self.head_dim // self.group_size

    @property
    def v_scale_words(self) -> int:
        return 0 if self.v_bits == 16 else self.head_dim // self.group_size

    @property
    def scale_words(self) -> int:
        return self.k_scale_words + self.v_scale_words

    @property
    def v_start(self) -> int:
        return self.k_words

    @property
    def k_scale_start(self) -> int:
        return self.k_words + self.v_words

    @property
    def v_scale_start(self) -> int:
        return self.k_words + self.v_words + self.k_scale_words

    @property
    def words(self) -> int:
        """Words of a row."""
        return self.k_words + self.v_words + self.scale_words

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return 4 * self.words

    def pack(self, k: mx.array, v: mx.array) -> mx.array:
        """k, v [..., D], any float type, → uint32 rows [..., words]."""
        k_part, k_scales = _packed(k, self.k_bits, self.group_size)
        v_part, v_scales = _packed(v, self.v_bits, self.group_size)
        return mx.concatenate([k_part, v_part, *k_scales, *v_scales], axis=-1)

    def unpack(self, rows: mx.array, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
        """uint32 rows [..., words] → k, v [..., D], computed in float32 and rounded to dtype once."""
        k_scales = rows[..., self.k_scale_start : self.v_scale_start]
        v_scales = rows[..., self.v_scale_start :]
        k = _unpacked(rows[..., : self.v_start], k_scales, self.k_bits, self.group_size, dtype)
        v = _unpacked(rows[..., self.v_start : self.k_scale_start], v_scales, self.v_bits, self.group_size, dtype)
        return k, v


def _packed(x: mx.array, bits: int, group: int) -> tuple[mx.array, list[mx.array]]:
    """x [..., D] → its words [..., D·bits/32], and a list of the scale words [..., D/group] or of nothing."""
    x = mx.clip(x.astype(mx.float32), -LARGEST, LARGEST)
    if bits == 16:
        return x.astype(mx.float16).view(mx.uint32), []
    top, per_word = 2**bits - 1, 32 // bits
    groups = x.reshape(*x.shape[:-1], -1, group)  # [..., D/group, group]
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    pair = mx.concatenate([(high - low) * mx.array(1 / top, mx.float32), low], axis=-1).astype(mx.float16)
    scale, bias = pair[..., :1].astype(mx.float32), pair[..., 1:].astype(mx.float32)
    inverse = mx.where(scale > 0, 1 / mx.where(scale > 0, scale, 1.0), 0.0)
    codes = mx.clip(mx.round((groups - bias) * inverse), 0, top).astype(mx.uint32)
    codes = codes.reshape(*x.shape[:-1], -1, per_word) << mx.arange(0, 32, bits, dtype=mx.uint32)
    return codes.sum(axis=-1), [pair.view(mx.uint32)[..., 0]]


def _unpacked(words: mx.array, scales: mx.array, bits: int, group: int, dtype: mx.Dtype) -> mx.array:
    if bits == 16:
        return mx.contiguous(words).view(mx.float16).astype(dtype)
    halves = mx.contiguous(scales)[..., None].view(mx.float16).astype(mx.float32)  # [..., D/group, 2]
    wide = mx.dequantize(words, halves[..., 0], halves[..., 1], group_size=group, bits=bits)
    return wide.astype(dtype)
