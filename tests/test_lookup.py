"""Prompt lookup: what is drafted, when it is worth it, and that no draft, however wrong, changes an answer."""

from __future__ import annotations

import functools
import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import ScriptedModel, tiny_codellama, tiny_model

from mlx_codellama.api import CodeLlama, codellama, load
from mlx_codellama.cache import make_sequence
from mlx_codellama.engine import Step, generate
from mlx_codellama.errors import BackendError
from mlx_codellama.lookup import ROWS, Costs, Lookup, Odds, Source
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.storage import KVStorage

PROMPT = np.random.RandomState(8).randint(3, 400, 37).tolist()
GREEDY = SamplingParams()


class Careless(Lookup):
    """Drafts the true continuation with some ids spoilt; a pass is as wide as it can be, or now and then of one row.

    seed  None: nothing is spoilt and every pass is wide
    """

    def __init__(self, truth: Sequence[int], seed: int | None, rows: int = 6) -> None:
        super().__init__()
        self.truth, self.n, self.wide = list(truth), 0, rows
        self.rng = None if seed is None else random.Random(seed)

    def rows(self) -> int:
        return 1 if self.rng and self.rng.random() < 0.2 else self.wide

    def draft(self, most: int) -> list[int]:
        ahead = self.truth[self.n : self.n + min(self.wide - 1, most)]
        return [self.rng.randrange(3, 400) if self.rng and self.rng.random() < 0.2 else id for id in ahead]

    def settle(self, n_drafted: int, ids: Sequence[int]) -> None:
        self.n += len(ids)
        super().settle(n_drafted, ids)


@functools.lru_cache
def true_ids(params: SamplingParams) -> list[int]:
    return ids_of(plain(30, params))


def plain(n: int, params: SamplingParams, **options: object) -> list[Step]:
    return list(generate(tiny_model(), PROMPT, max_tokens=n, params=params, **options))  # type: ignore[arg-type]


def ids_of(steps: Sequence[Step]) -> list[int]:
    return [step.id for step in steps if step.id is not None]


WAYS = [
    GREEDY,
    SamplingParams(repetition_penalty=1.7, repetition_window=5),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.3, top_p=0.9, min_p=0.01, seed=4),
    SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.3, seed=5),
]


# ── exact ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "penalty", "sampled", "top-p", "top-k and penalty"])
@pytest.mark.parametrize(("seed", "rows"), [(3, 3), (1, 5), (2, 9)])
def test_ids_with_any_draft_are_those_without(params: SamplingParams, seed: int, rows: int) -> None:
    # Sampled ids would part at the first token if the random key or the recent tokens were one choice off.
    truth = true_ids(params)
    lookup = Careless(truth, seed, rows)
    assert ids_of(plain(30, params, lookup=lookup)) == truth
    assert 0 < lookup.accepted < lookup.drafted


