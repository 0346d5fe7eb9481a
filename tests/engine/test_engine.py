"""Requests side by side: each gets what it gets alone, prompts are read once, nobody waits longer than a chunk."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.meta_reference import Geometry, random_weights
from oracles.mlx_models import our_model
from stand_ins import tiny_codellama, tiny_model, tiny_tokenizer

from mlx_codellama.api import CodeLlama, load
from mlx_codellama.cache import KVCache, make_sequence
from mlx_codellama.cache import Sequence as Tokens
from mlx_codellama.engine import Engine, Generation, Request, Step, turns
from mlx_codellama.engine.prefix import MOST_IDLE, PrefixCache
from mlx_codellama.errors import BackendError, MemoryBudgetError, NotSupported, PromptError
from mlx_codellama.memory import MemoryPlan
from mlx_codellama.model import Model
from mlx_codellama.sampling import Sampler, SamplingParams
from mlx_codellama.storage import KVStorage


class Watched:
    """A model that notes its forward passes: the number of tokens of each span, and whether they were a prompt's."""

    def __init__(self, model: Any = None) -> None:
        self.model = model or tiny_model()
        self.args = self.model.args
        self.passes: list[tuple[bool, list[int]]] = []
        self.spoil: set[int] = set()  # passes whose logits become NaN

    def hidden(self, ids: mx.array, spans: Sequence[tuple[Any, int]], *, prompt: bool = True) -> mx.array:
        self.passes.append((prompt, [n for _, n in spans]))
        return self.model.hidden(ids, spans, prompt=prompt)

    def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
        return self.model.head(x, prompt=prompt)

    @property
    def prompts(self) -> list[int]:
        return [n for prompt, spans in self.passes if prompt for n in spans]


def ids_from(seed: int, n: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, 400, n - 1).tolist()]


def ids_of(steps: Sequence[Step]) -> list[int]:
    return [step.id for step in steps if step.id is not None]


def alone(request: Request, model: Model | None = None, **options: Any) -> list[Step]:
    return list(Engine(model or tiny_model(), **options).submit(request)[0])


def together(engine: Engine, generations: list[Generation]) -> list[list[Step]]:
    got: list[list[Step]] = [[] for _ in generations]
    for i, step in turns(engine, generations):
        got[i].append(step)
    return got


@functools.lru_cache
def wide_model() -> Model:
    """Random weights with heads of 64, which packed rows need, three of them to a kv head."""
    geometry = Geometry(dim=192, n_layers=2, n_heads=3, n_kv_heads=1, ffn_dim=80, vocab_size=416)
    return our_model(random_weights(geometry, seed=6), geometry)


REQUESTS = [
    Request(ids_from(1, 9), 12),
    Request(ids_from(2, 40), 7, SamplingParams(temperature=0.9, seed=3), logprobs=3),
    Request(ids_from(3, 3), 15, SamplingParams(repetition_penalty=1.6)),
    Request(ids_from(4, 70), 1),
    Request(ids_from(5, 21), 10, SamplingParams(temperature=1.2, top_p=0.9, seed=8)),
]


@pytest.mark.parametrize("bits", [None, 16, 8, (8, 4), 4], ids=str)
@pytest.mark.parametrize("chunk", [None, 16])
def test_each_gets_beside_others_what_it_gets_alone(bits: Any, chunk: int | None) -> None:
    storage = KVStorage.of(bits)
    engine = Engine(wide_model(), storage, prefill_chunk=chunk)
    got = together(engine, [engine.submit(request)[0] for request in REQUESTS])
    for steps, request in zip(got, REQUESTS, strict=True):
        want = alone(request, wide_model(), storage=storage, prefill_chunk=chunk)
        assert ids_of(steps) == ids_of(want)
        assert steps[-1].finish_reason == "length"
    assert [len(steps) for steps in got] == [12, 7, 15, 1, 10]


