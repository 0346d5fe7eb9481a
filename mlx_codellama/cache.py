"""What attention remembers: keys and values of the tokens read so far, one cache per layer."""

from __future__ import annotations

import mlx.core as mx

from mlx_codellama.config import ModelArgs

STEP = 256  # tokens by which storage grows


class KVCache:
    """Keys and values of one layer, [B, K, T, D] each, in storage that grows in steps and is written in place.

    offset  tokens held. Storage past offset is stale or zero and is never read: it is overwritten before it counts.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._reserved = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before storage has to grow."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or not."""
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

    @property
    def arrays(self) -> list[mx.array]:
        """The storage itself, for mx.eval: evaluating it finishes every append made so far."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def reserve(self, n_tokens: int) -> None:
        """Make the next growth reach at least n_tokens in all, so that a prompt of known length is copied once."""
        self._reserved = n_tokens

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add L new tokens; return all of them.

        keys, values  [B, K, L, D], keys already rotated. The first call fixes B, K, D and the dtype.
        → two arrays [B, K, T, D] with T = offset + L; offset is T afterwards.
        Raises ValueError where B, K, D or the dtype differ from what is held.
        """
        start, end = self.offset, self.offset + keys.shape[2]
        if self._keys is None or self._values is None:
            capacity = _rounded(max(end, self._reserved))
            self._keys, self._values = _empty(keys, capacity), _empty(values, capacity)
        for held, new in ((self._keys, keys), (self._values, values)):
            if (held.shape[:2], held.shape[3], held.dtype) != (new.shape[:2], new.shape[3], new.dtype):
                raise ValueError(f"cannot append {new.shape} {new.dtype} to a cache of {held.shape} {held.dtype}")
        if end > self.capacity:
            more = _rounded(max(end, self._reserved)) - self.capacity
            self._keys = mx.concatenate([self._keys, _empty(keys, more)], axis=2)
            self._values = mx.concatenate([self._values, _empty(values, more)], axis=2)
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.offset = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def trim(self, n_tokens: int) -> int:
        """Forget the last n_tokens (at most all). Storage is kept. Returns how many were forgotten.

        Raises ValueError for a negative count.
        """
        if n_tokens < 0:
            raise ValueError(f"cannot trim {n_tokens} tokens")
        n_tokens = min(n_tokens, self.offset)
        self.offset -= n_tokens
        return n_tokens


def make_cache(args: ModelArgs) -> list[KVCache]:
    """One empty cache per layer."""
    return [KVCache() for _ in range(args.num_hidden_layers)]


def _rounded(n_tokens: int) -> int:
    return -(-n_tokens // STEP) * STEP


def _empty(like: mx.array, n_tokens: int) -> mx.array:
    b, k, _, d = like.shape
    return mx.zeros((b, k, n_tokens, d), like.dtype)
