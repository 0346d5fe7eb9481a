"""Sequences: shared segments and tails, against a sequence of its own that read the same tokens."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from stand_ins import tiny_model

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.cache.sequence import MOST_SEGMENTS
from mlx_codellama.config import ModelArgs
from mlx_codellama.storage import KVStorage

K, D = 3, 32
ARGS = ModelArgs(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=K, head_dim=D,
    intermediate_size=64, vocab_size=50, rope_theta=1e4, max_position_embeddings=99_999,
)  # fmt: skip
STORAGES = {"float": KVStorage(), "16": KVStorage.of(16), "8/4": KVStorage.of((8, 4)), "4": KVStorage.of(4)}
WINDOW = KVStorage.of(None, window=24, sinks=3)


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> KVStorage:
    return STORAGES[request.param]


def row(ids: list[int], layer: int) -> mx.array:
    """Keys [1, K, L, D] that say which id stands at which place, in which layer."""
    rows = [np.random.RandomState(1000 * layer + id).randn(K, D) for id in ids]
    return mx.array(np.stack(rows, axis=1)[None].astype(np.float32))


def append(sequence: Sequence, ids: list[int]) -> None:
    """What a forward pass does to a sequence."""
    for i in range(ARGS.num_hidden_layers):
        tail, x = sequence.layer(i).tail, row(ids, i)
        tail.write(tail.encoding.encode(x, -x))
    sequence.advance(len(ids))
    sequence.ids += ids


def new(storage: KVStorage, ids: list[int] | None = None) -> Sequence:
    sequence = make_sequence(ARGS, storage)
    if ids:
        append(sequence, ids)
    return sequence


def check(sequence: Sequence, ids: list[int], storage: KVStorage) -> None:
    """It is what one that has read nothing but these ids is, to the bit."""
    assert (sequence.ids, sequence.offset) == (ids, len(ids))
    want = new(storage, ids)
    for i in range(ARGS.num_hidden_layers if ids else 0):
        for ours, theirs in zip(sequence.layer(i).held(), want.layer(i).held(), strict=True):
            assert np.array_equal(np.array(ours), np.array(theirs))


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(seed).randint(0, 50, n).tolist()


def test_both_go_on_with_tails_of_their_own(storage: KVStorage) -> None:
    prefix = text(70)
    one = new(storage, prefix)
    other = one.share()
    append(one, text(5, 1))
    append(other, text(300, 2))
    append(one, text(1, 3))
    check(one, [*prefix, *text(5, 1), *text(1, 3)], storage)
    check(other, [*prefix, *text(300, 2)], storage)
    assert [s.storage for s in one.segments] == [s.storage for s in other.segments]


@pytest.mark.parametrize("n", [0, 1, 69, 70, 71, 99, 100])
def test_a_part_can_be_shared_wherever_it_ends(storage: KVStorage, n: int) -> None:
    ids = text(100)
    one = new(storage, ids[:70])
    one.share()  # 70 in a segment, the rest in the tail
    append(one, ids[70:])
    other = one.share(n)
    append(other, [7, 8])
    append(one, [9])
    check(other, [*ids[:n], 7, 8], storage)
    check(one, [*ids, 9], storage)


@pytest.mark.parametrize("n", [0, 5, 30, 31, 60, 100])
def test_trimming_reaches_into_what_is_shared(storage: KVStorage, n: int) -> None:
    ids = text(100)
    one = new(storage, ids[:40])
    other = one.share()
    append(one, ids[40:70])
    third = one.share()
    append(one, ids[70:])
    assert one.trimmable == 100
    assert one.trim(n) == n
    check(one, ids[: 100 - n], storage)
    append(one, [3, 4])
    check(one, [*ids[: 100 - n], 3, 4], storage)
    check(other, ids[:40], storage)
    check(third, ids[:70], storage)
    assert (one.trim(1000), one.ids) == (102 - n, [])
    with pytest.raises(ValueError, match="cannot trim -1"):
        one.trim(-1)


def test_sharing_copies_nothing(storage: KVStorage) -> None:
    one = new(storage, text(1000))
    mx.eval(one.arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    others = [one.share() for _ in range(8)]
    assert mx.get_active_memory() == before
    pieces: dict[object, int] = {}
    for sequence in (one, *others):
        pieces |= sequence.storages
    assert sum(pieces.values()) == one.nbytes == others[0].nbytes


def test_eight_over_one_prefix_take_a_tenth_more_than_one() -> None:
    prefix = text(16_384)
    one = new(STORAGES["4"], prefix)
    alone, pieces = one.nbytes, dict[object, int]()
    others = [one.share() for _ in range(8)]
    for i, sequence in enumerate(others):
        append(sequence, [i, *text(50, i)])
        pieces |= sequence.storages
    mx.eval([sequence.arrays for sequence in others])
    assert alone < sum(pieces.values()) <= 1.1 * alone
    del one
    check(others[3], [*prefix, 3, *text(50, 3)], STORAGES["4"])


def test_there_are_never_more_segments_than_kernels_are_fast_for(storage: KVStorage) -> None:
    ids: list[int] = []
    one, kept = new(storage), []
    for n in (300, 20, 10, 64, 3, 5, 100, 2, 1, 40):
        append(one, text(n, n))
        ids += text(n, n)
        kept.append((one.share(), list(ids)))
        assert len(one.segments) <= MOST_SEGMENTS
        assert one.segments[0].n_tokens == 300  # the large one is never copied
    for sequence, held in kept:
        check(sequence, held, storage)


def test_joining_copies_the_smallest_neighbours_only() -> None:
    one = new(KVStorage())
    for n in (100, 50, 8, 9, 70):
        append(one, text(n, n))
        one.share()
    before = one.segments
    append(one, text(60))
    one.share()
    assert [s.n_tokens for s in one.segments] == [100, 50, 17, 70, 60]
    assert [a.storage is b.storage for a, b in zip(before[:2], one.segments, strict=False)] == [True, True]
    assert one.segments[3].storage is before[4].storage


def test_room_reserved_counts_what_is_shared() -> None:
    one = new(KVStorage(), text(1000))
    one.reserve(1300)
    other = one.share()
    append(one, [1])
    assert one.layer(0).tail.capacity == 512  # 300 more, in one step
    append(other, [1])
    assert other.layer(0).tail.capacity == 64


def test_a_pass_that_fails_in_the_middle_leaves_the_sequence_as_it_was(storage: KVStorage) -> None:
    for kind, n in ((storage, 5), (WINDOW, 5), (WINDOW, 70), (WINDOW, 2)):
        ids = text(90)
        one = new(kind, ids)
        x = row(text(n, 9), 0)
        one.layer(0).tail.write(one.encoding.encode(x, -x))  # and layer 1 never gets there
        check(one, ids, kind)
        append(one, text(40, 2))
        check(one, [*ids, *text(40, 2)], kind)


def test_a_window_is_shared_whole_and_copied_on_write() -> None:
    ids = text(90)
    one = new(WINDOW, ids)
    assert (one.can_share(90), one.can_share(89)) == (True, False)
    with pytest.raises(ValueError, match="cannot share 89 tokens of 90"):
        one.share(89)
    other = one.share()
    assert one.copies_on_write
    assert other.copies_on_write
    assert one.storages == other.storages
    append(other, [5])
    assert not one.copies_on_write
    assert one.storages.keys().isdisjoint(other.storages)
    append(one, [6, 7])
    check(one, [*ids, 6, 7], WINDOW)
    check(other, [*ids, 5], WINDOW)
    third = one.share()
    assert one.copies_on_write
    del third
    assert not one.copies_on_write


def test_what_is_shared_can_go_on_in_another_thread() -> None:
    """A lazy array could be evaluated only in the thread that made it."""
    model, answers = tiny_model(), []
    one = make_sequence(model.args)
    model.hidden(mx.array([[1, 2, 3]]), [(one, 3)])
    other = one.share()

    def go_on() -> None:
        answers.append(np.array(model(mx.array([[4]]), [(other, 1)])))

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    np.testing.assert_allclose(answers[0], np.array(model(mx.array([[1, 2, 3, 4]])))[:, -1:], atol=1e-4)


def test_a_state_has_the_tokens_in_order_and_comes_back(storage: KVStorage) -> None:
    one = new(storage, text(70))
    one.share()
    append(one, text(9, 1))
    again = make_sequence(ARGS, storage)
    again.restore(one.ids, one.state())
    check(again, one.ids, storage)
    append(again, [4])
    check(again, [*text(70), *text(9, 1), 4], storage)
    with pytest.raises(ValueError, match="not the storage of 3 tokens"):
        again.restore([1, 2, 3], one.state())
