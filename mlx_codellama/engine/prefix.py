"""Sequences that finished calls leave behind, found by the ids they begin with.

A radix tree over ids: each edge carries a run of ids, each node the sequences whose ids pass through it. The longest
common beginning of a prompt with all of them is found in one walk down the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlx_codellama.cache import Sequence

LEAST_SHARED = 32  # tokens of a common beginning that are worth a segment, unless they are half of the text
MOST_IDLE = 256  # sequences kept, however little they hold: ids and nodes of the tree take room and time, too
_BLOCK = 512  # ids compared at once


def worth_sharing(n_shared: int, n_tokens: int) -> bool:
    """Whether a common beginning of n_shared tokens saves a text of n_tokens more than a further segment costs.

    All texts begin with the same id, and running ones would be cut up for nothing.
    """
    return n_shared >= LEAST_SHARED or 2 * n_shared >= n_tokens


def common_prefix(a: list[int], b: list[int], start: int = 0) -> int:
    """How many leading ids two lists share, given that the first `start` are equal."""
    n, end = start, min(len(a), len(b))
    while n < end and a[n : n + _BLOCK] == b[n : n + _BLOCK]:
        n += _BLOCK
    while n < end and a[n] == b[n]:
        n += 1
    return min(n, end)


@dataclass
class _Node:
    """ids[start:end] of one sequence lead here from the parent."""

    ids: list[int] = field(default_factory=list)
    start: int = 0
    end: int = 0
    children: dict[int, _Node] = field(default_factory=dict)
    through: dict[int, Sequence] = field(default_factory=dict)  # by id(): those that pass, the latest last


class PrefixTree:
    """Sequences by their ids. A sequence is entered with the ids it holds then, which it must go on beginning with."""

    def __init__(self) -> None:
        self._root = _Node()
        self._entered: dict[int, tuple[Sequence, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._entered)

    def __contains__(self, sequence: object) -> bool:
        return id(sequence) in self._entered

    def add(self, sequence: Sequence, ids: list[int]) -> None:
        """Enter a sequence, or enter it anew with other ids."""
        self.remove(sequence)
        ids = list(ids)
        self._entered[id(sequence)] = sequence, ids
        node, at = self._root, 0
        node.through[id(sequence)] = sequence
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                child = node.children[ids[at]] = _Node(ids, at, len(ids))
            else:
                shared = common_prefix(ids[at : at + child.end - child.start], child.ids[child.start : child.end])
                if shared < child.end - child.start:
                    child = self._split(node, child, shared)
            child.through[id(sequence)] = sequence
            node, at = child, child.end

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; harmless for one that was never entered."""
        _, ids = self._entered.get(id(sequence), (None, []))
        node = self._root
        node.through.pop(id(sequence), None)
        # Ctrl-C may have cut an `add` or `remove` short: then nodes are missing, or nobody passes them.
        while node.end < len(ids) and (child := node.children.get(ids[node.end])) is not None:
            parent, node = node, child
            node.through.pop(id(sequence), None)
            if not node.through:
                del parent.children[node.ids[node.start]]
                break
        self._entered.pop(id(sequence), None)

    def match(self, ids: list[int]) -> tuple[Sequence | None, int]:
        """A sequence that shares the longest beginning with ids, the latest of several, and how long that is."""
        node, n = self._root, 0
        while n < len(ids) and (child := node.children.get(ids[n])) is not None and child.through:
            length = child.end - child.start
            n += common_prefix(ids[n : n + length], child.ids[child.start : child.end])
            node = child
            if n < child.end:
                break
        return (next(reversed(node.through.values())), n) if n else (None, 0)

    @staticmethod
    def _split(parent: _Node, child: _Node, n: int) -> _Node:
        """Cut the edge to child after n ids. → the new node in between."""
        cut = child.start + n
        lower = _Node(child.ids, cut, child.end, child.children, child.through)
        middle = _Node(child.ids, child.start, cut, {child.ids[cut]: lower}, dict(child.through))
        parent.children[middle.ids[middle.start]] = middle  # the only change to the tree, which Ctrl-C cannot cut
        return middle


