"""On real weights: what a request gets does not depend on company, and what rounding activations costs.

Random weights hide outliers: real keys have channels twenty times as large as others, and scores far from 0.
"""

from __future__ import annotations

import functools
import inspect
import json.decoder
import random
import textwrap
from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.smollm2 import decode, encode, float_model, packed_model

from mlx_codellama.cache import Sequence
from mlx_codellama.engine import Engine, Request, Step, turns
from mlx_codellama.kernels import dispatch
from mlx_codellama.lookup import Lookup
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.snapshot import load_cache, save_cache
from mlx_codellama.storage import KVStorage

pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off"),
]
BITS = [16, 8, (8, 4), 4]
N = 60  # tokens generated
Result = tuple[list[Step], list[bytes]]


@functools.lru_cache
def source() -> list[int]:
    return encode(inspect.getsource(json.decoder)) + encode(inspect.getsource(textwrap))


@functools.lru_cache
def requests() -> list[Request]:
    """Eight pieces of Python, 30 to 240 tokens long, half of them sampled."""
    asked = []
    for n in range(8):
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=n) if n % 2 else SamplingParams()
        asked.append(Request(source()[n * 150 : n * 150 + 30 * (n + 1)], N, params, logprobs=2))
    return asked


def stored(sequence: Sequence) -> list[bytes]:
    return [np.array(array).tobytes() for state in sequence.state() for array in state.values()]


def run(request: Request, bits: Any, exact: bool = False) -> Result:
    """On an engine of its own. → steps, and the keys and values that are left"""
    engine = Engine(packed_model(exact=exact), KVStorage.of(bits))
    return list(engine.submit(request)[0]), stored(engine.idle_sequences[-1])


@functools.lru_cache
def alone(n: int, bits: Any) -> Result:
    return run(requests()[n], bits)


def ids_of(steps: List[Step]) -> list[int]:
    return [step.id for step in steps if step.id is not None]


class Drafts(Lookup):
    """Drafts of 1 to 7 tokens at every step: the true ones, with about a fifth of them spoilt."""

    def __init__(self, truth: List[int], seed: int) -> None:
        super().__init__()
        self._truth, self._n, self._rng = list(truth), 0, random.Random(seed)

    def rows(self) -> int:
        return 8

    def draft(self, most: int) -> list[int]:
        ahead = self._truth[self._n : self._n + min(self._rng.randint(1, 7), most)]
        return [self._rng.randrange(49152) if self._rng.random() < 0.2 else id for id in ahead]

    def settle(self, n_drafted: int, ids: List[int]) -> None:
        self._n += len(ids)
        super().settle(n_drafted, ids)


def test_the_weights_are_read_as_they_were_meant() -> None:
    """A wrong order of rows in q and k, or of codes in a word, would leave nothing of this."""
    prompt = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return fibonacci(n - 1) +"
    answer = decode(ids_of(run(Request(encode(prompt), 9), None)[0]))
    assert answer.startswith(" fibonacci(n - 2)")
    ids = mx.array([source()[:64]])
    packed, wide = (np.array(m(ids)) for m in (packed_model(exact=True), float_model()))
    np.testing.assert_allclose(packed, wide, atol=0.1)  # we unpack embeddings in float16
    assert packed_model(exact=False).rows_are_independent
    assert not float_model().rows_are_independent


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_eight_prompts_together_are_as_each_alone(bits: Any) -> None:
    engine = Engine(packed_model(exact=False), KVStorage.of(bits), prefill_chunk=100)
    got: list[list[Step]] = [[] for _ in requests()]
    for i, step in turns(engine, [engine.submit(request)[0] for request in requests()]):
        got[i].append(step)
    assert [steps == alone(n, bits)[0] for n, steps in enumerate(got)] == [True] * 8
    left = [stored(sequence) for sequence in engine.idle_sequences]
    assert all(alone(n, bits)[1] in left for n in range(8))


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_lookup_changes_nothing(bits: Any) -> None:
    for n in range(8):
        drafts = Drafts(ids_of(alone(n, bits)[0]), n)
        assert run(replace(requests()[n], lookup=drafts), bits) == alone(n, bits)
        assert 0 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_lookup_on_a_text_that_is_written_again_changes_nothing(bits: Any, exact: bool) -> None:
    """Whatever widths measured times suggest."""
    text = source()[200:320]
    request = Request([*text, *encode("\n\n# The same again:\n"), *text[:20]], N, logprobs=2)
    lookup = Lookup()
    assert run(replace(request, lookup=lookup), bits, exact) == run(request, bits, exact)
    assert lookup.drafted > 0


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_restored_is_live_and_a_prefix_read_before_is_fresh(bits: Any, tmp_path: Path) -> None:
    m, storage, prompt = packed_model(exact=False), KVStorage.of(bits), source()[:290]
    live = Engine(m, storage)
    list(live.submit(Request(prompt[:256], 9))[0])
    save_cache(tmp_path / "cache", m, storage, live.idle_sequences[-1])
    restored = Engine(m, storage)
    restored.keep(load_cache(tmp_path / "cache", m, storage))
    request, got = Request(prompt, 8, logprobs=2), []
    for engine in (live, restored, Engine(m, storage, prefill_chunk=64)):
        (generation,) = engine.submit(request)
        got.append((list(generation), stored(engine.idle_sequences[-1])))
        assert generation.cached_tokens in (256, 257, 0)
    assert got[0] == got[1] == got[2]


def test_fifteen_bits_of_activations_cost_next_to_nothing() -> None:
    ids = mx.array([source()[:320]])
    exact, short = (np.array(packed_model(exact=e)(ids)[0], np.float64) for e in (True, False))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, short))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    assert 0 < kl < 1e-6  # 2.4e-7 was measured; rounding to 7 bits gives some 1e-3
    assert (p.argmax(-1) == q.argmax(-1)).all()
