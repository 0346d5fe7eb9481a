"""Attention inside documents that stand in one row, against float64 and against each document alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels import kv_attention, kv_attention_documents

H, K, D = 6, 3, 32
LENGTHS = [5, 1, 19, 2]


def some(heads: int, seed: int) -> mx.array:
    return mx.random.normal((1, heads, sum(LENGTHS), D), key=mx.random.key(seed))


def truth(q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
    """One query at a time, in float64."""
    wide = [np.asarray(x, np.float64)[0] for x in (q, k, v)]
    out = np.zeros_like(wide[0])
    starts = np.repeat(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS)
    for h, i in np.ndindex(H, sum(LENGTHS)):
        keys, values = (x[h // (H // K), starts[i] : i + 1] for x in wide[1:])
        scores = 0.3 * keys @ wide[0][h, i]
        weights = np.exp(scores - scores.max())
        out[h, i] = weights / weights.sum() @ values
    return out[None]


@pytest.fixture(params=["native", "mlx", "reference"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "reference":
        return kv_attention_documents.reference
    if request.param == "mlx":
        monkeypatch.setattr(kv_attention, "native", lambda: None)
    return kv_attention_documents.kv_attention_documents


def test_each_document_sees_itself_alone(attention) -> None:
    q, k, v = some(H, 1), some(K, 2), some(K, 3)
    np.testing.assert_allclose(np.array(attention(q, k, v, LENGTHS, scale=0.3)), truth(q, k, v), atol=2e-6)


def test_gradients_are_those_of_the_documents_one_by_one(attention) -> None:
    q, k, v, weight = some(H, 1), some(K, 2), some(K, 3), some(H, 4)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (attention(q, k, v, LENGTHS, scale=0.3) * weight).sum()

    def one_by_one(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        total, ends = mx.array(0.0), np.cumsum(LENGTHS).tolist()
        for n, end in zip(LENGTHS, ends, strict=True):
            part = (x[:, :, end - n : end] for x in (q, k, v))
            total = total + (kv_attention.reference(*part, scale=0.3, offset=0) * weight[:, :, end - n : end]).sum()
        return total

    for ours, theirs in zip(mx.grad(loss, (0, 1, 2))(q, k, v), mx.grad(one_by_one, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=5e-6)


def test_no_mask_over_the_row_is_made_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 documents of 128 tokens: scores of [4, 4096, 4096] would take 268 MB."""
    monkeypatch.setattr(kv_attention, "native", lambda: None)
    q = mx.random.normal((1, 4, 4096, 16), key=mx.random.key(1))
    gradient = mx.grad(lambda q: kv_attention_documents.kv_attention_documents(q, q, q, [128] * 32, scale=0.3).sum())
    mx.eval(q)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(q))
    assert mx.get_peak_memory() - before < 67e6


def test_lengths_must_sum_to_the_row() -> None:
    with pytest.raises(ValueError, match="documents of 26 tokens in a row of 27"):
        kv_attention_documents.kv_attention_documents(some(H, 1), some(K, 2), some(K, 3), [20, 6], scale=1.0)