def test_running_requests_share_one_pass() -> None:
    model = Watched()
    engine = Engine(model)  # type: ignore[arg-type]
    together(engine, [engine.submit(Request(ids_from(n, 5), 9))[0] for n in range(3)])
    assert max(len(spans) for prompt, spans in model.passes if not prompt) == 3
    # Nine tokens each: eight passes after the first token of each, a few more while not all have begun.
    assert sum(not prompt for prompt, _ in model.passes) <= 8 + 4


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    model, prompt = Watched(), ids_from(6, 50)
    engine = Engine(model)  # type: ignore[arg-type]
    requests = [Request(prompt, 6, SamplingParams(temperature=1.0, seed=seed)) for seed in range(4)]
    got = together(engine, engine.submit(*requests))
    assert model.prompts == [50]
    assert [ids_of(steps) for steps in got] == [ids_of(alone(request)) for request in requests]
    assert len({tuple(ids_of(steps)) for steps in got}) == 4


def test_more_samples_than_run_at_a_time_still_read_it_once() -> None:
    model, prompt = Watched(), ids_from(7, 30)
    engine = Engine(model, max_running=2)  # type: ignore[arg-type]
    requests = [Request(prompt, 4, SamplingParams(temperature=1.0, seed=seed)) for seed in range(5)]
    got = together(engine, engine.submit(*requests))
    assert model.prompts == [30]
    assert [ids_of(steps) for steps in got] == [ids_of(alone(request)) for request in requests]
    assert max(len(spans) for _, spans in model.passes) == 2


def test_prompts_that_begin_alike_read_their_beginning_once() -> None:
    model, shared = Watched(), ids_from(8, 90)
    engine = Engine(model, prefill_chunk=16)  # type: ignore[arg-type]
    requests = [Request([*shared, *ids_from(n, 5)], 3) for n in range(20, 23)]
    got = together(engine, [engine.submit(request)[0] for request in requests])
    assert sum(model.prompts) <= 90 + 3 * 5 + 2 * 16
    assert [ids_of(steps) for steps in got] == [ids_of(alone(request)) for request in requests]


def test_each_conversation_keeps_its_beginning() -> None:
    engine, cached = Engine(tiny_model()), []
    talks = [ids_from(30, 80), ids_from(31, 70)]
    for _ in range(3):
        for talk in talks:
            (generation,) = engine.submit(Request(list(talk), 4))
            talk += ids_of(list(generation))
            cached.append(generation.cached_tokens)
            talk += [9, 8, 7]
    assert cached[:2] == [0, 0] or cached[1] <= 1  # the beginning of sequence is shared by all
    # What was read back: all of the talk but its last token, and not what was added since.
    assert cached[2:] == [83, 73, 90, 80]


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one_at_most() -> None:
    model = Watched()
    engine = Engine(model, prefill_chunk=10)  # type: ignore[arg-type]
    (long,) = engine.submit(Request(ids_from(40, 200), 1))
    engine.take_turn()
    (short,) = engine.submit(Request(ids_from(41, 6), 2))
    assert len(list(short)) == 2
    assert model.prompts.count(10) <= 4
    assert len(list(long)) == 1


def test_a_step_is_taken_between_the_chunks_of_a_prompt() -> None:
    model = Watched()
    engine = Engine(model, prefill_chunk=10)  # type: ignore[arg-type]
    (talk,) = engine.submit(Request(ids_from(42, 6), 30))
    next(talk)
    model.passes.clear()
    (long,) = engine.submit(Request(ids_from(43, 100), 1))
    list(long)
    kinds = [prompt for prompt, _ in model.passes]
    assert kinds.count(True) == 10
    assert all(not (a and b) for a, b in itertools.pairwise(kinds))  # never two chunks in a row
    assert len(list(talk)) == 29


def test_nobody_runs_far_ahead_of_a_caller_who_does_not_fetch() -> None:
    engine = Engine(tiny_model())
    (idle,) = engine.submit(Request(ids_from(44, 6), 200))
    (busy,) = engine.submit(Request(ids_from(45, 6), 200))
    next(idle)
    list(busy)
    assert len(idle._run.steps) <= 40
    assert len(list(idle)) == 199


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_one_does_wrong_does_not_end_the_others() -> None:
    def broken() -> bool:
        raise RuntimeError("out of order")

    engine = Engine(tiny_model())
    (good,) = engine.submit(REQUESTS[0])
    (bad,) = engine.submit(Request(ids_from(50, 12), 9, should_stop=broken))
    with pytest.raises(RuntimeError, match="out of order"):
        list(bad)
    assert ids_of(list(good)) == ids_of(alone(REQUESTS[0]))
    assert list(bad) == []  # it has ended


