"""The tail of one layer that keeps the first tokens (sinks) and the last ones (the window), and drops the rest.

A token at position p sees positions j ≤ p with j < sinks or j > p - window, however the text is cut into passes.
Keys stay rotated at the positions at which they were read, so distances inside the window are the true ones.

Storage is sinks + window + SPARE tokens and no more. Until they are full, position and place are the same. Then the
places after the sinks are a ring of window + SPARE: position j ≥ sinks lies at sinks + (j - sinks) mod ring, and a new
token takes the place of one that left the window SPARE tokens ago. A pass of a few tokens writes their places, moves
nothing, and the kernels pass over what a query does not see. What the last SPARE tokens displaced was outside the
window before they came, so they can be trimmed. A longer pass puts the tokens held in order, attends to them and the
new ones, and keeps the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_codellama.cache.encodings import Encoding
from mlx_codellama.cache.layer import KVCache
from mlx_codellama.kernels.decoder_block import Held
from mlx_codellama.kernels.kv_attention_segments import Segment
from mlx_codellama.kernels.kv_attention_window import Window
from mlx_codellama.kernels.zeros import zeros_like
from mlx_codellama.storage import SPARE


class WindowCache(KVCache):
    """See the module. `trim` forgets everything until the ring has overwritten a token; from then on at least the
    tokens of the last pass where they were at most SPARE, and at most SPARE."""

    def __init__(self, encoding: Encoding, window: int, sinks: int) -> None:
        super().__init__(encoding)
        self.window, self.sinks, self.ring = window, sinks, window + SPARE
        self._first = sinks  # the first position after the sinks that is still there, or will be
        self._next: tuple[list[mx.array], int] | None = None  # the storage and the first position after `advance`

    @property
    def dropped(self) -> int:
        return max(0, self.offset - self.window - self.sinks)

    @property
    def trimmable(self) -> int:
        return self.offset if self._first == self.sinks else max(0, self.offset - self.window - self._first)

    def held(self) -> tuple[mx.array, mx.array]:
        return self.encoding.decode(self._in_order(max(self.sinks, self.offset - self.window)))

    def write(self, new: list[mx.array]) -> None:
        length, self._next = new[0].shape[2], None
        if self._fits(length):
            self._write(new)
        else:
            self._next = self._kept(self._joined(new), length)

    def advance(self, n_tokens: int) -> None:
        arrays, first = self._next or (self._arrays, self._first)
        # One statement without calls, which no Ctrl-C can cut in two.
        self._arrays, self._first, self._next, self.offset = arrays, first, None, self.offset + n_tokens

    def attend(
        self, q: mx.array, new: list[mx.array], before: Sequence[Segment] = (), *, scale: float, prompt: bool = True
    ) -> mx.array:
        if before:
            raise ValueError("a window keeps all of its tokens in one place")
        length, self._next = q.shape[2], None
        end = self.offset + length
        if self._fits(length):
            self._write(new)
            total = min(end, self.sinks + self.ring)
            if end <= self.sinks + self.window:
                return self.encoding.attend(q, [Segment(self._arrays, total)], scale=scale, prompt=prompt)
            window = Window(self.sinks, self.window, self._place(self.offset), self.ring)
            return self.encoding.attend_window(q, self._arrays, window, total=total, scale=scale)
        joined = self._joined(new)
        total = joined[0].shape[2]
        window = Window(self.sinks, self.window, total - length)
        out = self.encoding.attend_window(q, joined, window, total=total, scale=scale)
        self._next = self._kept(joined, length)
        return out

    def share(self) -> WindowCache:
        """A second cache that holds the same tokens, without a copy: whichever of the two is written to next copies
        the storage then, once, and the other keeps the old bytes to itself."""
        other = self.twin()
        other.offset, other._reserved, other._first = self.offset, self._reserved, self._first
        other._arrays = [array[...] for array in self._arrays]  # writing to an mx.array changes the object itself
        return other

    def reserve_slot(self, n_tokens: int) -> Held | None:
        self._next = None
        if self._first != self.sinks or self.offset + n_tokens > self.sinks + self.window:
            return None  # some token may not be seen, which the kernel of a whole layer does not know of
        return super().reserve_slot(n_tokens)

    def twin(self) -> WindowCache:
        return WindowCache(self.encoding, self.window, self.sinks)

    # ── files: tokens in order, as many as are still true ───────────────────────────────────────────────────────────

    def state(self) -> dict[str, mx.array]:
        return dict(zip(self.encoding.names, self._in_order(self._first), strict=False)) if self._arrays else {}

    def holds(self, offset: int, n_stored: int) -> bool:
        least, most = (min(offset, self.sinks + n) for n in (self.window, self.ring))
        return least <= n_stored <= most

    def _restored(self, n_stored: int) -> None:
        self._first = max(self.sinks, self.offset - n_stored + self.sinks)
        if self._first > self.sinks:
            self._arrays = [_ring(array, self.sinks, self._first, self.ring) for array in self._arrays]

    # ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _most(self, n_tokens: int) -> int:
        return min(super()._most(n_tokens), self.sinks + self.ring)

    def _fits(self, length: int) -> bool:
        """Whether `length` new tokens can be written where they belong, without moving any."""
        within = self.offset + length <= self.sinks + self.window
        return within or (length <= SPARE and self.offset >= self.sinks)

    def _place(self, position: int) -> int:
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.ring

    def _spans(self, first: int) -> list[tuple[int, int]]:
        """The places of the sinks and of the tokens from position `first` on, in order."""
        if self.offset <= first:
            return [(0, self.offset)]
        start, end = self._place(first), self._place(self.offset - 1) + 1
        if start < end:
            return [(0, end)] if start == self.sinks else [(0, self.sinks), (start, end)]
        return [(0, self.sinks), (start, self.sinks + self.ring), (self.sinks, end)]

    def _in_order(self, first: int) -> list[mx.array]:
        """The sinks, and the tokens from position `first` on."""
        return [_cut(array, self._spans(first)) for array in self._arrays]

    def _joined(self, new: list[mx.array]) -> list[mx.array]:
        """The tokens held, in order, and the new ones."""
        if not self._arrays or not self.offset:
            return new
        spans = self._spans(self._first)
        return [_cut(array, spans, part) for array, part in zip(self._arrays, new, strict=True)]

    def _kept(self, joined: list[mx.array], length: int) -> tuple[list[mx.array], int]:
        """Storage filled from the end of the tokens held and `length` new ones, in order, and its first position."""
        total, offset = joined[0].shape[2], self.offset + length
        first = max(self.sinks, offset - self.ring)  # the pass is longer than what trims left out
        if first > self.sinks:
            last = total - (first - self.sinks) % self.ring  # the place before it is the last one of the ring
            spans = [(0, self.sinks), (last, total), (total - self.ring, last)]
            return [_cut(array, spans) for array in joined], first
        return [_roomy(array, self._most(max(offset, self._reserved))) for array in joined], first

    def _write(self, new: list[mx.array]) -> None:
        start, end = self.offset, self.offset + new[0].shape[2]
        self._grow(new, min(end, self.sinks + self.ring))
        place, room = self._place(start), self.sinks + self.ring
        split = min(end - start, room - place)
        for array, part in zip(self._arrays, new, strict=True):
            array[:, :, place : place + split] = part[:, :, :split]
            if split < end - start:
                array[:, :, self.sinks : self.sinks + end - start - split] = part[:, :, split:]
        self._first = max(self._first, end - self.ring)


def _cut(array: mx.array, spans: list[tuple[int, int]], *more: mx.array) -> mx.array:
    """These spans of places, one after the other, and what follows them."""
    parts = [*(array[:, :, start:end] for start, end in spans if start < end), *more]
    if len(parts) > 1:
        return mx.concatenate(parts, axis=2)
    return parts[0] if parts else array[:, :, :0]


def _ring(array: mx.array, sinks: int, first: int, ring: int) -> mx.array:
    """Storage of the sinks and a ring, from an array in order: the sinks, and positions `first` … after them."""
    full, turn = _roomy(array, sinks + ring), sinks + ring - (first - sinks) % ring
    return _cut(full, [(0, sinks), (turn, sinks + ring), (sinks, turn)])


def _roomy(array: mx.array, n_tokens: int) -> mx.array:
    """The array, with zeros after it up to n_tokens."""
    b, k, held, width = array.shape
    if held >= n_tokens:
        return array
    return mx.concatenate([array, zeros_like(array, (b, k, n_tokens - held, width))], axis=2)
