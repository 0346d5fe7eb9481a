"""One forward pass for tokens of several sequences: each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from oracles.meta_reference import forward, random_weights
from stand_ins import GEOMETRY, tiny_model

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.kernels import decoder_block, dispatch, kv_attention, quant_matmul
from mlx_codellama.linear import Delta, Embedding, Linear
from mlx_codellama.loader import random_model
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.storage import KVStorage

RNG = np.random.RandomState
TEXTS = [RNG(n).randint(3, 400, n).tolist() for n in (61, 7, 130)]
STORAGES = [KVStorage(), KVStorage.of(16), KVStorage(window=40, sinks=3)]


def truth(ids: list[int]) -> np.ndarray:
    return np.asarray(forward(random_weights(GEOMETRY, seed=5), GEOMETRY, [ids])[0])


def check(logits: mx.array, ids: list[int]) -> None:
    """The last rows of what follows ids. A wrong position, neighbour or cache is off by order 1."""
    n = logits.shape[0]
    np.testing.assert_allclose(np.array(logits), truth(ids)[-n:], atol=2e-4)


@pytest.fixture(params=["native", "mlx"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mlx":
        for module in (kv_attention, quant_matmul, dispatch, decoder_block):
            monkeypatch.setattr(module, "native", lambda: None)


def split(logits: mx.array, lengths: list[int]) -> list[mx.array]:
    assert logits.shape[0] == 1
    return mx.split(logits[0], np.cumsum(lengths).tolist()[:-1])


@pytest.mark.usefixtures("path")
def test_sequences_of_different_length_go_on_together() -> None:
    model, sequences = tiny_model(), [make_sequence(tiny_model().args) for _ in TEXTS]
    read = [0, 0, 0]
    for lengths in ([30, 1, 99], [30, 5, 1], [1, 1, 30]):
        ids = [id for text, at, n in zip(TEXTS, read, lengths, strict=True) for id in text[at : at + n]]
        logits = model(mx.array([ids]), list(zip(sequences, lengths, strict=True)))
        read = [at + n for at, n in zip(read, lengths, strict=True)]
        for text, at, part in zip(TEXTS, read, split(logits, lengths), strict=True):
            check(part, text[:at])
    assert [sequence.offset for sequence in sequences] == read


@pytest.mark.usefixtures("path")
def test_documents_and_sequences_and_shared_beginnings_in_one_pass() -> None:
    model, first = tiny_model(), make_sequence(tiny_model().args)
    model.hidden(mx.array([TEXTS[0][:40]]), [(first, 40)])
    second = first.share(25)
    spans: list[tuple[Sequence | None, int]] = [(None, 7), (first, 21), (None, 3), (None, 4), (second, 2)]
    ids = [*TEXTS[1], *TEXTS[0][40:], *TEXTS[1][:3], *TEXTS[1][:4], 5, 6]
    parts = split(model(mx.array([ids]), spans), [n for _, n in spans])
    for part, text in zip(parts, (TEXTS[1], TEXTS[0], TEXTS[1][:3], TEXTS[1][:4], [*TEXTS[0][:25], 5, 6]), strict=True):
        check(part, text)


def test_documents_of_one_length_are_a_batch() -> None:
    ids = RNG(4).randint(3, 400, (3, 9))
    logits = tiny_model()(mx.array(ids))
    assert logits.shape == (3, 9, 416)
    for row, document in zip(logits, ids.tolist(), strict=True):
        check(row, document)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_pass_that_fails_changes_no_sequence(storage: KVStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    one, other = (make_sequence(model.args, storage) for _ in range(2))
    model.hidden(mx.array([[*TEXTS[0], *TEXTS[1]]]), [(one, 61), (other, 7)])
    last, called = model.model.layers[-1].mlp, type(model.model.layers[-1].mlp).__call__

    def fail(mlp: object, *given: object, **options: object) -> mx.array:
        if mlp is last:
            raise KeyboardInterrupt
        return called(mlp, *given, **options)

    for n in (1, 33):
        with monkeypatch.context() as patched:
            patched.setattr(type(last), "__call__", fail)
            patched.setattr("mlx_codellama.fusion.decoder_blocks", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt):
                model(mx.array([[5] * (n + 1)]), [(one, n), (other, 1)])
        assert (one.offset, other.offset) == (61, 7)
    fresh = make_sequence(model.args, storage)
    model.hidden(mx.array([TEXTS[0]]), [(fresh, 61)])
    for a, b in zip(model(mx.array([[9]]), [(one, 1)]), model(mx.array([[9]]), [(fresh, 1)]), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        (lambda s: [(s, 2), (s, 1)], "a sequence stands twice"),
        (lambda s: [(s, 3), (None, 0)], "a span of 0 tokens"),
        (lambda s: [(s, 2)], r"spans of 2 tokens for ids of shape \(1, 3\)"),
    ],
)
def test_spans_that_cannot_be_are_refused(spans: Callable[[Sequence], list], match: str) -> None:
    sequence = make_sequence(tiny_model().args)
    with pytest.raises(ValueError, match=match):
        tiny_model().hidden(mx.array([[1, 2, 3]]), spans(sequence))
    assert sequence.offset == 0


# ── low-rank deltas ─────────────────────────────────────────────────────────────────────────────────────────────────

E, F = 192, 320
MATRICES = {
    "self_attn.q_proj": (192, E), "self_attn.v_proj": (64, E), "self_attn.o_proj": (E, 192),
    "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
}  # fmt: skip


def eight_layers(bits: int) -> Model:
    args = ModelArgs(
        hidden_size=E, num_hidden_layers=8, intermediate_size=F, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, vocab_size=96, rope_theta=1e4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(with_bits(args, bits, 32), exact=True, seed=2)


def dense(model: Model, name: str) -> mx.array:
    """The matrix of layer 3, unpacked."""
    part, which = name.split(".")
    linear = model.model.layers[3][part][which]
    if linear.quant is None:
        return linear.weight
    weight, scales, biases = linear.packed
    wide = (a.astype(mx.float32) for a in (scales, biases))
    return mx.dequantize(weight, *wide, group_size=linear.quant.group_size, bits=linear.quant.bits)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", MATRICES)
def test_a_delta_counts_on_every_path(name: str, bits: int) -> None:
    """Decoding, a prompt and training give what the matrix W + scale · b a gives, and not what W gives."""
    model, (n_out, n_in) = eight_layers(bits), MATRICES[name]
    a, b = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate([(3, n_in), (n_out, 3)]))
    part, which = name.split(".")
    ids = RNG(6).randint(0, 96, 20).tolist()

    def answers() -> list[np.ndarray]:
        decoded, sequence = [], make_sequence(model.args)
        decoded.append(model(mx.array([ids[:12]]), [(sequence, 12)]))
        decoded += [model(mx.array([[id]]), [(sequence, 1)], prompt=False) for id in ids[12:16]]
        decoded.append(model(mx.array([ids[16:]]), [(sequence, 4)], prompt=False))
        return [np.array(mx.concatenate(decoded, axis=1)), np.array(model(mx.array([ids])))]

    without = answers()
    model.model.layers[3][part][which].delta = Delta(a, b, 0.02)
    with_it = answers()
    changed = Linear(n_in, n_out)
    model.model.layers[3][part][which].delta = None
    changed.weight = dense(model, name) + 0.02 * (b @ a)
    model.model.layers[3][part][which] = changed
    want = answers()
    for ours, theirs, plain in zip(with_it, want, without, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
        assert np.abs(ours - plain).max() > 1e-2 * np.abs(theirs).max()


def test_the_delta_has_the_gradient_and_the_frozen_matrix_none() -> None:
    from mlx.nn.utils import value_and_grad
    from mlx.utils import tree_flatten

    model = eight_layers(4)
    a, b = mx.random.normal((3, E), key=mx.random.key(0)), mx.zeros((F, 3))
    delta = Delta(a, b, 2.0)
    model.model.layers[3].mlp.up_proj.delta = delta
    delta.unfreeze()
    model.train()
    ids = mx.array([RNG(6).randint(0, 96, 20).tolist()])
    _, gradients = value_and_grad(model, lambda m, ids: m(ids).square().sum())(model, ids)
    found = {name: float(mx.abs(g).max()) for name, g in tree_flatten(gradients)}
    assert set(found) == {"model.layers.3.mlp.up_proj.delta.a", "model.layers.3.mlp.up_proj.delta.b"}
    assert found["model.layers.3.mlp.up_proj.delta.b"] > 0


def test_an_embedding_honours_its_delta_in_rows_and_as_a_head() -> None:
    table = Embedding(7, 5)
    table.weight = mx.random.normal((7, 5), key=mx.random.key(1))
    a, b = mx.random.normal((2, 5), key=mx.random.key(2)), mx.random.normal((7, 2), key=mx.random.key(3))
    table.delta = Delta(a, b, 0.5)
    whole = table.weight + 0.5 * (b @ a)
    np.testing.assert_allclose(np.array(table(mx.array([[3, 6]]))), np.array(whole[mx.array([[3, 6]])]), atol=1e-6)
    x = mx.ones((1, 2, 5))
    np.testing.assert_allclose(np.array(table.as_head(x)), np.array(x @ whole.T), atol=1e-5)
    with pytest.raises(ValueError, match="no common rank"):
        Delta(a, a, 1.0)
