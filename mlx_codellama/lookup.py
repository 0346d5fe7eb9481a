"""Prompt lookup: what the context suggests comes next, so that one forward pass can check several tokens.

No second model. Where the last tokens have occurred before, what followed them then is the draft now (prompt lookup
decoding, A. Saxena 2023; verified as in speculative decoding, arXiv:2211.17192, by a draft that is sure of itself).
Only ids and seconds are known here: `engine` runs the passes, decides what is accepted and trims the cache.

Three parts: where to copy from (Source), how likely the next tokens are to be right (Odds), and what a pass of so many
rows costs (Costs). Lookup puts them together: it drafts as many tokens as pay, which may be none.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

NGRAM = 3  # tokens that must have occurred before
KEPT = 8  # most recent places remembered of each n-gram
REACH = 24  # tokens around the place of a mismatch in which copying is taken up again
ROWS = (1, 2, 4, 8, 16)  # rows of a forward pass: the last token and the draft
GAIN = 1.15  # how many times as many tokens per second a wider pass must promise


class Guess(NamedTuple):
    """An id expected next, the place it is copied from, and how many ids of an edit come before it at that place."""

    id: int
    place: int
    part: int = 0


class Source:
    """The known ids, the place in them that is being copied, and so what is expected next.

    After a mismatch the same place is tried one token further, or just behind the last token's next occurrence. What
    was written there instead of what the source has is kept as an edit, so that a rename is expected from its second
    occurrence on. It is only a guess: whatever it is, it cannot change the answer.
    """

    def __init__(self, ids: Sequence[int], depth: int) -> None:
        """depth  how many ids to expect where so many can be told; an edit may go beyond"""
        self.ids: list[int] = []
        self.expected: list[Guess] = []
        self.streak = 0  # guesses right in a row; after a jump, ids that agree before both places
        self._depth = depth
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram → where it ended last
        self._earlier: list[int] = []  # by n-gram in order of their ends: where the same one ended before, or -1
        self._cursor: int | None = None  # the place after what is expected
        self._broken: tuple[int, int] | None = None  # (place in the source, place in the answer) of a mismatch
        self._edits: dict[int, tuple[list[int], list[int]]] = {}  # first id → (what the source has, what was written)
        for id in ids:
            self._append(id)
        self._expect()

    def settle(self, ids: Sequence[int]) -> None:
        """Add the ids that came: the expected ones, as far as that was right, and one more at most."""
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
        """Fill `expected` up to its depth. What is copied may reach into what is expected: a text that repeats."""
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
        """Copying goes on at `place`, before the next id: what lies between the mismatch and here was an edit."""
        assert self._broken is not None
        was, written = self._broken
        old, new = self.ids[was:place], self.ids[written:]
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        if 0 < len(old) <= REACH and 0 < len(new) <= REACH:
            self._edits[old[0]] = old, new
        self._broken = None

    def _resume(self) -> int | None:
        """The place to copy from, where nothing is expected any more."""
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
        """(place, ids that agree before it) of the longest match, the latest of several; (None, 0) without one."""
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
    """How often a guess was right, by how many before it were: recent experience over a modest first belief."""

    BOUNDS = (1, 3, 6, 12, 24)  # streaks at which the next class begins
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
        """How many of n guesses will be right before the first wrong one."""
        total, all_right = 0.0, 1.0
        for i in range(n):
            all_right *= self.of(streak + i)
            total += all_right
        return total

    def _class(self, streak: int) -> int:
        return sum(streak >= bound for bound in self.BOUNDS)


class Costs:
    """Seconds of a forward pass by its rows: the median of the last few; where there is none, a modest guess."""

    DOUBLING = 1.5  # what twice the rows are taken to cost until that has been measured
    STALE = 256  # passes after which what was measured of other sizes is forgotten: the machine may be free again

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
        """Median seconds by rows, of the sizes that were measured and not forgotten."""
        return {rows: statistics.median(seconds) for rows, seconds in sorted(self._seen.items())}

    def of(self, rows: int) -> float | None:
        """None as long as no pass of one row was measured. A slow first pass is not believed: it may compile."""
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
    """The drafts of one generation. Ids that were guessed wrong cost time and nothing else.

    drafted, accepted  draft tokens that forward passes checked, and those among them that the sampler chose too
    """

    def __init__(self, *, costs: Costs | None = None, rows: Sequence[int] = ROWS) -> None:
        """costs  what is known of this model's passes already, and where more is noted
        rows   the sizes of a forward pass to choose from, ascending, 1 among them; a part of ROWS
        """
        self.drafted = self.accepted = 0
        self._rows = tuple(rows)
        self._odds, self._costs = Odds(), costs or Costs()
        self._source = Source((), self._rows[-1])

    def begin(self, prompt: Sequence[int]) -> None:
        """Start with the ids of the prompt."""
        self._source = Source(prompt, self._rows[-1])

    def rows(self) -> int:
        """How many rows the next pass should have if guesses go on as they did; 1 where drafting does not pay."""
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
        """The ids to be checked in the next pass, at most `most`; often none."""
        return [guess.id for guess in self._source.expected[: max(0, min(self.rows() - 1, most))]]

    def settle(self, n_drafted: int, ids: Sequence[int]) -> None:
        """Tell what the pass gave: ids, of which all but the last were drafted; n_drafted were checked."""
        self.drafted += n_drafted
        self.accepted += len(ids) - 1
        for i, (guess, id) in enumerate(zip(self._source.expected, ids, strict=False)):
            self._odds.note(self._source.streak + i, guess.id == id)
        self._source.settle(ids)

    def timed(self, rows: int, seconds: float) -> None:
        """Tell what a pass of so many rows took. A number of rows that is not offered is left out."""
        if rows in self._rows:
            self._costs.note(rows, seconds)
