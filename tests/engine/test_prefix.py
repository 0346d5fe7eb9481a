"""The tree of prefixes against a search through all of them, and what is kept of idle sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_codellama.engine.prefix import PrefixCache, PrefixTree, common_prefix


@dataclass(eq=False)
class Stored:
    """Stands in for a sequence: ids, and storage by its key."""

    storages: dict[object, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    horizon: int = 0

    @property
    def offset(self) -> int:
        return len(self.ids)


def slow_common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


few_ids = st.lists(st.integers(0, 2), max_size=9)  # so few that beginnings are often shared


@given(st.lists(st.tuples(st.booleans(), few_ids, st.integers(0, 5))), few_ids)
@settings(max_examples=300, deadline=None)
def test_the_tree_finds_what_a_search_finds(changes: list[tuple[bool, list[int], int]], wanted: list[int]) -> None:
    tree, known = PrefixTree(), dict[int, tuple[Stored, list[int]]]()
    sequences = [Stored() for _ in range(6)]
    for removes, ids, which in changes:
        if removes:
            tree.remove(sequences[which])  # type: ignore[arg-type]
            known.pop(which, None)
        else:
            tree.add(sequences[which], ids)  # type: ignore[arg-type]
            known.pop(which, None)
            known[which] = sequences[which], ids
    assert len(tree) == len(known)
    assert all((sequence in tree) == (i in known) for i, sequence in enumerate(sequences))
    found, n = tree.match(wanted)
    best = max((slow_common_prefix(ids, wanted) for _, ids in known.values()), default=0)
    assert n == best
    if best:
        latest = [one for one, ids in known.values() if slow_common_prefix(ids, wanted) == best][-1]
        assert found is latest
    else:
        assert found is None


@given(st.integers(0, 1600), st.integers(0, 1600), st.integers(0, 1600))
@settings(max_examples=50, deadline=None)
def test_common_prefixes_of_long_lists(shared: int, a: int, b: int) -> None:
    # Blocks of 512 are compared at once; the parts after the shared one differ everywhere.
    one, two = [5] * shared + [1] * a, [5] * shared + [2] * b
    assert common_prefix(one, two) == shared


def test_the_tree_forgets_what_it_no_longer_leads_to() -> None:
    tree, a, b = PrefixTree(), Stored(), Stored()
    tree.add(a, [1, 2, 3, 4])  # type: ignore[arg-type]
    tree.add(b, [1, 2, 9])  # type: ignore[arg-type]
    tree.remove(a)  # type: ignore[arg-type]
    assert tree.match([1, 2, 3, 4]) == (b, 2)
    tree.remove(b)  # type: ignore[arg-type]
    assert tree.match([1, 2, 9]) == (None, 0)
    assert not tree._root.children


def test_the_oldest_idle_sequences_are_given_up_and_the_last_one_never_is() -> None:
    prefixes = PrefixCache(100)
    sequences = [Stored({n: 60}, [n, 5]) for n in range(3)]
    prefixes.leave(sequences[0], [])  # type: ignore[arg-type]
    prefixes.leave(sequences[1], [])  # type: ignore[arg-type]
    assert prefixes.idle == [sequences[1]]
    prefixes.leave(sequences[2], [Stored({1: 60})])  # type: ignore[arg-type, list-item]  # a busy one holds that anyway
    assert prefixes.idle == sequences[1:]
    large = Stored({"large": 10**6}, [7])
    prefixes.leave(large, [])  # type: ignore[arg-type]
    assert prefixes.idle == [large]
    assert prefixes.match([7], 9) == (large, 1)
    assert prefixes.match([1, 5], 9) == (None, 0)


def test_room_is_made_from_the_oldest_and_the_one_that_is_wanted_goes_last() -> None:
    prefixes = PrefixCache(1000)
    sequences = [Stored({n: 60}, [n, 5]) for n in range(3)]
    for sequence in sequences:
        prefixes.leave(sequence, [])  # type: ignore[arg-type]
    dropped = []
    while prefixes.drop_oldest(but=sequences[0]):  # type: ignore[arg-type]
        dropped.append(prefixes.idle)
    assert dropped == [[sequences[0], sequences[2]], [sequences[0]], []]
