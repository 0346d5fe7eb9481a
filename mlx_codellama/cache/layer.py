"""The cache of one layer that keeps every token, in storage that grows in steps and is written in place."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_codellama.cache.encodings import Encoding, Floats
from mlx_codellama.kernels.decoder_block import Held
from mlx_codellama.kernels.zeros import zeros_like
from mlx_codellama.storage import STEP


class KVCache:
    """Keys and values of one layer.

    offset   tokens read and not trimmed: the position of the next one
    horizon  tokens that the text is expected to reach, which dynamic rotary scaling needs; 0 until somebody knows
    Storage past the tokens held is stale or zero and is never read: it is overwritten before it counts.
    """

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.offset = self.horizon = 0
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
        """Bytes of storage, used or not, also where they are shared with another cache."""
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
        self._write(self.encoding.encode(keys, values))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array, *, scale: float) -> mx.array:
        """Rotate L new tokens, add them, and attend from them to all held up to each.

        q [B, H, L, D]; k, v [B, K, L, D]; cos, sin float32 [L, D/2] for positions offset … → [B, H, L, D] in q.dtype
        Raises ValueError as `append`.
        """
        q, new = self.encoding.turn(q, k, v, cos, sin)
        self._write(new)
        return self.encoding.attend(q, self._arrays, total=self.offset, scale=scale)

    def room(self, n_tokens: int) -> Held | None:
        """Storage with room for n_tokens more, for a kernel that writes them there itself; `took` says that it did.

        None where that cannot be: nothing is held yet, or the tokens would displace some that they see.
        """
        if not self._arrays:
            return None
        self._grow(self._arrays, end := self.offset + n_tokens)
        return Held(self._arrays, self.offset, end, self.encoding.fmt)

    def took(self, arrays: list[mx.array], n_tokens: int) -> None:
        """The storage that `room` gave has become `arrays`, with n_tokens more."""
        self._arrays = arrays
        self.offset += n_tokens

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

    def share(self) -> KVCache:
        """A second cache that holds the same tokens, without a copy: whichever of the two is written to next copies
        the storage then, once, and the other keeps the old bytes to itself."""
        other = self._twin()
        other.offset, other.horizon, other._reserved = self.offset, self.horizon, self._reserved
        other._arrays = [array[...] for array in self._arrays]  # writing to an mx.array changes the object itself
        return other

    def _twin(self) -> KVCache:
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
        return -(-n_tokens // STEP) * STEP

    def _write(self, new: list[mx.array]) -> None:
        start, end = self.offset, self.offset + new[0].shape[2]
        self._grow(new, end)
        for array, part in zip(self._arrays, new, strict=True):
            array[:, :, start:end] = part
        self.offset = end

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
