from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.errors import ConfigError
from mlx_codellama.quant import compare
from mlx_codellama.quant.report import ErrorSums

V = 11


def table(seed: int, scale: float = 1.0):
    """A bigram model: logits of the next token depend on the last one only."""
    logits = scale * np.random.default_rng(seed).standard_normal((V, V)).astype(np.float32)
    return lambda ids: logits[np.array(ids)]


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    result = compare(table(1), table(1), IDS)
    assert (result.mean_kl, result.max_kl, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.reference_perplexity == result.model_perplexity
    assert result.n_tokens == len(IDS) - 1


def test_kl_and_perplexity_are_their_definitions() -> None:
    p_logits, q_logits = table(1)(IDS).astype(float), table(2)(IDS).astype(float)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p_logits, q_logits))
    kl = [sum(p[i, v] * math.log(p[i, v] / q[i, v]) for v in range(V)) for i in range(len(IDS) - 1)]
    nll = [-math.log(q[i, IDS[i + 1]]) for i in range(len(IDS) - 1)]
    result = compare(table(1), table(2), IDS)
    assert result.mean_kl == pytest.approx(np.mean(kl), rel=1e-9)
    assert result.max_kl == pytest.approx(max(kl), rel=1e-9)
    assert result.model_perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-9)
    same = np.mean([p[i].argmax() == q[i].argmax() for i in range(len(IDS) - 1)])
    assert result.top1_agreement == pytest.approx(same)


def test_windows_start_with_bos_and_predict_every_token() -> None:
    seen: list[list[int]] = []

    def reference(ids: list[int]):
        seen.append(ids)
        return table(1)(ids)

    result = compare(reference, table(2), IDS, window=4, bos=10)
    assert seen == [[10, 3, 1, 4, 1], [10, 5, 9, 2, 6], [10, 5, 3, 5, 8], [10, 9, 7, 9]]
    assert result.n_tokens == len(IDS)


def test_a_last_window_of_one_token_is_predicted_from_bos() -> None:
    for n in (13, 1):
        result = compare(table(1), table(2), IDS[:n], window=4, bos=10)
        assert result.n_tokens == n


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    result = compare(lambda ids: mx.zeros((len(ids), V)), table(1), IDS)
    assert result.reference_perplexity == pytest.approx(V)


def test_texts_too_short_and_foreign_vocabularies_are_refused() -> None:
    with pytest.raises(ConfigError, match="too short"):
        compare(table(1), table(1), [3])
    with pytest.raises(ConfigError, match="not comparable"):
        compare(table(1), lambda ids: np.zeros((len(ids), V + 1)), IDS)


def test_errors_of_parts_add_up_to_that_of_the_whole() -> None:
    rng = np.random.default_rng(5)
    truth = mx.array(rng.standard_normal((13, 8)).astype(np.float32))
    got = truth + mx.array(0.1 * rng.standard_normal((13, 8)).astype(np.float32))
    whole, parts = ErrorSums(), ErrorSums()
    whole.measure(truth, got)
    for rows in (slice(0, 5), slice(5, 13)):
        parts.measure(truth[rows], got[rows])
    assert parts.result().relative_rms == pytest.approx(whole.result().relative_rms, rel=1e-6)
    assert parts.result().max_abs == whole.result().max_abs == mx.abs(got - truth).max().item()
    assert parts.result().n_weights == 104


def test_an_error_against_nothing_is_infinite() -> None:
    sums = ErrorSums()
    sums.measure(mx.zeros((2, 3)), mx.zeros((2, 3)))
    assert sums.result().relative_rms == 0.0
    sums.measure(mx.zeros((2, 3)), mx.ones((2, 3)))
    assert sums.result().relative_rms == math.inf
