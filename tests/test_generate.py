"""Generation in ids: prompt reading, ends, cancellation, log-probabilities, errors."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from oracles.meta_reference import forward, greedy, random_weights
from stand_ins import GEOMETRY, ScriptedModel, tiny_model

from mlx_codellama.cache import make_sequence
from mlx_codellama.config import GEOMETRIES
from mlx_codellama.engine import Step, generate, read_logits
from mlx_codellama.errors import BackendError, ContextOverflowError, PromptError
from mlx_codellama.memory import CPU, GPU, Runtime, chunk_tokens
from mlx_codellama.sampling import SamplingParams

PROMPT = [1, 17, 300, 5, 5, 411, 88]


def ids_of(steps: list[Step]) -> list[int | None]:
    return [step.id for step in steps]


def scripted(*ids: int, **options: int) -> ScriptedModel:
    return ScriptedModel({len(PROMPT) + n: id for n, id in enumerate(ids)}, **options)


def test_greedy_ids_are_those_of_the_float64_reference() -> None:
    steps = list(generate(tiny_model(), PROMPT, max_tokens=12))
    assert ids_of(steps) == greedy(random_weights(GEOMETRY, seed=5), GEOMETRY, PROMPT, 12)
    assert len(set(ids_of(steps))) > 4  # not one token over and over


def test_a_stop_id_is_the_last_step() -> None:
    steps = list(generate(scripted(9, 8, 7, 6), PROMPT, max_tokens=4, stop_ids={7, 99}))
    assert ids_of(steps) == [9, 8, 7]
    assert [s.finish_reason for s in steps] == [None, None, "stop"]


def test_max_tokens_is_the_last_step_unless_a_stop_id_is() -> None:
    steps = list(generate(scripted(9, 8, 7), PROMPT, max_tokens=2))
    assert [(s.id, s.finish_reason) for s in steps] == [(9, None), (8, "length")]
    steps = list(generate(scripted(9, 8, 7), PROMPT, max_tokens=2, stop_ids=[8]))
    assert [(s.id, s.finish_reason) for s in steps] == [(9, None), (8, "stop")]


def test_no_tokens_reads_the_prompt_and_ends() -> None:
    model, cache = scripted(9), make_sequence(scripted(9).args)
    assert list(generate(model, PROMPT, max_tokens=0, sequence=cache)) == [Step(None, finish_reason="length")]
    assert cache.offset == len(PROMPT)
    assert model.read == PROMPT


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 100])
def test_the_prompt_is_read_in_chunks_and_progress_is_told(chunk: int) -> None:
    model, calls, told = scripted(9), [], []
    model.on_call = lambda offset, length: calls.append((offset, length))
    steps = generate(
        model, PROMPT, max_tokens=1, prefill_chunk=chunk, on_prefill=lambda done, total: told.append((done, total))
    )
    assert ids_of(list(steps)) == [9]
    assert calls == [(at, min(chunk, 7 - at)) for at in range(0, 7, chunk)]
    assert told == [(at + n, 7) for at, n in calls]


def test_what_is_cached_is_not_read_again() -> None:
    model, cache, calls = scripted(9, 8), make_sequence(scripted().args), []
    list(generate(model, PROMPT[:4], max_tokens=0, sequence=cache))
    model.on_call = lambda offset, length: calls.append((offset, length))
    assert ids_of(list(generate(model, PROMPT, max_tokens=2, sequence=cache))) == [9, 8]
    assert calls == [(4, 3), (7, 1)]
    with pytest.raises(ValueError, match="at least one must be left"):
        generate(model, PROMPT[:3], max_tokens=1, sequence=cache)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_after_each_step_the_cache_holds_what_was_yielded(n: int) -> None:
    # The step queued ahead must not leave a token in the cache that nobody was told.
    model = scripted(9, 8, 7, 6, 5)
    cache = make_sequence(model.args)
    steps = generate(model, PROMPT, max_tokens=5, sequence=cache)
    got = [next(steps).id for _ in range(n)]
    steps.close()  # type: ignore[attr-defined]
    assert cache.offset == len(PROMPT) + n
    assert model.read == PROMPT + got


def test_cancelling_between_chunks_ends_without_a_token() -> None:
    model, cache, asked = scripted(9), make_sequence(scripted().args), iter([False, False, True])
    steps = generate(model, PROMPT, max_tokens=3, sequence=cache, prefill_chunk=2, should_stop=lambda: next(asked))
    assert list(steps) == [Step(None, finish_reason="cancelled")]
    assert cache.offset == 4
    assert model.read == PROMPT[:4]


def test_cancelling_between_steps_ends_there() -> None:
    model, cache, got = scripted(9, 8, 7), make_sequence(scripted().args), []
    for step in generate(model, PROMPT, max_tokens=3, sequence=cache, should_stop=lambda: len(got) == 2):
        got.append((step.id, step.finish_reason))
    assert got == [(9, None), (8, None), (None, "cancelled")]
    assert cache.offset == len(PROMPT) + 2


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────


def test_logprobs_are_those_of_the_model() -> None:
    params = SamplingParams(temperature=0.3, repetition_penalty=1.5, seed=2)  # neither may change them
    steps = list(generate(tiny_model(), PROMPT, max_tokens=6, params=params, logprobs=3))
    ids = PROMPT + [s.id for s in steps if s.id is not None]
    truth = forward(random_weights(GEOMETRY, seed=5), GEOMETRY, [ids])[0]
    truth -= np.log(np.exp(truth).sum(-1, keepdims=True))
    for n, step in enumerate(steps):
        row = truth[len(PROMPT) - 1 + n]
        assert step.logprob == pytest.approx(row[step.id], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [id for id, _ in step.top] == best.tolist()
        assert [value for _, value in step.top] == pytest.approx(row[best], abs=1e-4)


def test_logprobs_come_only_when_asked_for() -> None:
    assert [(s.logprob, s.top) for s in generate(scripted(9), PROMPT, max_tokens=1)] == [(None, ())]
    (step,) = generate(scripted(9), PROMPT, max_tokens=1, logprobs=0)
    assert (step.logprob, step.top) == (pytest.approx(0.0, abs=1e-5), ())
    (step,) = generate(scripted(9), PROMPT, max_tokens=1, logprobs=416)
    assert sorted(id for id, _ in step.top) == list(range(416))
    assert math.fsum(math.exp(v) for _, v in step.top) == pytest.approx(1, abs=1e-5)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompt_and_tokens_beyond_the_context_are_refused_with_the_sum() -> None:
    model = scripted(9, context=20)
    with pytest.raises(ContextOverflowError, match=r"7 prompt tokens \+ max_tokens 14 = 21, the context has 20") as e:
        generate(model, PROMPT, max_tokens=14)
    assert "at most 13" in e.value.hint
    assert len(list(generate(model, PROMPT, max_tokens=13))) == 13
    assert len(list(generate(model, PROMPT, max_tokens=14, max_context=21))) == 14
    with pytest.raises(ContextOverflowError, match="the prompt has 21 tokens, the context 20"):
        generate(model, [1] * 21, max_tokens=0)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 416], {}, "token id 416 is outside the vocabulary of 416"),
        ([1, -1], {}, "token id -1 is outside"),
        ([1], {"max_tokens": -1}, "max_tokens is -1"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([1], {"logprobs": -1}, "logprobs is -1"),
        ([1], {"logprobs": 417}, "logprobs is 417"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(ids: list[int], options: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        generate(scripted(), ids, **{"max_tokens": 1, **options})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=1)])
def test_logits_that_are_not_finite_are_an_error_and_not_a_token(bad: float, params: SamplingParams) -> None:
    class Broken(ScriptedModel):
        def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
            logits = super().head(x, prompt=prompt)
            return mx.where(mx.arange(logits.shape[-1]) == 3, bad, logits) if len(self.read) > len(PROMPT) else logits

    steps = generate(Broken({7: 9, 8: 8}), PROMPT, max_tokens=3, params=params)
    assert next(steps).id == 9  # the first token is sound and is not lost
    with pytest.raises(BackendError, match="logits after 8 tokens are not finite"):
        next(steps)


# ── chunks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_of_known_length_makes_room_once() -> None:
    """Else every step of 256 tokens would copy what is there."""
    model = tiny_model()
    cache, seen = make_sequence(model.args), []
    ids = [1] * 400
    run = generate(
        model,
        ids,
        max_tokens=1,
        sequence=cache,
        prefill_chunk=50,
        on_prefill=lambda *_: seen.append(cache.layer(0).tail.capacity),
    )
    assert len(list(run)) == 1
    assert seen == [512] * 8


def test_read_logits_are_those_of_one_pass() -> None:
    ids = np.random.RandomState(3).randint(0, 416, 40)
    truth = forward(random_weights(GEOMETRY, seed=5), GEOMETRY, ids[None])[0]
    chunks = list(read_logits(tiny_model(), ids.tolist(), prefill_chunk=7))
    assert [c.shape for c in chunks] == [(7, 416)] * 5 + [(5, 416)]
    assert np.abs(np.concatenate(chunks) - truth).max() < 1e-4


@pytest.mark.parametrize("native", [True, False])
def test_chunks_shrink_with_context_where_scores_are_written_out(native: bool) -> None:
    runtime = Runtime("cpu", 4, native=native)
    sizes = [chunk_tokens(GEOMETRIES["7b"], offset, runtime) for offset in (0, 16_000, 100_000)]
    if native:  # attention keeps its scores to itself: nothing grows with what is cached
        assert sizes == [256, 256, 256]
    else:
        assert sizes[0] == 256 > sizes[1] > sizes[2] >= 16
        assert sizes[2] * 100_000 * 32 * 4 <= 512 * 2**20


def test_chunks_keep_to_their_budget() -> None:
    assert all(n % 16 == 0 and 16 <= n <= 1024 for n in [chunk_tokens(GEOMETRIES["7b"], n, GPU) for n in (0, 100_000)])
    small = [chunk_tokens(GEOMETRIES["7b"], 0, CPU, budget_bytes=b << 20) for b in (1, 64, 256)]
    assert small[0] == 16
    assert small[0] < small[1] <= small[2]
    assert chunk_tokens(GEOMETRIES["7b"], 0, CPU, budget_bytes=64 << 20, every_logit=True) < small[1]


def test_generation_needs_no_more_context_than_its_tokens() -> None:
    # The last token of a full context is generated but never read back.
    model = scripted(9, 8, context=len(PROMPT) + 1)
    (step,) = generate(model, PROMPT, max_tokens=1)
    assert (step.id, step.finish_reason) == (9, "length")
