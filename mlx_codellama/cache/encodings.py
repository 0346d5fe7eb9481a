"""How keys and values become the arrays of a cache, and how attention reads those.

An encoding's arrays have tokens on axis 2 and the kv heads on axis 1; what one token is stored as is the last axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import mlx.core as mx

from mlx_codellama.kernels.kv_attention_segments import Segment, kv_attention_segments
from mlx_codellama.kernels.kv_attention_window import Window, kv_attention_window, kv_attention_window_rows
from mlx_codellama.kernels.packed_kv import LARGEST, RowFormat
from mlx_codellama.kernels.rope import rope
from mlx_codellama.kernels.rope_append import rope_append


class Encoding(Protocol):
    """Shapes: q [B, H, L, D]; k, v [B, K, L, D]; cos, sin float32 [L, D/2]; arrays [B, K, tokens, …].

    Two encodings are equal if they store the same tokens as the same arrays.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """One for each array, as a file calls them."""
        ...

    @property
    def fmt(self) -> RowFormat | None:
        """Of packed rows; None for floats."""
        ...

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """Rotated keys and values as arrays."""
        ...

    def decode(self, arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """What attention takes for the keys and values in arrays."""
        ...

    def rotate_and_encode(
        self, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """Rotate q and k; → q, and the arrays of the new tokens."""
        ...

    def attend(self, q: mx.array, segments: Sequence[Segment], *, scale: float, prompt: bool) -> mx.array:
        """Attention of q to the tokens of all segments, the last L of which are q's own. → [B, H, L, D]

        prompt  see `kernels.kv_attention_segments`
        """
        ...

    def attend_window(
        self, q: mx.array, arrays: Sequence[mx.array], window: Window, *, total: int, scale: float
    ) -> mx.array:
        """Attention of q to what it sees of the first `total` places. → [B, H, L, D]"""
        ...


@dataclass(frozen=True)
class Floats:
    """Keys and values in two arrays [B, K, tokens, D].

    half  as 16-bit floats: in their own type where that has 16 bits, else float16, limited to its range
    """

    half: bool = False
    names: ClassVar[tuple[str, ...]] = ("keys", "values")
    fmt: ClassVar[RowFormat | None] = None

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        return [self._stored(k), self._stored(v)]

    def decode(self, arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        keys, values = arrays
        return keys, values

    def rotate_and_encode(
        self, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        return rope(q, cos, sin), self.encode(rope(k, cos, sin), v)

    def attend(self, q: mx.array, segments: Sequence[Segment], *, scale: float, prompt: bool) -> mx.array:
        return kv_attention_segments(q, segments, None, scale=scale, prompt=prompt)

    def attend_window(
        self, q: mx.array, arrays: Sequence[mx.array], window: Window, *, total: int, scale: float
    ) -> mx.array:
        keys, values = arrays
        return kv_attention_window(q, keys[:, :, :total], values[:, :, :total], window, scale=scale)

    def _stored(self, x: mx.array) -> mx.array:
        if not self.half or x.dtype != mx.float32:
            return x
        return mx.clip(x, -LARGEST, LARGEST).astype(mx.float16)


@dataclass(frozen=True)
class Rows:
    """Keys and values packed together in one uint32 array [B, K, tokens, fmt.words]: one slice update for a step."""

    fmt: RowFormat
    names: ClassVar[tuple[str, ...]] = ("rows",)

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        return [self.fmt.pack(k, v)]

    def decode(self, arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        (rows,) = arrays
        return self.fmt.unpack(rows)

    def rotate_and_encode(
        self, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        turned, rows = rope_append(q, k, v, cos, sin, self.fmt)
        return turned, [rows]

    def attend(self, q: mx.array, segments: Sequence[Segment], *, scale: float, prompt: bool) -> mx.array:
        return kv_attention_segments(q, segments, self.fmt, scale=scale, prompt=prompt)

    def attend_window(
        self, q: mx.array, arrays: Sequence[mx.array], window: Window, *, total: int, scale: float
    ) -> mx.array:
        (rows,) = arrays
        return kv_attention_window_rows(q, rows, self.fmt, window, total=total, scale=scale)
