"""Documents of any length as rows of one length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mlx_codellama.kernels.cross_entropy import IGNORE

_MISSES = 16  # documents that may fail to fit before a batch counts as full


class Batch(NamedTuple):
    """Packed rows, int32 [rows, length] each."""

    inputs: np.ndarray
    targets: np.ndarray  # IGNORE where there is nothing to predict
    starts: np.ndarray  # where in its row the document of each token begins

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())


def pack(documents: Iterable[list[int]], *, rows: int, length: int) -> Batch:
    """Place whole documents into rows, each into the first row with room, until little fits any more.

    Targets are the inputs shifted by one *within* a document; on padding they are IGNORE, and a document's last token
    is a target only, so no document is asked to predict the next one. A document longer than a row is cut to it.
    """
    inputs = np.zeros((rows, length), np.int32)
    targets = np.full((rows, length), IGNORE, np.int32)
    starts = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    used = np.zeros(rows, np.int64)
    misses = 0
    for ids in documents:
        n = min(len(ids) - 1, length)
        room = np.flatnonzero(used + n <= length)
        if n < 1 or not len(room):
            misses += 1
            if misses == _MISSES:
                break
            continue
        row, at = room[0], used[room[0]]
        inputs[row, at : at + n] = ids[:n]
        targets[row, at : at + n] = ids[1 : n + 1]
        starts[row, at : at + n] = at
        used[row] += n
        if (used == length).all():
            break
    return Batch(inputs, targets, starts)
