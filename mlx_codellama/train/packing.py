"""Documents of any length as rows of one length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_codellama.kernels.cross_entropy import IGNORE

_MISSES = 16  # documents that may fail to fit before a batch counts as full


def pack(documents: Iterable[list[int]], *, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Place whole documents into rows, each into the first row with room, until little fits any more.

    Returns inputs and targets, int32 [rows, length] each. Targets are the inputs shifted by one *within* a document;
    after a document's last token and on padding they are IGNORE, so no document is asked to predict the next one.
    A document longer than a row is cut to it.
    """
    inputs = np.zeros((rows, length), np.int32)
    targets = np.full((rows, length), IGNORE, np.int32)
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
        used[row] += n
        if (used == length).all():
            break
    return inputs, targets