def test_logprobs_with_a_draft_are_those_without() -> None:
    params = SamplingParams(temperature=0.9, seed=3)
    want = plain(20, params, logprobs=3)
    got = plain(20, params, logprobs=3, lookup=Careless(ids_of(want), 1))
    assert [s.id for s in got] == [s.id for s in want]
    for a, b in zip(got, want, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert [id for id, _ in a.top] == [id for id, _ in b.top]


@pytest.mark.parametrize("at", [0, 1, 4, 7, 11])
def test_a_stop_id_inside_a_pass_ends_there_and_nothing_after_it_is_cached(at: int) -> None:
    truth = [90 + n for n in range(12)]
    model = ScriptedModel({len(PROMPT) + n: id for n, id in enumerate(truth)})
    cache, lookup = make_sequence(model.args), Careless(truth, None, rows=5)
    steps = list(
        generate(model, PROMPT, max_tokens=12, stop_ids={truth[at]}, sequence=cache, lookup=lookup)  # type: ignore[arg-type]
    )
    assert ids_of(steps) == truth[: at + 1]
    assert [s.finish_reason for s in steps] == [None] * at + ["stop"]
    assert cache.offset <= len(PROMPT) + at + 1
    assert model.read[: cache.offset] == [*PROMPT, *truth][: cache.offset]


@pytest.mark.parametrize("n", range(1, 9))
def test_max_tokens_is_kept_and_the_context_never_exceeded(n: int) -> None:
    truth = [90 + n for n in range(12)]
    model = ScriptedModel({len(PROMPT) + n: id for n, id in enumerate(truth)}, context=len(PROMPT) + n)
    cache, lookup = make_sequence(model.args), Careless(truth, 2, rows=9)
    steps = list(generate(model, PROMPT, max_tokens=n, sequence=cache, lookup=lookup))  # type: ignore[arg-type]
    assert ids_of(steps) == truth[:n]
    assert steps[-1].finish_reason == "length"
    assert len(model.read) < len(PROMPT) + n


def test_cancelling_inside_a_pass_ends_before_the_next_token() -> None:
    truth, got = [90 + n for n in range(12)], []
    model = ScriptedModel({len(PROMPT) + n: id for n, id in enumerate(truth)})
    lookup = Careless(truth, None, rows=6)
    for step in generate(
        model,
        PROMPT,
        max_tokens=12,
        lookup=lookup,
        should_stop=lambda: len(got) == 4,  # type: ignore[arg-type]
    ):
        got.append((step.id, step.finish_reason))
    assert got == [*((id, None) for id in truth[:4]), (None, "cancelled")]


def test_a_row_that_is_not_finite_ends_its_pass_and_is_an_error_only_where_it_counts() -> None:
    truth = [90 + n for n in range(9)]

    class Broken(ScriptedModel):
        def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
            logits = super().head(x, prompt=prompt)
            bad = [p >= len(PROMPT) + 5 for p in range(len(self.read))][-logits.shape[1] :]
            return mx.where(mx.array(bad)[None, :, None], mx.nan, logits)

    model = Broken({len(PROMPT) + n: id for n, id in enumerate(truth)})
    lookup = Careless(truth, None, rows=9)
    steps = generate(model, PROMPT, max_tokens=9, lookup=lookup)  # type: ignore[arg-type]
    assert [next(steps).id for _ in range(6)] == truth[:6]
    with pytest.raises(BackendError, match=rf"logits after {len(PROMPT) + 6} tokens"):
        next(steps)


def test_an_exact_tie_falls_to_the_same_token_in_a_wide_pass() -> None:
    # Every id of 200 to 399 has a twin 200 below it with the same weights: each choice is a tie of two.
    model = tiny_model()
    kept = model.lm_head.weight
    try:
        model.lm_head.weight = mx.concatenate([kept[:200], kept[:200], kept[400:]])
        wide = mx.random.normal((10, kept.shape[1]), key=mx.random.key(0)) @ model.lm_head.weight.T
        if not mx.array_equal(wide[:, :200], wide[:, 200:400]):
            pytest.skip("the BLAS rounds equal columns of a wide product apart, so there is no tie to keep")
        truth = ids_of(plain(40, GREEDY))
        assert all(id < 200 or id >= 400 for id in truth)
        for seed in range(2):
            assert ids_of(plain(40, GREEDY, lookup=Careless(truth, seed, rows=9))) == truth
    finally:
        model.lm_head.weight = kept


@pytest.mark.parametrize("storage", [KVStorage(window=8, sinks=2), KVStorage.of(16, window=1, sinks=0)], ids=str)
def test_a_window_takes_back_drafts_that_were_wrong(storage: KVStorage) -> None:
    """More than once round the ring, with drafts over its end."""
    without = ids_of(plain(80, GREEDY, storage=storage))
    for seed in range(3):
        lookup = Careless(without, seed)
        assert ids_of(plain(80, GREEDY, storage=storage, lookup=lookup)) == without
        assert lookup.drafted > lookup.accepted > 0


# ── through the API ─────────────────────────────────────────────────────────────────────────────────────────────────


def repeating(prompt: list[int]) -> CodeLlama:
    """A model that says the prompt again, and again."""
    model = ScriptedModel({p: prompt[p % len(prompt)] for p in range(len(prompt), 512)})
    return CodeLlama(model, tiny_codellama().tokenizer)  # type: ignore[arg-type]


def test_stats_tell_what_was_drafted_and_accepted() -> None:
    m = repeating(PROMPT)
    without, with_it = m.complete(PROMPT, max_tokens=100), m.complete(PROMPT, max_tokens=100, lookup=True)
    assert with_it.ids == without.ids
    assert (without.stats.drafted_tokens, without.stats.accepted_tokens) == (0, 0)
    assert 0 < with_it.stats.accepted_tokens <= with_it.stats.drafted_tokens


def test_a_stop_string_and_the_next_call_see_no_trace_of_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    m = repeating(PROMPT)
    monkeypatch.setattr(codellama, "Lookup", lambda costs: Careless([*PROMPT] * 9, None, rows=9))
    text = m.complete(PROMPT, max_tokens=60).text
    stop = text[20:24]
    m.forget()
    without = m.complete(PROMPT, max_tokens=60, stop=stop)
    m.forget()
    with_it = m.complete(PROMPT, max_tokens=60, stop=stop, lookup=True)
    assert (with_it.text, with_it.ids, with_it.stop) == (without.text, without.ids, stop)
    cache = m._engine.idle_sequences[-1]
    assert cache.offset == len(cache.ids) <= len(PROMPT) + len(with_it.ids) + 1
    again = m.complete([*PROMPT, *with_it.ids, 0, 0, 0, 0, 7], max_tokens=1)
    assert again.stats.cached_tokens <= len(PROMPT) + len(with_it.ids)
    assert m.model.read[: len(PROMPT) + len(with_it.ids) + 5] == [*PROMPT, *with_it.ids, 0, 0, 0, 0, 7]


def test_lookup_is_on_by_default_where_the_model_computes_in_float32() -> None:
    assert load(dtype="float32").lookup
    assert not load(dtype="bfloat16").lookup
    assert load(dtype="float32", kv_bits=8).lookup
    few_bits = load(dtype="float32", kv_bits=(8, 4))
    assert few_bits.lookup == few_bits.model.rows_are_independent
    m = repeating(PROMPT)
    m.lookup = True
    assert m.complete(PROMPT, max_tokens=100).stats.drafted_tokens > 0
    m.forget()
    assert m.complete(PROMPT, max_tokens=100, lookup=False).stats.drafted_tokens == 0


# ── what is drafted ─────────────────────────────────────────────────────────────────────────────────────────────────


def words(text: str) -> list[int]:
    """A stand-in tokenizer: parts of words and signs as numbers."""
    names: dict[str, int] = words.__dict__.setdefault("names", {})
    return [names.setdefault(part, len(names)) for part in re.findall(r" ?[A-Za-z]{1,4}|\n *|.", text)]


def passes(lookup: Lookup, prompt: list[int], answer: list[int], doubling: float) -> tuple[int, float]:
    """Let lookup meet a model that writes `answer`, where twice the rows cost `doubling` times as much. → n, cost."""
    lookup.begin(prompt)
    at, n, spent = 0, 0, 0.0
    while at < len(answer):
        draft = lookup.draft(len(answer) - at - 1)
        right = 0
        while right < len(draft) and draft[right] == answer[at + right]:
            right += 1
        cost = doubling ** float(np.log2(len(draft) + 1))
        lookup.settle(len(draft), answer[at : at + right + 1])
        lookup.timed(len(draft) + 1, cost)
        at, n, spent = at + right + 1, n + 1, spent + cost
    return n, spent


def source_text() -> str:
    return Path(textwrap.__file__).read_text(encoding="utf-8")[6000:15000]


def test_a_rename_is_drafted_from_its_second_occurrence_on() -> None:
    text = source_text()
    renamed = re.sub(r"\btext\b", "some_paragraph", text)
    assert len(re.findall(r"\btext\b", text)) > 12
    answer = words(renamed)
    n, _ = passes(Lookup(), words(text + "\nThe same, renamed:\n"), answer, 1.0)
    assert len(answer) / n > 7  # 8 is the most that a step can give; without edits it is 5.7


def test_after_a_mismatch_the_same_place_is_taken_up_again() -> None:
    source = Source([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99, 10, 11, 12], 4)
    assert [guess.id for guess in source.expected] == [13, 14, 15, 16]
    source.settle([13, 50])  # 14 became 50: one id for one
    assert [guess.id for guess in source.expected] == [15, 16, 17, 18]
    source.settle([51])  # 15 became 51
    assert source.expected[0].id == 16
    source.settle([16])
    assert [guess.id for guess in source.expected][:2] == [17, 18]


def test_what_repeats_is_drafted_beyond_the_end_of_what_is_known() -> None:
    source = Source([7, 5, 6, 8, 5, 6, 8, 5, 6, 8], 7)
    assert [guess.id for guess in source.expected] == [5, 6, 8, 5, 6, 8, 5]


def test_nothing_is_expected_where_nothing_occurred_before() -> None:
    assert Source([], 8).expected == []
    assert Source(range(50), 8).expected == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
def test_any_ids_may_come_and_the_known_ones_are_kept_in_order(prompt: list[int], more: list[list[int]]) -> None:
    source, known = Source(prompt, 5), list(prompt)
    for ids in more:
        right = [guess.id for guess in source.expected[: len(ids) - 1]] if ids[0] % 2 else []
        source.settle([*right, ids[-1]])
        known += [*right, ids[-1]]
        assert source.ids == known
        assert len(source.expected) < 5 + 24  # an edit is expected whole
        assert all(0 <= guess.place < len(known) + 29 for guess in source.expected)


# ── when it pays ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_drafting_stops_where_wide_passes_cost_what_they_give() -> None:
    prompt, answer = words(source_text()), words(source_text())[:1500]
    _, cheap = passes(Lookup(), prompt, answer, 1.2)
    _, dear = passes(Lookup(), prompt, answer, 2.0)
    assert cheap < 0.25 * len(answer)
    assert dear < 1.06 * len(answer)


def test_drafting_stops_where_guesses_are_wrong() -> None:
    # Places that look familiar and go on differently each time: three known ids, then chance.
    rng = np.random.RandomState(0)
    prompt, answer = ([x for _ in range(300) for x in (1, 2, 3, int(rng.randint(9, 5000)))] for _ in range(2))
    _, spent = passes(Lookup(), prompt, answer, 1.6)
    assert spent < 1.1 * len(answer)


def test_nothing_is_drafted_before_a_plain_pass_was_timed() -> None:
    lookup = Lookup()
    lookup.begin([*range(40), *range(20)])
    for id in range(20, 26):
        lookup.settle(0, [id])  # right each time
    assert (lookup.rows(), lookup.draft(9)) == (1, [])
    lookup.timed(1, 0.1)
    assert lookup.rows() > 1
    assert lookup.draft(9) == list(range(26, 40))[: lookup.rows() - 1]
    assert lookup.draft(1) == [26]
    assert lookup.draft(0) == []


def test_one_slow_first_pass_of_a_size_is_not_believed() -> None:
    costs = Costs()
    costs.note(1, 1.0)
    guessed = costs.of(2)
    costs.note(2, 50.0)
    assert costs.of(2) == guessed
    costs.note(2, 3.0)
    assert costs.of(2) == pytest.approx((50.0 + 3.0) / 2)
    for _ in range(Costs.STALE + 1):
        costs.note(1, 1.0)
    assert costs.of(2) == guessed


def test_odds_follow_what_happens() -> None:
    odds = Odds()
    assert odds.expected(0, 8) < odds.expected(30, 8) < 8
    for _ in range(50):
        odds.note(30, False)
    assert odds.of(30) < 0.1
    assert odds.of(0) == Odds.BELIEF[0]


def test_rows_are_doublings() -> None:
    assert [2**i for i in range(len(ROWS))] == list(ROWS)
