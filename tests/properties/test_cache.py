"""Every storage of keys and values, with and without shared kv heads: what must not change a single id."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.meta_reference import Geometry, random_weights
from oracles.mlx_models import our_model
from stand_ins import tiny_tokenizer

from mlx_codellama.api import CodeLlama
from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.engine import generate
from mlx_codellama.lookup import Costs, Lookup
from mlx_codellama.model import Model
from mlx_codellama.storage import SPARE, KVStorage

# Heads of 32 and 64: one group, and one larger group, of a packed row.
MODELS = {
    "mha": Geometry(dim=96, n_layers=2, n_heads=3, n_kv_heads=3, ffn_dim=80, vocab_size=416),
    "gqa": Geometry(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=112, vocab_size=416, rope_theta=1e4),
}
STORAGES = {
    "float": KVStorage(),
    "16": KVStorage.of(16),
    "8": KVStorage.of(8),
    "8/4": KVStorage.of((8, 4)),
    "4": KVStorage.of(4),
    "window": KVStorage.of(None, window=24, sinks=3),
    "4 in a window": KVStorage.of(4, window=24, sinks=3),
}
IDS = np.random.RandomState(8).randint(3, 400, 61).tolist()  # more than a window of 24 keeps, and its spare ones
N = 12  # tokens generated: a lost or misplaced token changes the logits by order 1, so hardly any id survives it

every_model = pytest.mark.parametrize("heads", MODELS)
every_storage = pytest.mark.parametrize("name", STORAGES)


@functools.lru_cache
def model(heads: str) -> Model:
    return our_model(random_weights(MODELS[heads], seed=5), MODELS[heads])


def cache_of(heads: str, name: str) -> Sequence:
    return make_sequence(model(heads).args, STORAGES[name])


def read(heads: str, cache: Sequence, ids: list[int]) -> None:
    model(heads).hidden(mx.array([ids]), [(cache, len(ids))])
    mx.eval(cache.arrays)
    cache.ids += ids


def greedy(heads: str, cache: Sequence, chunk: int | None = None) -> list[int | None]:
    """What follows IDS, of which the cache may hold some."""
    return [step.id for step in generate(model(heads), IDS, max_tokens=N, sequence=cache, prefill_chunk=chunk)]


@functools.lru_cache
def expected(heads: str, name: str) -> list[int | None]:
    """IDS in one pass, from a fresh cache."""
    ids = greedy(heads, cache_of(heads, name), len(IDS))
    assert len(set(ids)) > 3  # not a model that says one thing whatever it reads
    return ids


@every_model
def test_the_storages_that_are_compared_are_different(heads: str) -> None:
    """Else the tests below would hold for a cache that ignores what it is asked for."""
    seen = {}
    for name in STORAGES:
        cache = cache_of(heads, name)
        read(heads, cache, IDS)
        logits = model(heads)(mx.array([[7]]), [(cache, 1)], prompt=False)
        seen[name] = np.array(logits).tobytes()
        assert (cache.dropped > 0) == (STORAGES[name].window is not None)
    assert len(set(seen.values())) == len(STORAGES)


@every_model
@every_storage
@settings(max_examples=3)
@given(chunk=st.integers(1, 62))
def test_chunked_prefill_gives_the_ids_of_one_pass(heads: str, name: str, chunk: int) -> None:
    assert greedy(heads, cache_of(heads, name), chunk) == expected(heads, name)


@every_model
@every_storage
@settings(max_examples=3)
@given(detour=st.integers(1, 300), keep=st.integers(0, 60))
def test_trimmed_tokens_were_never_appended(heads: str, name: str, detour: int, keep: int) -> None:
    """Of a window at most its spare tokens come back, or all while none is overwritten; 300 cross a step of storage."""
    if STORAGES[name].window is not None:
        detour = min(detour, SPARE)
    cache = cache_of(heads, name)
    wander = np.random.RandomState(detour).randint(3, 400, detour).tolist()
    read(heads, cache, [*IDS[:keep], *wander])
    cache.trim(detour)
    assert greedy(heads, cache) == expected(heads, name)


@every_model
@every_storage
def test_two_conversations_from_one_prefix_do_not_meet(heads: str, name: str) -> None:
    cache = cache_of(heads, name)
    read(heads, cache, IDS[:40])
    branch = cache.share()
    read(heads, branch, np.random.RandomState(1).randint(3, 400, 30).tolist())
    assert greedy(heads, cache) == expected(heads, name)


@every_storage
def test_calls_that_share_a_beginning_give_what_fresh_calls_give(name: str) -> None:
    """Prompts that go on, part ways, become shorter and are the same again; the reuse is real where it is possible."""
    reusing = CodeLlama(model("gqa"), tiny_tokenizer(), storage=STORAGES[name])
    cached = []
    for prompt in (IDS, [*IDS, 9, 8, 7], [*IDS[:30], 5, 6], IDS[:12], IDS[:12]):
        fresh = CodeLlama(model("gqa"), tiny_tokenizer(), storage=STORAGES[name])
        again = reusing.complete(prompt, max_tokens=9)
        assert again.ids == fresh.complete(prompt, max_tokens=9).ids
        cached.append(again.stats.cached_tokens)
    whole = STORAGES[name].window is None  # a window that has gone round its ring gives back SPARE tokens at most
    assert cached == ([0, 61, 30, 11, 11] if whole else [0, 61, 0, 11, 11])


@every_model
def test_a_window_over_everything_changes_nothing(heads: str) -> None:
    wide = make_sequence(model(heads).args, KVStorage.of(None, window=500))
    assert greedy(heads, wide) == expected(heads, "float")
    assert wide.dropped == 0


class Eager(Lookup):
    """Always drafts, and is nearly always wrong."""

    def rows(self) -> int:
        return 3

    def draft(self, room: int) -> list[int]:
        return [5, 5][:room]


def test_every_storage_takes_back_drafts_that_were_wrong() -> None:
    for name in STORAGES:
        lookup = Eager(costs=Costs())
        steps = generate(model("gqa"), IDS, max_tokens=N, sequence=cache_of("gqa", name), lookup=lookup)
        assert [step.id for step in steps] == expected("gqa", name)
