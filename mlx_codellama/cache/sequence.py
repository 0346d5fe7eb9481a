"""A sequence: ids, and the keys and values of all layers for the tokens read so far.

    ids      [ 1 17 300 5 5 411 88 9 8 ]
    layer 0  | shared segment | shared | tail ->      segments are never written to, and may belong to many sequences;
    layer 1  | shared segment | shared | tail ->      the tail is the sequence's own and grows in place

`share` turns the tail into a segment and gives two sequences that go on with tails of their own: nothing is copied. A
segment is a storage and how many of its tokens count, so forgetting tokens of one, or sharing a part, is a number.
Tokens in a window (`WindowCache`) are never in segments: such a sequence is shared as a whole, and copied on write.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.cache.encodings import Encoding, Floats, Rows
from mlx_codellama.cache.layer import KVCache
from mlx_codellama.cache.window import WindowCache
from mlx_codellama.config import ModelArgs
from mlx_codellama.kernels.kv_attention_segments import Segment, joined
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.zeros import zeros_like
from mlx_codellama.storage import KVStorage

MOST_SEGMENTS = 5  # before a tail; kernels are fast for six pieces


class Storage:
    """The arrays of a shared segment, by layer, their tokens and bytes. Compared and hashed by identity."""

    def __init__(self, layers: list[list[mx.array]], n_tokens: int) -> None:
        self.layers, self.n_tokens = layers, n_tokens
        self.nbytes = sum(array.nbytes for arrays in layers for array in arrays)


class SharedSegment(NamedTuple):
    """Consecutive tokens in all layers: the first n_tokens of a storage that nobody writes to."""

    storage: Storage
    n_tokens: int

    def layer(self, i: int) -> Segment:
        return Segment(self.storage.layers[i], self.n_tokens)


class Layer(NamedTuple):
    """One layer of a sequence: what precedes the tail, and the tail."""

    before: list[Segment]
    tail: KVCache

    def attend(self, q: mx.array, new: list[mx.array], *, scale: float, prompt: bool) -> mx.array:
        """Store L tokens and attend from them to all up to each: see `KVCache.attend`."""
        return self.tail.attend(q, new, self.before, scale=scale, prompt=prompt)

    def held(self) -> tuple[mx.array, mx.array]:
        """Keys (rotated) and values [1, K, tokens held, D], oldest first, as attention sees them."""
        if not self.before:
            return self.tail.held()
        return self.tail.encoding.decode(self._joined())

    def state(self) -> dict[str, mx.array]:
        """The stored tokens in order, by the encoding's names; empty without any."""
        if not self.before:
            return self.tail.state()
        return dict(zip(self.tail.encoding.names, self._joined(), strict=True))

    def _joined(self) -> list[mx.array]:
        own = [Segment(self.tail.arrays, self.tail.offset)] if self.tail.offset else []
        return joined([*self.before, *own])


class _Tail:
    """What a tail's bytes are counted as. The holders are more than one only while a window is shared."""

    def __init__(self, holder: Sequence) -> None:
        self.holders = weakref.WeakSet([holder])


