"""The float64 reference is itself held to hand-made values, to transformers in float64 and to its own float32 twin."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import golden
from oracles.meta_reference import (
    TINY,
    attention,
    forward,
    from_hf,
    greedy,
    hf_name,
    random_weights,
    rms_norm,
    rope_angles,
    rotate_pairs,
    to_hf,
)
from oracles.transformers_model import transformers_logits, transformers_model

KINDS = pytest.mark.parametrize("kind", sorted(TINY))


def test_norm_of_a_known_vector() -> None:
    x = np.array([[3.0, 4.0]])
    assert np.allclose(rms_norm(x, np.array([1.0, 2.0]), 0.0), np.array([[3.0, 8.0]]) / np.sqrt(12.5))


def test_rotation_turns_adjacent_pairs_and_keeps_relative_distance() -> None:
    x = np.zeros((1, 2, 1, 4))
    x[..., 0] = 1.0
    turned = rotate_pairs(x, rope_angles(np.array([0, 1]), 4, 100.0))
    assert np.allclose(turned[0, 0, 0], [1, 0, 0, 0])
    assert np.allclose(turned[0, 1, 0], [np.cos(1), np.sin(1), 0, 0])  # a rotation by halves would fill index 2
    rng = np.random.RandomState(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 6))

    def score(m: int, n: int) -> float:
        a = rotate_pairs(q, rope_angles(np.array([m]), 6, 1e4))
        return float((a * rotate_pairs(k, rope_angles(np.array([n]), 6, 1e4))).sum())

    assert np.isclose(score(7, 3), score(104, 100))
    assert not np.isclose(score(7, 3), score(7, 4))


def test_query_head_reads_its_group_and_nothing_later() -> None:
    rng = np.random.RandomState(1)
    q, k, v = rng.standard_normal((1, 5, 6, 4)), rng.standard_normal((1, 5, 3, 4)), rng.standard_normal((1, 5, 3, 4))
    before = attention(q, k, v)
    changed = v.copy()
    changed[:, 3, 1] += 1.0  # kv head 1 is read by query heads 2 and 3, from position 3 on
    moved = np.abs(attention(q, k, changed) - before).max(-1)[0] > 0
    expected = np.zeros((5, 6), bool)
    expected[3:, 2:4] = True
    assert (moved == expected).all()


@KINDS
def test_renaming_to_hf_and_back_changes_nothing(kind: str) -> None:
    weights = random_weights(TINY[kind], seed=3)
    there = to_hf(weights, TINY[kind])
    assert not np.array_equal(there[hf_name("layers.0.attention.wq.weight")], weights["layers.0.attention.wq.weight"])
    back = from_hf(there, TINY[kind])
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


@KINDS
def test_dimensions_of_the_tiny_models_are_pairwise_different(kind: str) -> None:
    g = TINY[kind]
    sizes = [g.dim, g.n_layers, g.n_heads, g.ffn_dim, g.vocab_size, g.head_dim]
    assert len({*sizes}) == len(sizes)
    assert (g.n_kv_heads == g.n_heads) == (kind == "mha")
    assert g.n_kv_heads * g.head_dim not in {g.ffn_dim, g.vocab_size}


@KINDS
def test_golden_logits_of_transformers_agree_with_the_reference(kind: str) -> None:
    g, stored = TINY[kind], golden.load()[kind]
    weights = random_weights(g, seed=stored["seed"])
    ids = [golden.prompt(kind)]
    assert ids[0] == stored["ids"]
    truth = forward(weights, g, ids)[0]
    plain = forward(weights, g, ids, dtype=np.float32)[0]
    spread = np.sqrt(np.mean((plain - truth) ** 2))
    error = np.sqrt(np.mean((np.array(stored["logits"]) - truth) ** 2))
    assert truth.std() > 0.5  # logits of order one: a small error means something
    assert error <= 2 * spread + 1e-7  # two float32 orders of summation
    assert greedy(weights, g, ids[0], len(stored["greedy"])) == stored["greedy"]


@pytest.mark.peers
@KINDS
def test_transformers_in_float64_agrees_with_the_reference(kind: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    g = TINY[kind]
    weights = random_weights(g, seed=5)
    ids = np.random.RandomState(6).randint(0, g.vocab_size, (2, 13))
    theirs = transformers_logits(transformers_model(weights, g, dtype="float64"), ids)
    # transformers keeps rotary frequencies and angles in float32 whatever the model: 13 positions · 2^-24 per angle.
    assert np.abs(theirs - forward(weights, g, ids)).max() < 2e-5


@pytest.mark.peers
@KINDS
def test_golden_file_is_what_transformers_says_today(kind: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    stored, fresh = golden.load()[kind], golden.compute(kind)
    assert fresh["ids"] == stored["ids"]
    assert fresh["greedy"] == stored["greedy"]
    assert np.abs(np.array(fresh["logits"]) - np.array(stored["logits"])).max() < 2e-5  # other BLAS, other rounding
