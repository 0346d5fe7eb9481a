"""The key-value cache against the plain thing: a concatenation of everything appended."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from stand_ins import tiny_model

from mlx_codellama.cache import STEP, KVCache, make_cache

B, K, D = 2, 3, 4


def some(n_tokens: int, seed: int, width: int = D) -> mx.array:
    return mx.random.normal((B, K, n_tokens, width), key=mx.random.key(seed))


def test_append_returns_everything_appended_so_far() -> None:
    cache, keys, values = KVCache(), [], []
    for seed, n in enumerate([5, 1, 1, STEP, 7, 2 * STEP + 1]):  # crosses a step twice, once by more than a step
        keys.append(some(n, seed))
        values.append(some(n, 100 + seed))
        k, v = cache.append(keys[-1], values[-1])
        assert np.array_equal(k, mx.concatenate(keys, axis=2))
        assert np.array_equal(v, mx.concatenate(values, axis=2))
    assert cache.offset == 14 + 3 * STEP + 1


def test_storage_grows_in_steps_only() -> None:
    cache, capacities = KVCache(), []
    for seed in range(STEP + 2):
        cache.append(some(1, seed), some(1, seed))
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [STEP, 2 * STEP]
    assert capacities[STEP - 1] == STEP
    assert cache.nbytes == 2 * B * K * 2 * STEP * D * 4


def test_reserved_storage_is_allocated_at_once() -> None:
    cache = KVCache()
    cache.append(some(1, 0), some(1, 1))
    cache.reserve(3 * STEP + 1)
    cache.append(some(STEP, 2), some(STEP, 3))
    assert cache.capacity == 4 * STEP
    assert cache.offset == STEP + 1


def test_trimmed_tokens_leave_no_trace() -> None:
    trimmed, plain = KVCache(), KVCache()
    first, wrong, right = some(9, 1), some(STEP, 2), some(4, 3)
    trimmed.append(first, -first)
    trimmed.append(wrong, -wrong)
    assert trimmed.trim(STEP) == STEP
    plain.append(first, -first)
    for ours, theirs in zip(trimmed.append(right, -right), plain.append(right, -right), strict=True):
        assert ours.shape == (B, K, 13, D)
        assert np.array_equal(ours, theirs)


def test_trim_forgets_at_most_everything() -> None:
    cache = KVCache()
    cache.append(some(6, 0), some(6, 0))
    assert (cache.trim(2), cache.offset) == (2, 4)
    assert (cache.trim(9), cache.offset) == (4, 0)
    with pytest.raises(ValueError, match="cannot trim -1"):
        cache.trim(-1)


@pytest.mark.parametrize(
    "other",
    [some(1, 0)[:1], some(1, 0)[:, :2], some(1, 0, width=6), some(1, 0).astype(mx.float16)],
    ids=["batch", "heads", "width", "dtype"],
)
def test_arrays_of_another_kind_are_refused(other: mx.array) -> None:
    cache = KVCache()
    cache.append(some(3, 0), some(3, 0))
    with pytest.raises(ValueError, match="cannot append"):
        cache.append(other, other)
    assert cache.offset == 3


def test_appending_writes_in_place() -> None:
    # Copying the storage at each token would cost as much as reading it: seen here as memory, not as time.
    cache = KVCache()
    big = mx.zeros((1, 8, STEP * 16 - 8, 64))
    cache.append(big, big)
    mx.eval(cache.arrays)
    del big
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(4):
        token = mx.ones((1, 8, 1, 64))
        cache.append(token, token)
        mx.eval(cache.arrays)
    assert mx.get_peak_memory() - before < cache.nbytes / 4


def test_there_is_one_cache_for_each_layer() -> None:
    caches = make_cache(tiny_model().args)
    assert len(caches) == tiny_model().args.num_hidden_layers == 2
    assert caches[0] is not caches[1]