def test_logits_that_are_not_finite_end_one_request() -> None:
    class Poisoned(Watched):
        def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
            logits = super().head(x, prompt=prompt)
            _, spans = self.passes[-1]
            return mx.concatenate([logits[:, :-1], logits[:, -1:] * mx.nan], axis=1) if len(spans) == 2 else logits

    engine = Engine(Poisoned())  # type: ignore[arg-type]
    generations = [engine.submit(request)[0] for request in REQUESTS[:2]]
    with pytest.raises(BackendError, match="not finite"):
        list(generations[1])
    assert ids_of(list(generations[0])) == ids_of(alone(REQUESTS[0]))


def test_closing_in_the_middle_leaves_what_was_fetched_for_the_next() -> None:
    engine, prompt = Engine(tiny_model()), ids_from(51, 40)
    (first,) = engine.submit(Request(prompt, 30))
    got = [next(first).id for _ in range(5)]
    first.close()
    assert list(first) == []
    (left,) = engine.idle_sequences
    assert left.ids == [*prompt, *got][: left.offset]
    assert left.offset >= 44
    (second,) = engine.submit(Request([*prompt, *got, 7], 1))  # type: ignore[list-item]
    list(second)
    assert second.cached_tokens >= 44


def test_dropping_a_generation_frees_its_place_and_its_memory() -> None:
    engine = Engine(tiny_model(), max_running=1, idle_bytes=0)
    for n in range(5):
        (one,) = engine.submit(Request(ids_from(60 + n, 40), 30))
        next(one)
        del one
    assert len(engine.idle_sequences) == 1
    assert len(list(engine.submit(REQUESTS[0])[0])) == 12


def test_a_dropped_engine_is_freed_without_the_cyclic_collector() -> None:
    list(Engine(tiny_model()).submit(Request(ids_from(69, 300), 30))[0])  # the model's table of angles is made once
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        engine = Engine(tiny_model())
        (one,) = engine.submit(Request(ids_from(70, 300), 30))
        next(one)
        assert mx.get_active_memory() > before
        del one, engine
        mx.synchronize()  # the pass that was queued ahead
        assert mx.get_active_memory() <= before
    finally:
        gc.enable()


def test_cancelling_from_another_thread_ends_at_the_next_step() -> None:
    engine = Engine(tiny_model())
    (one,) = engine.submit(Request(ids_from(71, 8), 400))
    next(one)
    thread = threading.Thread(target=one.cancel)
    thread.start()
    thread.join()
    assert [step.finish_reason for step in one][-1] == "cancelled"


@pytest.mark.parametrize("where", ["on_prefill", "should_stop"])
def test_a_callback_that_calls_the_model_gets_a_clear_error(where: str) -> None:
    engine = Engine(tiny_model())

    def call(*_: int) -> bool:
        list(engine.submit(REQUESTS[0])[0])
        return False

    (one,) = engine.submit(Request(ids_from(72, 8), 4, **{where: call}))  # type: ignore[arg-type]
    with pytest.raises(NotSupported, match="inside a callback"):
        list(one)
    assert ids_of(list(engine.submit(REQUESTS[0])[0])) == ids_of(alone(REQUESTS[0]))


