"""Documents of any length as batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from mlx_codellama.kernels.cross_entropy import IGNORE

_MISSES = 16  # a batch is full after this many documents that do not fit


class Batch(NamedTuple):
    """Pieces of documents, concatenated. No piece attends to another."""

    ids: np.ndarray  # int32 [N]
    targets: np.ndarray  # int32 [N], the next id in the same document; IGNORE if there is none
    lengths: tuple[int, ...]  # of the pieces; their sum is N
    n_dropped: int = 0  # tokens of a document that begins here and that no other batch continues

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())


def pack(documents: Iterable[list[int]], *, n_tokens: int, longest: int) -> Batch:
    """One batch of randomly drawn documents, like `packed`; documents that do not fit are skipped."""
    pieces, _, n_left = _fill([], iter(documents), n_tokens, longest)
    return _batch(pieces)._replace(n_dropped=n_left)


def packed(documents: Iterable[list[int]], *, n_tokens: int, longest: int) -> Iterator[Batch]:
    """Batches of at most n_tokens, until every target of every document has been in one.

    A document longer than `longest` tokens is cut into pieces of that length. If a document does not fit into a batch,
    it waits for the next, and shorter ones overtake it. Only a document larger than a whole batch spans several. The
    last token of a document is only a target, so no token predicts the next document.
    """
    waiting, source = list[list[int]](), iter(documents)
    while True:
        pieces, waiting, _ = _fill(waiting, source, n_tokens, longest)
        if not pieces:
            return
        yield _batch(pieces)


def _fill(
    waiting: list[list[int]], source: Iterator[list[int]], n_tokens: int, longest: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """→ pieces for one batch, each with the token after it; what waits for the next batch; and how many tokens of
    that belong to a document that has begun."""
    first = iter(waiting)
    pieces, missed, n_left, room = list[list[int]](), list[list[int]](), 0, n_tokens
    for ids in chain(first, source):
        n = len(ids) - 1
        if n > room and (n <= n_tokens or pieces):
            missed.append(ids)
        else:
            end = min(n, room)
            pieces += [ids[at : min(at + longest, end) + 1] for at in range(0, end, longest)]
            room -= end
            if end < n:
                missed.append(ids[end:])
                n_left = n - end
        if not room or len(missed) == _MISSES:
            break
    return pieces, [*missed, *first], n_left


def _batch(pieces: list[list[int]]) -> Batch:
    ids = np.array([id for piece in pieces for id in piece[:-1]], np.int32)
    targets = np.array([id for piece in pieces for id in piece[1:]], np.int32)
    return Batch(ids, targets, tuple(len(piece) - 1 for piece in pieces))
