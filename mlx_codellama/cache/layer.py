"""The tail of one layer, which keeps every token, in storage that grows in steps and is written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_codellama.cache.encodings import Encoding, Floats
from mlx_codellama.kernels.decoder_block import Held
from mlx_codellama.kernels.kv_attention_segments import Segment
from mlx_codellama.kernels.zeros import zeros_like
from mlx_codellama.storage import steps


class KVCache:
    """Keys and values of one layer, of the tokens from some position of a sequence on.

    offset  tokens that it holds: `append` has added them, or `write` and then `advance`
    Storage past the tokens held is stale or zero and is never read: it is overwritten before it counts. So a forward
    pass that fails after `write` has changed nothing.
    """

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.offset = 0
        self.encoding: Encoding = encoding or Floats()
        self._arrays: list[mx.array] = []
        self._reserved = 0

    # ── what it holds ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def capacity(self) -> int:
        """Tokens that fit before storage has to grow."""
        return self._arrays[0].shape[2] if self._arrays else 0

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or not."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """The storage itself, for mx.eval: evaluating it finishes every append made so far."""
        return list(self._arrays)

    @property
    def dropped(self) -> int:
        """Tokens read that attention no longer sees."""
        return 0

    @property
    def trimmable(self) -> int:
        """The last tokens, as many as `trim` can forget."""
        return self.offset

    def held(self) -> tuple[mx.array, mx.array]:
        """Keys (rotated) and values [B, K, tokens held, D], oldest first, as attention sees them."""
        return self.encoding.decode([array[:, :, : self.offset] for array in self._arrays])

    # ── growing and shrinking ───────────────────────────────────────────────────────────────────────────────────────

    def reserve(self, n_tokens: int) -> None:
        """Make the next growth reach at least n_tokens in all, so that a prompt of known length is copied once."""
        self._reserved = n_tokens

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add L tokens.

        keys, values  [B, K, L, D], keys already rotated. The first call fixes B, K, D and the dtype.
        Raises ValueError where B, K, D or the dtype differ from what is held.
        """
        self.write(self.encoding.encode(keys, values))
        self.advance(keys.shape[2])

    def write(self, new: list[mx.array]) -> None:
        """Store L encoded tokens [B, K, L, …] after those held. They do not count until `advance`. Raises ValueError
        as `append`."""
        start, end = self.offset, self.offset + new[0].shape[2]
        self._grow(new, end)
        for array, part in zip(self._arrays, new, strict=True):
            array[:, :, start:end] = part

    def advance(self, n_tokens: int) -> None:
        """Count the n_tokens that `write`, `attend` or `commit` stored."""
        self.offset += n_tokens

    def attend(
        self, q: mx.array, new: list[mx.array], before: Sequence[Segment] = (), *, scale: float, prompt: bool = True
    ) -> mx.array:
        """`write` L tokens, and attend from them to those before, to those held, and to one another, causally.

        q       [B, H, L, D], rotated
        new     their keys and values, encoded
        before  the tokens of the sequence that precede those held here
        → [B, H, L, D] in q.dtype. Raises ValueError as `append`.
        """
        self.write(new)
        own = Segment(self._arrays, self.offset + q.shape[2])
        return self.encoding.attend(q, [*before, own], scale=scale, prompt=prompt)

    def reserve_slot(self, n_tokens: int) -> Held | None:
        """Storage with room for n_tokens more, for a kernel that writes them there itself; `commit` says that it did.

        None if nothing is held yet, or if these tokens would evict keys that they attend to.
        """
        if not self._arrays:
            return None
        self._grow(self._arrays, end := self.offset + n_tokens)
        return Held(self._arrays, self.offset, end, self.encoding.fmt)

    def commit(self, arrays: list[mx.array]) -> None:
        """The storage that `reserve_slot` gave has become `arrays`, with tokens that `advance` will count."""
        self._arrays = arrays

    def trim(self, n_tokens: int) -> int:
        """Forget the last n_tokens (at most all). Storage is kept. Returns how many were forgotten.

        Raises ValueError for a negative count, and for more than `trimmable`.
        """
        if n_tokens < 0:
            raise ValueError(f"cannot trim {n_tokens} tokens")
        n_tokens = min(n_tokens, self.offset)
        if n_tokens > self.trimmable:
            raise ValueError(f"cannot trim {n_tokens} tokens: what they displaced is gone")
        self.offset -= n_tokens
        return n_tokens

    def twin(self) -> KVCache:
        """An empty cache of the same kind."""
        return KVCache(self.encoding)

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> dict[str, mx.array]:
        """What `restore` needs besides the offset: the tokens in storage in order, by the encoding's names."""
        used = self.offset
        return {name: array[:, :, :used] for name, array in zip(self.encoding.names, self._arrays, strict=False)}

    def holds(self, offset: int, n_stored: int) -> bool:
        """Whether `state` of a cache that has read `offset` tokens may have n_stored of them."""
        return n_stored == offset

    def restore(self, offset: int, state: Mapping[str, mx.array]) -> None:
        """Take over what `state` gave of a cache of the same kind that had read `offset` tokens.

        Raises ValueError where names or the number of tokens are not those of such a cache.
        """
        names = self.encoding.names if offset else ()
        stored = {array.shape[2] for array in state.values()}
        if set(state) != set(names) or (names and not (len(stored) == 1 and self.holds(offset, *stored))):
            raise ValueError(f"not the storage of {offset} tokens: {sorted(state)}")
        self.offset, self._arrays = offset, [state[name] for name in names]
        self._restored(*stored or (0,))

    def _restored(self, n_stored: int) -> None:
        """Put the arrays of a file, of n_stored tokens, where they belong."""

    # ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _most(self, n_tokens: int) -> int:
        """How large storage may grow for n_tokens."""
        return steps(n_tokens)

    def _grow(self, new: list[mx.array], n_tokens: int) -> None:
        """Make room for n_tokens in all, of the kind of `new`."""
        if not self._arrays:
            self._arrays = [_empty(part, self._most(max(n_tokens, self._reserved))) for part in new]
        for held, part in zip(self._arrays, new, strict=True):
            if (held.shape[:2], held.shape[3], held.dtype) != (part.shape[:2], part.shape[3], part.dtype):
                raise ValueError(f"cannot append {part.shape} {part.dtype} to a cache of {held.shape} {held.dtype}")
        if n_tokens > self.capacity:
            more = self._most(max(n_tokens, self._reserved)) - self.capacity
            self._arrays = [mx.concatenate([held, _empty(held, more)], axis=2) for held in self._arrays]


def _empty(like: mx.array, n_tokens: int) -> mx.array:
    b, k, _, width = like.shape
    return zeros_like(like, (b, k, n_tokens, width))