def test_threads_get_what_they_get_alone() -> None:
    engine, got = Engine(tiny_model()), dict[int, list[int]]()

    def work(n: int) -> None:
        got[n] = ids_of(list(engine.submit(REQUESTS[n])[0]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: ids_of(alone(request)) for n, request in enumerate(REQUESTS)}


# ── what must not happen ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_first_choice_that_fails_ends_its_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # The third sample begins when it is admitted, long after its prompt was read: its caller must not wait for ever.
    def sampler(params: SamplingParams, ids: list[int]) -> Sampler:
        if params.seed == 2:
            raise MemoryError
        return Sampler(params, ids)

    monkeypatch.setattr("mlx_codellama.engine.engine.Sampler", sampler)
    prompt = ids_from(81, 30)
    requests = [Request(prompt, 5, SamplingParams(temperature=1.0, seed=seed)) for seed in range(5)]
    engine = Engine(tiny_model(), max_running=2)
    generations = engine.submit(*requests)
    first = ids_of(list(generations[0]))  # in whose turns the third sample begins
    with pytest.raises(MemoryBudgetError):
        list(generations[2])
    monkeypatch.undo()
    assert first == ids_of(alone(requests[0]))
    for n in (1, 3, 4):
        assert ids_of(list(generations[n])) == ids_of(alone(requests[n]))


def test_samples_that_wait_survive_a_callback_that_fails_after_the_last_chunk() -> None:
    def broken(done: int, total: int) -> None:
        raise RuntimeError("out of order")

    prompt = ids_from(82, 40)
    requests = [Request(prompt, 5, on_prefill=broken if n == 0 else None) for n in range(4)]
    generations = Engine(tiny_model(), max_running=2).submit(*requests)
    with pytest.raises(RuntimeError, match="out of order"):
        list(generations[0])
    want = ids_of(alone(requests[1]))
    assert [ids_of(list(one)) for one in generations[1:]] == [want] * 3


@pytest.mark.parametrize("window", [None, 16])
def test_samples_that_wait_survive_ctrl_c_after_the_last_chunk(window: int | None) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    storage, prompt = KVStorage.of(None, window=window), ids_from(83, 40)
    requests = [Request(prompt, 5, on_prefill=interrupt if n == 0 else None) for n in range(4)]
    engine = Engine(tiny_model(), storage, max_running=2, prefill_chunk=16)
    generations = engine.submit(*requests)
    with pytest.raises(KeyboardInterrupt):
        list(generations[0])
    want = ids_of(alone(requests[1], storage=storage, prefill_chunk=16))
    assert [ids_of(list(one)) for one in generations[2:]] == [want] * 2


def test_what_a_failed_pass_left_goes_on_in_another_thread() -> None:
    # MLX computes a graph only in the thread that built it.
    class Failing(Watched):
        def hidden(self, ids: mx.array, spans: Sequence[tuple[Any, int]], *, prompt: bool = True) -> mx.array:
            x = super().hidden(ids, spans, prompt=prompt)
            if len(self.passes) == 2:
                raise MemoryError
            return x

    engine, request, got = Engine(Failing(), prefill_chunk=16), Request(ids_from(93, 60), 5), list[Step]()  # type: ignore[arg-type]
    with pytest.raises(MemoryBudgetError):
        list(engine.submit(request)[0])
    thread = threading.Thread(target=lambda: got.extend(engine.submit(request)[0]))
    thread.start()
    thread.join()
    assert ids_of(got) == ids_of(alone(request))


def test_a_common_first_token_is_not_shared() -> None:
    engine = Engine(tiny_model())
    list(engine.submit(Request(ids_from(84, 400), 3))[0])
    large = engine.idle_sequences[0].nbytes
    (small,) = engine.submit(Request([1, *range(300, 320)], 9))
    next(small)
    assert small.cached_tokens == 0
    (run,) = engine._runs
    assert run.sequence is not None
    assert run.sequence.nbytes < large / 4  # nor does it keep the large one in memory
    (talk,) = engine.submit(Request(ids_from(85, 90), 40))
    next(talk)
    for n in range(6):
        list(engine.submit(Request([1, *range(100 + n, 120 + n)], 2))[0])
    assert all(not run.sequence.segments for run in engine._runs if run.sequence)  # nobody cut up what is running


def test_little_of_a_long_text_does_not_keep_all_of_it() -> None:
    engine, long = Engine(tiny_model(), idle_bytes=0), ids_from(86, 400)
    list(engine.submit(Request(long, 1))[0])
    large = engine.idle_sequences[0].nbytes
    (short,) = engine.submit(Request([*long[:40], 7], 2))
    assert ids_of(list(short)) == ids_of(alone(Request([*long[:40], 7], 2)))
    assert short.cached_tokens == 40
    assert sum(engine.storages.values()) < large / 2


def test_the_number_of_idle_sequences_is_bounded() -> None:
    prefixes = PrefixCache(10**9)
    for _ in range(2 * MOST_IDLE):
        prefixes.leave(Tokens([KVCache()]), [])  # holds nothing, and is not kept
    assert not prefixes.idle
    engine, prompt = Engine(tiny_model()), ids_from(87, 4)
    for n in range(MOST_IDLE + 9):
        list(engine.submit(Request([*prompt, n % 400], 0))[0])
    assert len(engine.idle_sequences) == MOST_IDLE


def test_an_empty_sequence_of_the_caller_has_nothing_cached() -> None:
    (one,) = Engine(tiny_model(), prefill_chunk=16).submit(
        Request(ids_from(88, 50), 2), sequence=make_sequence(tiny_model().args)
    )
    list(one)
    assert one.cached_tokens == 0


def test_after_close_nothing_comes_any_more_not_even_an_error() -> None:
    class Poisoned(Watched):
        def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
            return super().head(x, prompt=prompt) * mx.nan

    engine = Engine(Poisoned())  # type: ignore[arg-type]
    one, two = (engine.submit(request)[0] for request in REQUESTS[:2])
    with pytest.raises(BackendError):
        list(one)
    while not two.is_ready:
        engine.take_turn()
    two.close()
    assert list(two) == []


@pytest.mark.parametrize("ends", ["itself", "close"])
def test_a_generation_that_has_ended_holds_no_model_and_no_keys(ends: str) -> None:
    engine = Engine(tiny_model())
    (one,) = engine.submit(Request(ids_from(89, 300), 2))
    next(one)
    one.close() if ends == "close" else list(one)
    gone = weakref.ref(engine)
    (sequence,) = map(weakref.ref, engine.idle_sequences)
    engine.forget()
    assert sequence() is None
    del engine
    assert gone() is None
    assert list(one) == []


def test_what_is_abandoned_while_a_turn_ends_is_ended_at_once() -> None:
    engine = Engine(tiny_model())
    one, two = (engine.submit(request)[0] for request in REQUESTS[:2])
    kept: list[Generation] = [one]
    next(two)
    del one
    end = engine._end_abandoned

    def and_then() -> None:
        end()
        kept.clear()

    engine._end_abandoned = and_then  # type: ignore[method-assign]
    engine.take_turn()
    assert len(engine._runs) == 1


def test_no_request_at_a_time_is_refused() -> None:
    with pytest.raises(PromptError, match="max_running is 0"):
        Engine(tiny_model(), max_running=0)
    with pytest.raises(PromptError, match="prefill_chunk is 0"):
        tiny_codellama().prefill_chunk = 0


class Counted:
    """Memory of a fixed size. What is reserved is `kv` bytes a token, up to `most` tokens."""

    def __init__(self, allowed: int, kv: int = 1, most: int = 10**9) -> None:
        self.allowed, self.kv, self.most = allowed, kv, most

    def plan(self, context: int, storage: KVStorage | None = None, most: int | None = None) -> MemoryPlan:
        return MemoryPlan(context, 0, self.kv * min(context, self.most), 0)

    def chunk_tokens(self, offset: int) -> int:
        return 1024

    def allowed_bytes(self) -> int:
        return self.allowed

    def check_call(self, n_tokens: int, reused_bytes: int, chunk: int | None = None) -> int | None:
        return None


def test_who_reads_on_for_another_sample_takes_over_what_it_reserved() -> None:
    stop = threading.Event()
    prompt = ids_from(90, 60)
    engine = Engine(tiny_model(), prefill_chunk=16, memory=Counted(2**40))
    first, second = engine.submit(Request(prompt, 4, should_stop=stop.is_set), Request(prompt, 9))
    engine.take_turn()
    assert [run.promised for run in engine._runs] == [64, 9]
    stop.set()
    engine.take_turn()
    assert [run.promised for run in engine._runs] == [69]
    assert next(first).finish_reason == "cancelled"
    assert ids_of(list(second)) == ids_of(alone(Request(prompt, 9)))


def test_samples_of_a_window_reserve_a_window_each() -> None:
    storage, prompt = KVStorage.of(None, window=16), ids_from(91, 60)
    engine = Engine(tiny_model(), storage, memory=Counted(2**40, most=52))
    samples = engine.submit(*[Request(prompt, 4) for _ in range(3)])
    next(samples[0])
    assert [run.promised for run in engine._runs] == [52, 52, 52]


def test_what_a_shared_beginning_takes_over_is_counted_once() -> None:
    engine, prompt = Engine(tiny_model(), memory=Counted(2**40)), ids_from(92, 60)
    (one,) = engine.submit(Request([*prompt, 5], 40))
    next(one)
    (two,) = engine.submit(Request([*prompt, 6], 40))
    next(two)
    run = engine._runs[1]
    assert run.promised == 41
    assert run.sequence is not None
    assert run.own_bytes == run.sequence.nbytes - sum(s.storage.nbytes for s in run.sequence.segments)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_hold_their_prompt_once() -> None:
    engine, prompt = Engine(wide_model(), KVStorage.of(8)), ids_from(80, 400)
    requests = [Request(prompt, 20, SamplingParams(temperature=1.0, seed=seed)) for seed in range(8)]
    generations = engine.submit(*requests)
    for generation in generations:
        next(generation)
    sequences = [run.sequence for run in engine._runs]
    assert len(sequences) == 8
    pieces = {key: n for sequence in sequences for key, n in sequence.storages.items()}  # type: ignore[union-attr]
    single = Engine(wide_model(), KVStorage.of(8))
    (one,) = single.submit(requests[0])
    next(one)
    assert sum(pieces.values()) <= 2.1 * single._runs[0].sequence.nbytes  # type: ignore[union-attr]


def test_requests_wait_until_what_they_may_grow_to_can_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "40MB")
    m = load(max_context=512)
    prompts = [" ".join(f"word{n + i}" for i in range(60)) for n in range(12)]
    mx.clear_cache()
    mx.reset_peak_memory()
    streams = [m.stream_complete(prompt, max_tokens=50) for prompt in prompts]
    for stream in streams:
        next(stream)
    texts = [stream.drain().text for stream in streams]
    assert mx.get_peak_memory() < 40e6
    assert texts == [m.complete(prompt, max_tokens=50).text for prompt in prompts]