class PrefixCache:
    """Sequences that later requests may begin with: idle ones, which finished requests left, and those in use.

    Idle ones are given up, the one used longest ago first, beyond most_bytes of storage of their own and where somebody
    needs the room. The last one left is kept in any case.
    """

    def __init__(self, most_bytes: int, angles: Callable[[int], int] = lambda n_tokens: 0) -> None:
        """angles  a number for the rotary angles that a text of n_tokens takes: with dynamic scaling, texts of other
        lengths cannot share keys
        """
        self.most_bytes, self.angles = most_bytes, angles
        self._trees: dict[int, PrefixTree] = {}
        self._idle: dict[int, Sequence] = {}  # by id(): the one used last at the end

    @property
    def idle(self) -> list[Sequence]:
        """The one used last at the end."""
        return list(self._idle.values())

    def is_idle(self, sequence: Sequence) -> bool:
        return id(sequence) in self._idle

    def match(self, ids: list[int], n_tokens: int) -> tuple[Sequence | None, int]:
        """For a text of n_tokens: a sequence that shares the longest beginning with ids, and how long that is.

        (None, 0) if that is not `worth_sharing`.
        """
        tree = self._trees.get(self.angles(n_tokens))
        found, n = (None, 0) if tree is None else tree.match(ids)
        return (found, n) if n == (found.offset if found else 0) or worth_sharing(n, len(ids)) else (None, 0)

    def free(self, found: Sequence | None, n_tokens: int) -> int:
        """How many of the first n_tokens `begin` gives without taking more memory."""
        if found is None:
            return 0
        n_tokens = min(n_tokens, found.offset)
        if self.is_idle(found) and (n_tokens == found.offset or not found.can_share(n_tokens)):
            return n_tokens if found.offset - n_tokens <= found.trimmable else 0
        return 0 if found.copies_on_write or not found.can_share(1) else found.free_to_share(n_tokens)

    def enter(self, sequence: Sequence, ids: list[int]) -> None:
        """Let others begin with a sequence that is in use, and holds these ids already."""
        self._trees.setdefault(self.angles(sequence.horizon), PrefixTree()).add(sequence, ids)

    def leave(self, sequence: Sequence, busy: Iterable[Sequence]) -> None:
        """Keep a sequence that is no longer in use; `busy` are those that are."""
        self.drop(sequence)
        if sequence.offset:
            self._idle[id(sequence)] = sequence  # first: what is idle can be dropped, whatever comes in between
            self.enter(sequence, sequence.ids)
            for surplus in self._surplus(busy):
                self.drop(surplus)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; harmless for an unknown one."""
        for tree in self._trees.values():
            tree.remove(sequence)
        self._idle.pop(id(sequence), None)

    def drop_oldest(self, but: Sequence | None) -> bool:
        """Forget the idle sequence used longest ago; `but` only as the last one. → whether there was one."""
        oldest = min(self.idle, key=lambda sequence: sequence is but, default=None)
        if oldest is not None:
            self.drop(oldest)
        return oldest is not None

    def begin(self, found: Sequence, n_tokens: int) -> Sequence | None:
        """A sequence of the first n_tokens of `found`: itself if it is idle and has no more, else one that shares them.

        None if it cannot be had. A window cannot be shared in part, but taken over and trimmed.
        """
        idle = self.is_idle(found)
        if idle and (n_tokens == found.offset or not found.can_share(n_tokens)):
            if found.offset - n_tokens > found.trimmable:
                return None
            self.drop(found)
            found.trim(found.offset - n_tokens)
            return found
        if not found.can_share(n_tokens):
            return None
        if idle:
            self._idle[id(found)] = self._idle.pop(id(found))
        return found.share(n_tokens)

    def _surplus(self, busy: Iterable[Sequence]) -> list[Sequence]:
        held = {key for sequence in busy for key in sequence.storages}
        kept, given_up = 0, list[Sequence]()
        for i, sequence in enumerate(reversed(self.idle)):
            own = {key: n for key, n in sequence.storages.items() if key not in held}
            if kept and (kept + sum(own.values()) > self.most_bytes or i >= MOST_IDLE):
                given_up.append(sequence)
                continue
            kept += sum(own.values())
            held |= own.keys()
        return given_up
