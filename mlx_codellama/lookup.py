"""Prompt lookup: draft tokens from the context, so that one forward pass can check several.

There is no second model. If the last tokens occurred before, the draft is what followed them then (prompt lookup
decoding, A. Saxena 2023; verified as in speculative decoding, arXiv:2211.17192, with a draft of probability 1).
This module knows only ids and seconds; `engine` runs the passes, accepts tokens and trims the cache.

Three parts: where to copy from (Source), how likely the next tokens are right (Odds), and what a pass of a given number
of rows costs (Costs). Lookup combines them: it drafts the number of tokens that pays most, which may be none.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

NGRAM = 3  # the last tokens that must have occurred before
KEPT = 8  # occurrences to remember for each n-gram, the latest ones
REACH = 24  # after a mismatch, copying resumes within this many tokens
ROWS = (1, 2, 4, 8)  # of a step: the last token and the draft. In wider steps a row's bits would depend on the others
GAIN = 1.15  # a wider pass must promise this many times the tokens per second


class Guess(NamedTuple):
    """An id expected next, the place it is copied from, and the number of ids of an edit before it at that place."""

    id: int
    place: int
    part: int = 0


class Source:
    """The known ids, the place being copied from, and so the ids expected next.

    After a mismatch we continue one token further in the source, or just after the next occurrence of the last token.
    We remember what was written instead of the source's text as an edit, so a rename is expected from its second
    occurrence on. All this is a guess that cannot change the answer.
    """

    def __init__(self, ids: Sequence[int], depth: int) -> None:
        """depth  number of ids to expect, if possible; an edit may exceed it"""
        self.ids: list[int] = []
        self.expected: list[Guess] = []
        self.streak = 0  # right guesses in a row; after a jump, equal ids before both places
        self._depth = depth
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram → its latest end
        self._earlier: list[int] = []  # per end of an n-gram: the previous end of the same one, or -1
        self._cursor: int | None = None  # the place after the expected ids
        self._broken: tuple[int, int] | None = None  # (place in the source, place in the answer) of a mismatch
        self._edits: dict[int, tuple[list[int], list[int]]] = {}  # first id → (what the source has, what was written)
        for id in ids:
            self._append(id)
        self._expect()

    def settle(self, ids: Sequence[int]) -> None:
        """Add the new ids: the expected ones as far as they were right, and at most one more."""
        for id in ids:
            guess = self.expected.pop(0) if self.expected else None
            if guess is None:
                self._cursor, self._broken, self.streak = None, None, 0
            elif guess.id == id:
                self.streak += 1
                if self._broken is not None:
                    self._learn(guess.place)
            else:
                self.expected.clear()
                self._edits.pop(self.ids[guess.place], None)
                self._broken = self._broken or (guess.place, len(self.ids) - guess.part)
                self._cursor, self.streak = guess.place + 1, 0
            self._append(id)
        self._expect()

    def _append(self, id: int) -> None:
        self.ids.append(id)
        if len(self.ids) >= NGRAM:
            key = tuple(self.ids[-NGRAM:])
            self._earlier.append(self._latest.get(key, -1))
            self._latest[key] = len(self.ids)

    def _expect(self) -> None:
        """Fill `expected` up to its depth. In a repeating text the source can overlap the expected ids."""
        if not self.expected:
            self._cursor = self._resume()
        at, known = self._cursor, len(self.ids)
        while at is not None and len(self.expected) < self._depth:
            if at >= known + len(self.expected):
                break
            id = self.ids[at] if at < known else self.expected[at - known].id
            old, new = self._edits.get(id, ((), ()))
            if old and self.ids[at : at + len(old)] == old:
                self.expected += [Guess(id, at, part) for part, id in enumerate(new)]
                at += len(old)
            else:
                self.expected.append(Guess(id, at))
                at += 1
        self._cursor = at

    def _learn(self, place: int) -> None:
        """Resume copying at `place`, before the next id, and remember the ids since the mismatch as an edit."""
        assert self._broken is not None
        was, written = self._broken
        old, new = self.ids[was:place], self.ids[written:]
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        if 0 < len(old) <= REACH and 0 < len(new) <= REACH:
            self._edits[old[0]] = old, new
        self._broken = None

    def _resume(self) -> int | None:
        """The place to copy from after a mismatch."""
        ids = self.ids
        if self._cursor is not None and self._broken is None:
            return self._cursor
        place, agreed = self._longest()
        if self._cursor is not None and self._broken is not None and agreed < 2 * NGRAM:
            was, written = self._broken
            if len(ids) - written <= REACH:
                near = range(was, min(was + REACH, written))
                found = next((at + 1 for at in near if ids[at] == ids[-1]), None)
                return self._cursor if found is None else found
        self._broken = None
        self.streak = agreed // 2
        return place

    def _longest(self) -> tuple[int | None, int]:
        """(place, number of equal ids before it) of the longest and latest match; (None, 0) if there is none."""
        ids, n = self.ids, len(self.ids)
        best: tuple[int | None, int] = None, 0
        place = n
        for _ in range(KEPT):
            place = self._earlier[place - NGRAM] if place >= NGRAM else -1
            if place < 0:
                break
            agreed = NGRAM
            while agreed < 4 * NGRAM and agreed < place and ids[place - 1 - agreed] == ids[n - 1 - agreed]:
                agreed += 1
            if agreed > best[1]:
                best = place, agreed
        return best


class Odds:
    """The rate of right guesses by the number of right ones before: recent observations and a modest prior."""

    BOUNDS = (1, 3, 6, 12, 24)  # streaks at which the classes begin
    BELIEF = (0.15, 0.3, 0.4, 0.6, 0.75, 0.85)
    FADE = 0.98

    def __init__(self) -> None:
        self._right = [4 * p for p in self.BELIEF]
        self._all = [4.0] * len(self.BELIEF)

    def note(self, streak: int, right: bool) -> None:
        i = self._class(streak)
        self._right[i] = self._right[i] * self.FADE + right
        self._all[i] = self._all[i] * self.FADE + 1

    def of(self, streak: int) -> float:
        i = self._class(streak)
        return self._right[i] / self._all[i]

    def expected(self, streak: int, n: int) -> float:
        """The expected number of right guesses, out of n, before the first wrong one."""
        total, all_right = 0.0, 1.0
        for i in range(n):
            all_right *= self.of(streak + i)
            total += all_right
        return total

    def _class(self, streak: int) -> int:
        return sum(streak >= bound for bound in self.BOUNDS)


class Costs:
    """Seconds of a forward pass by its rows: the median of the last few, or a modest guess."""

    DOUBLING = 1.5  # assumed cost of twice the rows, until measured
    STALE = 256  # passes after which unused sizes are forgotten, since the machine may be less busy

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._used: dict[int, int] = {}
        self._n = 0

    def note(self, rows: int, seconds: float) -> None:
        self._n += 1
        self._seen.setdefault(rows, deque(maxlen=5)).append(seconds)
        self._used[rows] = self._n
        for other in [r for r in self._seen if r > 1 and self._n - self._used[r] > self.STALE]:
            del self._seen[other]

    @property
    def measured(self) -> dict[int, float]:
        """Median seconds by rows, for sizes that were measured and not forgotten."""
        return {rows: statistics.median(seconds) for rows, seconds in sorted(self._seen.items())}

    def of(self, rows: int) -> float | None:
        """Seconds of a pass; None until one row was measured. Ignores a slow first pass, which may compile."""
        if rows == 1:
            return statistics.median(self._seen[1]) if 1 in self._seen else None
        smaller = max((r for r in self._seen if r < rows), default=None)
        if smaller is None:
            return None
        below = self.of(smaller)
        assert below is not None
        guessed = below * self.DOUBLING ** _doublings(smaller, rows)
        seen = self._seen.get(rows, ())
        if not seen:
            return guessed
        return min(guessed, seen[0]) if len(seen) == 1 else statistics.median(seen)


def _doublings(few: int, many: int) -> int:
    return ROWS.index(many) - ROWS.index(few)


class Lookup:
    """The drafts of one generation. Wrong guesses cost only time.

    drafted, accepted  draft tokens that forward passes checked, and those that the sampler chose too
    """

    def __init__(self, *, costs: Costs | None = None, rows: Sequence[int] = ROWS) -> None:
        """costs  measured costs of this model's passes, to use and to extend
        rows   sizes of a forward pass to choose from, ascending, including 1; a subset of ROWS
        """
        self.drafted = self.accepted = 0
        self._rows = tuple(rows)
        self._odds, self._costs = Odds(), costs or Costs()
        self._source = Source((), self._rows[-1])

    def begin(self, prompt: Sequence[int]) -> None:
        """Start with the ids of the prompt."""
        self._source = Source(prompt, self._rows[-1])

    def rows(self) -> int:
        """The best number of rows for the next pass at the current rate of right guesses; 1 without a draft."""
        alone = self._costs.of(1)
        if alone is None:
            return 1
        best, most = 1, GAIN / alone
        for rows in self._rows[1:]:
            cost = self._costs.of(rows)
            if cost is None or rows - 1 > len(self._source.expected):
                break
            rate = (1 + self._odds.expected(self._source.streak, rows - 1)) / cost
            if rate > most:
                best, most = rows, rate
        return best

    def draft(self, most: int) -> list[int]:
        """At most `most` ids for the next pass to check; often none."""
        return [guess.id for guess in self._source.expected[: max(0, min(self.rows() - 1, most))]]

    def settle(self, n_drafted: int, ids: Sequence[int]) -> None:
        """Record the result of a pass: ids, all drafted except the last; n_drafted were checked."""
        self.drafted += n_drafted
        self.accepted += len(ids) - 1
        for i, (guess, id) in enumerate(zip(self._source.expected, ids, strict=False)):
            self._odds.note(self._source.streak + i, guess.id == id)
        self._source.settle(ids)

    def timed(self, rows: int, seconds: float) -> None:
        """Record the seconds of a pass. Ignores numbers of rows that are not in `rows`."""
        if rows in self._rows:
            self._costs.note(rows, seconds)