class Sequence:
    """Tokens that a model has read, and what it remembers of them.

    ids      of these tokens as far as the host knows them: whoever reads tokens appends theirs. May be shorter than
             `offset` while a token is still on the device
    horizon  tokens that the text is expected to reach, which dynamic rotary scaling needs; 0 until somebody knows
    """

    def __init__(self, tails: list[KVCache]) -> None:
        self.ids: list[int] = []
        self.horizon = 0
        self._segments: list[SharedSegment] = []
        self._n_shared = self._reserved = 0
        self._tails, self._tail = tails, _Tail(self)
        self._keep([])

    # ── what it holds ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def offset(self) -> int:
        """Tokens read and not trimmed: the position of the next one."""
        return self._n_shared + self._tails[0].offset

    @property
    def encoding(self) -> Encoding:
        return self._tails[0].encoding

    @property
    def dropped(self) -> int:
        """Tokens read that attention no longer sees."""
        return self._tails[0].dropped

    @property
    def trimmable(self) -> int:
        """The last tokens, as many as `trim` can forget."""
        return self._n_shared + self._tails[0].trimmable

    @property
    def segments(self) -> list[SharedSegment]:
        """The shared segments before the tail, oldest first."""
        return list(self._segments)

    @property
    def storages(self) -> dict[object, int]:
        """The bytes of each piece of storage it refers to. A piece that two sequences share has one key in both."""
        pieces: dict[object, int] = {segment.storage: segment.storage.nbytes for segment in self._segments}
        pieces[self._tail] = sum(tail.nbytes for tail in self._tails)
        return pieces

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or not, shared or not."""
        return sum(self.storages.values())

    @property
    def copies_on_write(self) -> bool:
        """Whether the next tokens copy what is held first: a window that another sequence holds too."""
        return len(self._tail.holders) > 1

    @property
    def arrays(self) -> list[mx.array]:
        """For mx.eval: evaluating these finishes everything appended so far."""
        return [array for tail in self._tails for array in tail.arrays]

    @property
    def is_sound(self) -> bool:
        """Whether all layers hold the same tokens: not if Ctrl-C came while they were counted."""
        return len({tail.offset for tail in self._tails}) == 1

    def layer(self, i: int) -> Layer:
        """What attention of layer i reads and writes."""
        return self._layers[i]

    # ── growing and shrinking ───────────────────────────────────────────────────────────────────────────────────────

    def reserve(self, n_tokens: int) -> None:
        """Make the next growth reach at least n_tokens in all, so that a prompt of known length is copied once."""
        self._reserved = n_tokens
        for tail in self._tails:
            tail.reserve(max(0, n_tokens - self._n_shared))

    def advance(self, n_tokens: int) -> None:
        """Count n_tokens that every layer has stored. A forward pass calls it once, after its last layer."""
        if self.copies_on_write:
            self._tail.holders.discard(self)
            self._tail = _Tail(self)
        for tail in self._tails:
            tail.advance(n_tokens)

    def trim(self, n_tokens: int) -> int:
        """Forget the last n_tokens (at most all). Storage is kept. Returns how many were forgotten.

        Raises ValueError for a negative count, and for more than `trimmable`.
        """
        if n_tokens < 0:
            raise ValueError(f"cannot trim {n_tokens} tokens")
        n_tokens = min(n_tokens, self.offset)
        own = min(n_tokens, self._tails[0].offset)
        for tail in self._tails:
            tail.trim(own)
        if n_tokens > own:
            self._keep(_first(self._segments, self._n_shared + own - n_tokens))
        del self.ids[self.offset :]
        return n_tokens

    # ── sharing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def can_share(self, n_tokens: int) -> bool:
        """Whether `share` can give a sequence of the first n_tokens. A window has them all or none."""
        whole = isinstance(self._tails[0], WindowCache)
        return n_tokens == self.offset if whole else 0 <= n_tokens <= self.offset

    def free_to_share(self, n_tokens: int) -> int:
        """How many of the first n_tokens `share` gives without a copy."""
        n_tokens = min(n_tokens, self.offset)
        own = max(0, n_tokens - self._n_shared)
        if 2 * own < self._tails[0].offset:
            own = 0
        return own + sum(segment.n_tokens for segment in _first(self._segments, n_tokens) if _is_most(segment))

    def share(self, n_tokens: int | None = None) -> Sequence:
        """Another sequence that begins with the first n_tokens (default: all), without a copy.

        Both go on with tails of their own. Waits until what they share is computed. If there would be more than
        MOST_SEGMENTS before the tail, the smallest neighbours are copied into one; less than half of a segment is
        copied, too, since a few tokens would keep all of it in memory. Raises ValueError if not `can_share`.
        """
        n_tokens = self.offset if n_tokens is None else n_tokens
        if not self.can_share(n_tokens):
            raise ValueError(f"cannot share {n_tokens} tokens of {self.offset}")
        windows = [tail for tail in self._tails if isinstance(tail, WindowCache)]
        if windows:
            other = Sequence([tail.share() for tail in windows])
            other._tail = self._tail
            other._tail.holders.add(other)
        else:
            own = n_tokens - self._n_shared
            copies = 0 < 2 * own < self._tails[0].offset
            if own > 0 and not copies:
                self._freeze()
            kept = [one if _is_most(one) else _copied(*one) for one in _first(self._segments, n_tokens)]
            if copies:
                kept.append(_copied(Storage([tail.arrays for tail in self._tails], own), own))
            other = Sequence([tail.twin() for tail in self._tails])
            other._keep(_few(kept))
        other.ids, other.horizon = self.ids[:n_tokens], self.horizon
        return other

    def _freeze(self) -> None:
        """Make the tail a shared segment, and begin a new one."""
        n_tokens = self._tails[0].offset
        mx.eval(self.arrays)
        storage = Storage([tail.arrays for tail in self._tails], n_tokens)
        self._keep(_few([*self._segments, SharedSegment(storage, n_tokens)]), [tail.twin() for tail in self._tails])

    def _keep(self, segments: list[SharedSegment], tails: list[KVCache] | None = None) -> None:
        """Have these segments before the tail, and these tails in place of those there are."""
        n_shared = sum(segment.n_tokens for segment in segments)
        before = [[segment.layer(i) for segment in segments] for i in range(len(self._tails))]
        layers = [Layer(*one) for one in zip(before, tails or self._tails, strict=True)]
        held, tail = (self._tails, self._tail) if tails is None else (tails, _Tail(self))
        # One statement without calls, which no Ctrl-C can cut in two.
        self._segments, self._n_shared, self._layers, self._tails, self._tail = segments, n_shared, layers, held, tail
        self.reserve(self._reserved)

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> list[dict[str, mx.array]]:
        """For each layer the stored tokens in order, by the encoding's names: with `offset`, what `restore` needs."""
        return [layer.state() for layer in self._layers]

    def holds(self, offset: int, n_stored: int) -> bool:
        """Whether `state` of a sequence of this kind that has read `offset` tokens may have n_stored of them."""
        return self._tails[0].holds(offset, n_stored)

    def restore(self, ids: list[int], states: Iterable[Mapping[str, mx.array]]) -> None:
        """Take over, layer by layer, what `state` gave of a sequence of the same kind that had read these ids.

        Raises ValueError where names or the number of tokens are not those of such a sequence.
        """
        tails = [tail.twin() for tail in self._tails]
        for tail, state in zip(tails, states, strict=True):
            tail.restore(len(ids), state)
            mx.eval(tail.arrays)
        self.ids = list(ids)
        self._keep([], tails)