def test_a_request_that_does_not_fit_alone_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m = load()
    mx.clear_cache()
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", str(mx.get_active_memory() + 10**6))
    with pytest.raises(MemoryBudgetError):
        m.stream_complete("x" * 100, max_tokens=400)


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_prompts_and_samples_are_what_single_calls_give() -> None:
    m, prompts = tiny_codellama(), ["def f(x):", "class A:\n", "x = "]
    many = m.complete_many(prompts, n=2, max_tokens=9, temperature=0.9, seed=5)
    assert [len(samples) for samples in many] == [2, 2, 2]
    for prompt, samples in zip(prompts, many, strict=True):
        for i, sample in enumerate(samples):
            assert 1e-5 < sample.stats.ttft_s < 60  # from the call on, not from the sample's own first token
            single = CodeLlama(tiny_model(), tiny_tokenizer()).complete(
                prompt, max_tokens=9, temperature=0.9, seed=5 + i
            )
            assert (sample.text, sample.ids, sample.stats.seed) == (single.text, single.ids, 5 + i)
    assert m.complete_many([]) == []


def test_pieces_of_many_join_to_their_results() -> None:
    m = tiny_codellama()
    with m.stream_many(["def f(x):", "y"], n=2, max_tokens=8) as pieces:
        texts: dict[tuple[int, int], str] = {}
        for piece in pieces:
            texts[piece.prompt, piece.sample] = texts.get((piece.prompt, piece.sample), "") + piece.text
        assert texts == {(i, j): r.text for i, row in enumerate(pieces.results) for j, r in enumerate(row) if r.text}


@pytest.mark.parametrize(
    ("prompts", "n", "error"), [("text", 1, TypeError), (["a"], 0, Exception), (["a"], 1.5, TypeError)]
)
def test_many_refuses_what_is_no_list_or_no_count(prompts: Any, n: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        tiny_codellama().complete_many(prompts, n=n)
