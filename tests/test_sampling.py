"""Each sampling rule against a plain numpy version of it, and the draw against the odds it should have."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_codellama.errors import ConfigError
from mlx_codellama.sampling import Sampler, SamplingParams, draw, penalise, top_p_keep

V = 29


def some_logits(seed: int, size: int = V) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(size).astype(np.float32) * 2


def kept(logits: np.ndarray, n: int = 300, **params: float) -> set[int]:
    """The tokens that n draws give. Odds of missing one are stated where this is used."""
    settings_ = SamplingParams(temperature=params.pop("temperature", 1.0), **params)
    keys = mx.random.split(mx.random.key(3), n)
    return {draw(mx.array(logits), settings_, key).item() for key in keys}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


# ── top-p ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("top_p", "n_kept"),
    [(0.0, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.875, 4), (0.9, 4), (1.0, 4)],
)
def test_top_p_keeps_a_token_while_those_before_it_have_at_most_p(top_p: float, n_kept: int) -> None:
    # Halves are exact in binary, so the boundary itself is tested: `<` instead of `<=` fails at 0.5, 0.75, 0.875,
    # and the other common rule (stop once the sum reaches p) keeps one fewer there.
    keep = top_p_keep(mx.array([0.5, 0.25, 0.125, 0.125]), top_p)
    assert keep.tolist() == [n < n_kept for n in range(4)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 300), st.floats(0.0, 1.0))
def test_top_p_agrees_with_a_plain_loop(seed: int, size: int, top_p: float) -> None:
    probs = np.sort(softmax(some_logits(seed, size)))[::-1].astype(np.float32)
    before, expected = 0.0, []
    for p in probs:
        if abs(before - top_p) < 1e-5:  # float32 sums may fall on either side
            return
        expected.append(before <= top_p)
        before += float(p)
    assert top_p_keep(mx.array(probs), top_p).tolist() == expected


def test_draws_stay_inside_the_nucleus_and_reach_all_of_it() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
    # kept: 0.4, 0.3, 0.15 (0.7 before it) but not 0.1 (0.85 before it). The rarest has odds 0.15/0.85 per draw:
    # 300 draws miss it with probability 0.82^300 < 1e-25.
    assert kept(logits, top_p=0.8) == {1, 3, 4}


# ── top-k, min-p, temperature, their order ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_draws_only_the_k_most_likely(k: int) -> None:
    logits = some_logits(7) / 4  # flat: each of the five has odds of at least 5 %, 300 draws miss it 1 time in 1e6
    assert kept(logits, top_k=k) == set(np.argsort(-logits)[:k].tolist())


@pytest.mark.parametrize("k", [V, V + 5])
def test_top_k_of_the_vocabulary_or_more_keeps_all(k: int) -> None:
    assert len(kept(np.zeros(V, np.float32), top_k=k)) == V  # a token is missed with odds 29 · (28/29)^300 < 1e-3


def test_min_p_is_relative_to_the_most_likely_token() -> None:
    probs = np.array([0.02, 0.5, 0.28, 0.11, 0.09], np.float32)
    assert kept(np.log(probs), min_p=0.2) == {1, 2, 3}  # at least 0.1
    assert kept(np.log(probs), min_p=1.0) == {1}


def test_top_p_counts_what_top_k_left() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    # Of the two that top-k leaves, the first has 0.571: above 0.5, so the second falls. Over all four it has 0.4: kept.
    assert kept(np.log(probs), top_k=2, top_p=0.5) == {0}
    assert kept(np.log(probs), top_p=0.5) == {0, 1}


def test_top_k_hands_its_tokens_to_top_p_most_likely_first() -> None:
    # 400 tokens: MLX's partial sort leaves the 20 in some other order, which the nucleus must not follow.
    logits = some_logits(8, 400)
    nucleus = np.flatnonzero(reference_distribution(logits, top_k=20, top_p=0.5)).tolist()
    assert 3 < len(nucleus) < 12
    assert kept(logits, n=600, top_k=20, top_p=0.5) == set(nucleus)  # each has 5 % or more: missed with odds < 1e-12


def test_temperature_comes_before_top_p() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    # Squared and renormalised (temperature 0.5): 0.533, 0.3, 0.133, 0.033. With the order reversed {0, 1} would stay.
    assert kept(np.log(probs), temperature=0.5, top_p=0.5) == {0}


def test_a_very_low_temperature_is_the_argmax_and_not_nan() -> None:
    logits = np.array([3.0, 79.99, 80.0, -5.0], np.float32)
    assert kept(logits, n=20, temperature=1e-37) == {2}  # 80 / 1e-37 overflows float32


# ── the draw ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9, "min_p": 0.05}],
    ids=str,
)
def test_frequencies_are_the_probabilities(params: dict[str, float]) -> None:
    """Chi-square over 4000 draws with a fixed seed. A right sampler exceeds the bound for 1 seed in 10^4."""
    n, logits = 4000, some_logits(11, 8) / 2.5  # several tokens survive every cut
    expected = reference_distribution(logits, **params)
    settings_ = SamplingParams(**{"temperature": 1.0, **params})
    keys = mx.random.split(mx.random.key(12), n)
    counts = np.bincount(np.array(mx.vmap(lambda key: draw(mx.array(logits), settings_, key))(keys)), minlength=8)
    assert not counts[expected == 0].any()
    seen = expected > 0
    chi2 = float((((counts - n * expected) ** 2)[seen] / (n * expected[seen])).sum())
    freedom = int(seen.sum()) - 1
    assert freedom >= 2
    # Wilson-Hilferty: the cube root of chi2/freedom is nearly normal; 3.72 standard deviations are 1 in 10^4.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < bound


def reference_distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """What `draw` should follow, in float64 and token by token."""
    probs = softmax(logits / temperature)
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    floor, before = min_p * probs.max(), 0.0
    for token in order:
        p = probs[token]
        if before > top_p or p < floor:
            probs[token] = 0
        before += p
    return probs / probs.sum()


# ── repetition ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_repetition_penalty_makes_recent_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 1.0, -1.0, 0.0], np.float32)
    out = penalise(mx.array(logits), mx.array([0, 1, 1, 4]), 2.0)
    assert out.tolist() == [1.0, -4.0, 1.0, -1.0, 0.0]  # id 1 occurs twice and is penalised once


def test_repetition_window_forgets() -> None:
    logits = mx.array([5.0, 4.0, 3.0, 2.0])
    sampler = Sampler(SamplingParams(repetition_penalty=10.0, repetition_window=2), [0, 1, 2])
    # recent: 1 2 → 0; then 2 0 → 1; then 0 1 → 2; then 1 2 → 0 again
    assert [sampler(logits).item() for _ in range(4)] == [0, 1, 2, 0]


def test_without_penalty_the_greedy_sampler_is_the_argmax() -> None:
    sampler = Sampler(SamplingParams(), [1, 2])
    for seed in range(20):
        logits = some_logits(seed)
        assert sampler(mx.array(logits)).item() == logits.argmax()
    assert sampler.state == (None, None)


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(seed: int | None, n: int = 40) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [1])
    return [sampler(mx.array(some_logits(1))).item() for _ in range(n)]


def test_a_seed_fixes_the_draws() -> None:
    state = mx.random.state[0].tolist()
    assert drawn(4) == drawn(4)
    assert drawn(4) != drawn(5)
    assert len(set(drawn(4))) > 3  # the key moves on: one key for all steps would repeat one token
    assert mx.random.state[0].tolist() == state  # and the process-wide generator is left alone


def test_without_a_seed_draws_differ() -> None:
    assert drawn(None) != drawn(None)  # equal with odds below (1/4)^40: no token here has more than a quarter


def test_large_seeds_are_taken_whole() -> None:
    assert drawn(2**63 + 1) != drawn(1)


# ── bad values ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("repetition_window", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("top_k", True),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