def make_sequence(args: ModelArgs, storage: KVStorage | None = None) -> Sequence:
    """An empty sequence. Raises ConfigError where the model's heads cannot be stored so."""
    storage = storage or KVStorage()
    encoding: Encoding = Floats(half=storage.k_bits == 16)
    if storage.packed and storage.bits is not None:
        encoding = Rows(RowFormat(args.head_dim, *storage.bits))
    if storage.window is None:
        return Sequence([KVCache(encoding) for _ in range(args.num_hidden_layers)])
    return Sequence([WindowCache(encoding, storage.window, storage.sinks) for _ in range(args.num_hidden_layers)])


def _first(segments: list[SharedSegment], n_tokens: int) -> list[SharedSegment]:
    """The segments of the first n_tokens."""
    kept = []
    for segment in segments:
        if n_tokens <= 0:
            break
        kept.append(SharedSegment(segment.storage, min(n_tokens, segment.n_tokens)))
        n_tokens -= segment.n_tokens
    return kept


def _is_most(segment: SharedSegment) -> bool:
    return 2 * segment.n_tokens >= segment.storage.n_tokens


def _copied(storage: Storage, n_tokens: int) -> SharedSegment:
    """The first n_tokens of a storage in one of their own."""
    layers = []
    for arrays in storage.layers:
        layers.append([_copy(array, n_tokens) for array in arrays])
        mx.eval(layers[-1])
    return SharedSegment(Storage(layers, n_tokens), n_tokens)


def _copy(array: mx.array, n_tokens: int) -> mx.array:
    b, k, _, width = array.shape
    new = zeros_like(array, (b, k, n_tokens, width))
    new[...] = array[:, :, :n_tokens]  # a slice alone may be a view, which keeps all of the array
    return new


def _few(segments: list[SharedSegment]) -> list[SharedSegment]:
    """The same tokens in at most MOST_SEGMENTS segments."""
    segments = list(segments)
    while len(segments) > MOST_SEGMENTS:
        i = min(range(len(segments) - 1), key=lambda i: segments[i].n_tokens + segments[i + 1].n_tokens)
        pair = segments[i : i + 2]
        layers = []
        for k in range(len(pair[0].storage.layers)):
            layers.append(joined([segment.layer(k) for segment in pair]))
            mx.eval(layers[-1])
        n_tokens = sum(segment.n_tokens for segment in pair)
        segments[i : i + 2] = [SharedSegment(Storage(layers, n_tokens), n_tokens)]
    return segments
