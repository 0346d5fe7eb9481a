"""Results that do not depend on company: whatever else the engine does, a request gets the same floats and bytes.

Nothing here is compared approximately. Weights are random codes of 4 bits; the last layer's queries and keys are scaled
up until scores reach ±200, so that its softmax is as sharp as the first layer's is flat.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.engine import Engine, Generation, Request, Step, turns
from mlx_codellama.kernels import dispatch
from mlx_codellama.loader import random_model
from mlx_codellama.lookup import ROWS, Lookup
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.snapshot import load_cache, save_cache
from mlx_codellama.storage import KVStorage

pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")
pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off")

STORAGES = {
    "float32": KVStorage(),
    "16": KVStorage.of(16),
    "8": KVStorage.of(8),
    "8/4": KVStorage.of((8, 4)),
    "4": KVStorage.of(4),
}
# Query heads to a kv head, kv heads, head size, exact activations: all ratios with both sizes and both activations.
MODELS = [
    (1, 2, 64, True),
    (3, 1, 128, True),
    (8, 1, 64, True),
    (1, 2, 128, False),
    (3, 1, 64, False),
    (8, 1, 128, False),
]
LOUD = 40.0  # times the weights of queries and of keys in the last layer

every_model = pytest.mark.parametrize("shape", MODELS, ids=lambda s: f"{s[0]}x{s[2]}{'' if s[3] else ' 15 bits'}")
every_storage = pytest.mark.parametrize("name", STORAGES)
Shape = tuple[int, int, int, bool]


@functools.lru_cache
def model(shape: Shape) -> Model:
    share, kv_heads, width, exact = shape
    args = ModelArgs(
        hidden_size=192, num_hidden_layers=2, intermediate_size=320, num_attention_heads=share * kv_heads,
        num_key_value_heads=kv_heads, head_dim=width, vocab_size=416, rms_norm_eps=1e-5, max_position_embeddings=2048,
        rope_theta=1e4, tie_word_embeddings=False,
    )  # fmt: skip
    made = random_model(with_bits(args, 4, 64), seed=3, exact=exact)
    attention = made.model.layers[-1].self_attn
    for linear, times in ((attention.q_proj, LOUD), (attention.k_proj, LOUD), (made.lm_head, 9.0)):
        linear.scales, linear.biases = linear.scales * times, linear.biases * times
    return made


def ids_from(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 416, n).tolist()


REQUESTS = [
    Request(ids_from(1, 3), 9, logprobs=3),
    Request(ids_from(2, 250), 12, logprobs=2),  # generates across the end of a split of 256 keys
    Request(ids_from(3, 64), 5, SamplingParams(temperature=0.9, seed=3), logprobs=3),
    Request(ids_from(4, 17), 11, SamplingParams(repetition_penalty=1.6), logprobs=0),
    Request(ids_from(5, 300), 7, SamplingParams(temperature=1.2, top_p=0.9, seed=8), logprobs=1),
    Request(ids_from(6, 1), 8, logprobs=3),
    Request(ids_from(7, 129), 6, SamplingParams(temperature=0.8, top_k=9, seed=5), logprobs=3),
    Request(ids_from(8, 31), 10, logprobs=3),
]


def stored(sequence: Sequence) -> list[bytes]:
    """All keys and values, as they are stored, token after token."""
    return [np.array(array).tobytes() for state in sequence.state() for array in state.values()]


def alone(m: Model, request: Request, **options: Any) -> tuple[list[Step], list[bytes]]:
    """The steps, with their logarithms, and the keys and values that are left."""
    engine = Engine(m, **options)
    return list(engine.submit(request)[0]), stored(engine.idle_sequences[-1])


@functools.lru_cache
def expected(shape: Shape, name: str, n: int) -> tuple[list[Step], list[bytes]]:
    """Request n on an engine of its own."""
    return alone(model(shape), REQUESTS[n], storage=STORAGES[name])


def together(engine: Engine, generations: List[Generation]) -> list[list[Step]]:
    got: list[list[Step]] = [[] for _ in generations]
    for i, step in turns(engine, list(generations)):
        got[i].append(step)
    return got


class Drafts(Lookup):
    """Drafts of 1 to 7 tokens at every step: the true ones, with about a fifth of them spoilt."""

    def __init__(self, truth: List[int], seed: int) -> None:
        super().__init__()
        self._truth, self._n, self._rng = list(truth), 0, random.Random(seed)

    def rows(self) -> int:
        return ROWS[-1]

    def draft(self, most: int) -> list[int]:
        ahead = self._truth[self._n : self._n + min(self._rng.randint(1, ROWS[-1] - 1), most)]
        return [self._rng.randrange(416) if self._rng.random() < 0.2 else id for id in ahead]

    def settle(self, n_drafted: int, ids: List[int]) -> None:
        self._n += len(ids)
        super().settle(n_drafted, ids)


def ids_of(steps: List[Step]) -> list[int]:
    return [step.id for step in steps if step.id is not None]


@every_model
def test_the_models_are_sharp_and_flat_and_say_many_things(shape: Shape) -> None:
    """Else the tests below would compare little."""
    m, largest = model(shape), []
    x = m.model.embed_tokens(mx.array([ids_from(1, 64)]))
    for block in m.model.layers:
        attention, y = block.self_attn, block.input_layernorm(x)
        heads, kv_heads = attention.heads
        q = attention.q_proj(y).reshape(64, heads, -1).swapaxes(0, 1)
        k = attention.k_proj(y).reshape(64, kv_heads, -1).swapaxes(0, 1)
        scores = np.array(attention.scale * q @ mx.repeat(k, heads // kv_heads, axis=0).swapaxes(1, 2))
        largest.append((scores.min(), scores.max()))
    (flat_low, flat_high), (low, high) = largest
    assert low < -200
    assert high > 200
    assert -3 < flat_low < flat_high < 3
    said = [ids_of(expected(shape, "4", n)[0]) for n in range(len(REQUESTS))]
    assert len({id for ids in said for id in ids}) > 20
    assert m.rows_are_independent


@every_model
@every_storage
def test_a_request_gets_in_any_batch_what_it_gets_alone(shape: Shape, name: str) -> None:
    for first, size in ((0, 2), (3, 3), (6, 5), (0, 8)):
        which = [(first + i) % len(REQUESTS) for i in range(size)]
        engine = Engine(model(shape), STORAGES[name], prefill_chunk=(None, 64, 7, 256)[size % 4])
        got = together(engine, [engine.submit(REQUESTS[n])[0] for n in which])
        for n, steps in zip(which, got, strict=True):
            assert steps == expected(shape, name, n)[0]
        left = [stored(sequence) for sequence in engine.idle_sequences]
        assert all(expected(shape, name, n)[1] in left for n in which)


@every_model
@every_storage
def test_lookup_changes_no_step_and_no_byte(shape: Shape, name: str) -> None:
    for n in (1, 2, 3):
        steps, bytes_left = expected(shape, name, n)
        for seed in (1, 2):
            drafts = Drafts(ids_of(steps), seed)
            request = replace(REQUESTS[n], lookup=drafts)
            assert alone(model(shape), request, storage=STORAGES[name]) == (steps, bytes_left)
            assert drafts.drafted > 0


@every_model
@every_storage
def test_a_restored_sequence_goes_on_as_the_live_one(shape: Shape, name: str, tmp_path: Path) -> None:
    m, storage = model(shape), STORAGES[name]
    live = Engine(m, storage)
    steps = list(live.submit(REQUESTS[1])[0])
    save_cache(tmp_path / "cache", m, storage, live.idle_sequences[-1])
    restored = Engine(m, storage)
    restored.keep(load_cache(tmp_path / "cache", m, storage))
    assert stored(restored.idle_sequences[-1]) == stored(live.idle_sequences[-1])
    more = Request([*REQUESTS[1].prompt, *ids_of(steps), *ids_from(9, 20)], 8, logprobs=3)
    got = []
    for engine in (live, restored):
        (generation,) = engine.submit(more)
        got.append((list(generation), stored(engine.idle_sequences[-1]), generation.cached_tokens))
    assert got[0] == got[1]
    assert got[0][2] >= 261


@every_model
@every_storage
def test_samples_are_those_of_single_calls(shape: Shape, name: str) -> None:
    for n in (2,):
        samples = [replace(REQUESTS[n], params=SamplingParams(temperature=1.0, seed=seed)) for seed in range(4)]
        engine = Engine(model(shape), STORAGES[name])
        got = together(engine, engine.submit(*samples))
        assert got == [alone(model(shape), one, storage=STORAGES[name])[0] for one in samples]
        assert len({tuple(ids_of(steps)) for steps in got}) > 1


LONG = ids_from(20, 290)


@every_model
@every_storage
def test_a_prefix_that_was_read_before_is_as_good_as_reading_it(shape: Shape, name: str) -> None:
    """Each hit with one size of chunk; over all models every hit meets every size. A segment of one token: below."""
    m, storage, request = model(shape), STORAGES[name], Request(LONG, 3, logprobs=416)
    fresh, chunks = alone(m, request, storage=storage), (1, 7, 64, 256, None)
    for i, hit in enumerate((32, 63, 255, 256, 257)):
        chunk = chunks[(i + MODELS.index(shape)) % 5]
        engine = Engine(m, storage, prefill_chunk=chunk)
        list(engine.submit(Request([*LONG[:hit], LONG[hit] ^ 1, 5, 7], 2))[0])
        (generation,) = engine.submit(request)
        assert (list(generation), stored(engine.idle_sequences[-1])) == fresh
        assert generation.cached_tokens == hit


@every_model
@every_storage
def test_segments_may_end_anywhere(shape: Shape, name: str) -> None:
    """Ends inside a split of 256 keys, at one, and so many that neighbours are joined; then steps and a draft."""
    m, ids = model(shape), LONG

    def read(ends: List[int]) -> tuple[list[bytes], list[bytes]]:
        sequence, logits = make_sequence(m.args, STORAGES[name]), []
        others = []
        for start, end in zip((0, *ends), (*ends, 280), strict=True):
            logits.append(m(mx.array([ids[start:end]]), [(sequence, end - start)], prompt=True))
            if end < 280:
                others.append(sequence.share())
        for start, end in ((280, 281), (281, 287), (287, 290)):
            logits.append(m(mx.array([ids[start:end]]), [(sequence, end - start)], prompt=False))
        assert len(sequence.segments) == min(5, len(ends))
        return [np.array(mx.concatenate(logits, axis=1)).tobytes()], stored(sequence)

    whole = read([])
    for ends in ([100], [256], [1, 257], [30, 31, 97, 255, 270], [10, 20, 30, 40, 50, 60, 250, 260]):
        assert read(ends) == whole
