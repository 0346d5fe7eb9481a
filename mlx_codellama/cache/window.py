"""The cache of one layer that keeps the first tokens (sinks) and the last ones (the window), and drops the rest.

A token at position p sees positions j ≤ p with j < sinks or j > p - window, however the text is cut into passes.
Keys stay rotated at the positions at which they were read, so distances inside the window are the true ones.

Storage is sinks + window tokens and no more. Until they are full, position and place are the same. Then the window
is a ring: position j ≥ sinks lies at sinks + (j - sinks) mod window, and the newest token takes the place of the one
that has just left the window. So a step writes one place and attends to all of them in any order: nothing is moved
or masked. A pass of several tokens puts the window in order, attends under a mask and writes the ring anew.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_codellama.cache.encodings import Encoding
from mlx_codellama.cache.layer import KVCache
from mlx_codellama.kernels.kv_attention_window import kv_attention_window


class WindowCache(KVCache):
    """See the module. `trim` works until the first token is dropped: what left the ring cannot come back."""

    def __init__(self, encoding: Encoding, window: int, sinks: int) -> None:
        super().__init__(encoding)
        self.window, self.sinks = window, sinks

    @property
    def dropped(self) -> int:
        return max(0, self.offset - self.window - self.sinks)

    @property
    def rewinds(self) -> bool:
        return False

    @property
    def trimmable(self) -> int:
        return 0 if self.dropped else self.offset

    def held(self) -> tuple[mx.array, mx.array]:
        return self.encoding.decode(self._in_order())

    def append(self, keys: mx.array, values: mx.array) -> None:
        new = self.encoding.encode(keys, values)
        if self._fits(keys.shape[2]):
            self._write(new)
        else:
            self._replace(self._joined(new), keys.shape[2])

    def attend(self, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array, *, scale: float) -> mx.array:
        if self._fits(length := q.shape[2]):
            q, new = self.encoding.turn(q, k, v, cos, sin)
            self._write(new)
            return self.encoding.attend(q, self._arrays, total=self.stored(self.offset), scale=scale)
        q, new = self.encoding.turn(q, k, v, cos, sin)
        joined, offset = self._joined(new), self.offset
        positions = mx.array([*self._positions(), *range(offset, offset + length)], mx.int32)
        keys, values = self.encoding.decode(joined)
        out = kv_attention_window(
            q, keys, values, positions, scale=scale, offset=offset, sinks=self.sinks, window=self.window
        )
        self._replace(joined, length)
        return out

    def _twin(self) -> KVCache:
        return WindowCache(self.encoding, self.window, self.sinks)

    def stored(self, offset: int) -> int:
        return min(offset, self.sinks + self.window)

    def _most(self, n_tokens: int) -> int:
        return self.stored(super()._most(n_tokens))

    def _fits(self, length: int) -> bool:
        """Whether `length` new tokens can be written without moving or masking any."""
        return length == 1 or self.offset + length <= self.sinks + self.window

    def _place(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.window

    def _positions(self) -> list[int]:
        """Of the tokens held, in order."""
        first = max(self.sinks, self.offset - self.window)
        return [*range(min(self.sinks, self.offset)), *range(first, self.offset)]

    def _in_order(self) -> list[mx.array]:
        places = mx.array([self._place(p) for p in self._positions()], mx.int32)
        return [mx.take(array, places, axis=2) for array in self._arrays]

    def _joined(self, new: list[mx.array]) -> list[mx.array]:
        """The tokens held, in order, and the new ones."""
        if not self._arrays:
            return new
        return [mx.concatenate(list(pair), axis=2) for pair in zip(self._in_order(), new, strict=True)]

    def _replace(self, joined: list[mx.array], length: int) -> None:
        """Fill storage from the tokens held and `length` new ones, in order."""
        before = self._positions()
        self.offset += length
        at = {p: i for i, p in enumerate([*before, *range(self.offset - length, self.offset)])}
        order = np.zeros(self.stored(self.offset), np.int32)
        for position in self._positions():
            order[self._place(position)] = at[position]
        self._arrays = [mx.take(array, mx.array(order), axis=2) for array in joined]

    def _write(self, new: list[mx.array]) -> None:
        end = self.offset + new[0].shape[2]
        if end <= self.sinks + self.window:
            super()._write(new)
            return
        self._grow(new, self.sinks + self.window)
        place = self._place(self.offset)
        for array, part in zip(self._arrays, new, strict=True):
            array[:, :, place : place + 1] = part
        self.offset = end
