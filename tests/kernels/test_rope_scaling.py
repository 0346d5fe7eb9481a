"""Stretched rotary positions against the papers' formulas, written here pair by pair, and against transformers."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.errors import ConfigError
from mlx_codellama.kernels.rope import RopeTable, amplitude, frequencies
from mlx_codellama.rotary import RopeScaling

D, THETA, TRAINED = 24, 1e4, 512
HEADS = [(24, 1e4), (128, 1e4), (64, 1e6)]


def by_hand(
    kind: str, s: float, d: int, theta: float, length: int = 0, fast: float = 32, slow: float = 1
) -> list[float]:
    """Radians per position of each pair, one at a time."""
    out = []
    for i in range(d // 2):
        if kind == "linear":
            out.append(theta ** (-2 * i / d) / s)
        elif kind in ("ntk", "dynamic"):
            stretch = s if kind == "ntk" else max(1.0, s * length / TRAINED - (s - 1))
            base = theta * stretch ** (d / (d - 2))
            out.append(base ** (-2 * i / d))
        else:
            # YaRN, section 3.2: a ramp between the pairs that turn `fast` and `slow` times over the trained length
            ends = [d / 2 * math.log(TRAINED / (2 * math.pi * turns)) / math.log(theta) for turns in (fast, slow)]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), d - 1)
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            w = theta ** (-2 * i / d)
            out.append(w * (1 - ramp) + w / s * ramp)
    return out


@pytest.mark.parametrize(("d", "theta"), HEADS)
@pytest.mark.parametrize("s", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_frequencies_are_those_of_the_paper(kind: str, s: float, d: int, theta: float) -> None:
    got = frequencies(d, theta, RopeScaling(kind, s, TRAINED))
    np.testing.assert_allclose(got, by_hand(kind, s, d, theta), rtol=1e-13)
    plain = frequencies(d, theta)
    assert np.array_equal(got, plain) == (s == 1)
    if s > 1 and kind != "linear":
        assert got[0] == plain[0]  # the fastest pair stays
    np.testing.assert_allclose(got[-1], plain[-1] / s, rtol=1e-13)  # the slowest turns s times as slowly


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1500, 100_000])
def test_dynamic_scaling_begins_where_training_ended(length: int) -> None:
    got = frequencies(D, THETA, RopeScaling("dynamic", 2.0, TRAINED), length)
    np.testing.assert_allclose(got, by_hand("dynamic", 2.0, D, THETA, length), rtol=1e-13)
    assert np.array_equal(got, frequencies(D, THETA)) == (length <= TRAINED)


def test_yarn_takes_its_own_turns_and_amplitude() -> None:
    scaling = RopeScaling("yarn", 4.0, TRAINED, beta_fast=16, beta_slow=2)
    want = by_hand("yarn", 4.0, 128, THETA, fast=16, slow=2)
    np.testing.assert_allclose(frequencies(128, THETA, scaling), want, rtol=1e-13)
    assert not np.allclose(want, by_hand("yarn", 4.0, 128, THETA))
    assert amplitude(scaling) == pytest.approx(0.1 * math.log(4) + 1, rel=1e-15)
    assert amplitude(RopeScaling("yarn", 4.0, TRAINED, attention_factor=1.25)) == 1.25
    assert amplitude(RopeScaling("ntk", 4.0)) == amplitude(None) == 1


def test_tables_hold_the_stretched_angles_to_half_an_ulp() -> None:
    for scaling in (
        RopeScaling("yarn", 4.0, TRAINED),
        RopeScaling("linear", 3.0),
        RopeScaling("dynamic", 2.0, TRAINED),
    ):
        cos, sin = RopeTable(D, THETA, scaling, text_length=2048).rows(2000, 3)
        turn = np.arange(2000, 2003)[:, None] * np.array(by_hand(scaling.kind, scaling.factor, D, THETA, 2048))
        for got, true in ((cos, np.cos(turn)), (sin, np.sin(turn))):
            np.testing.assert_allclose(np.array(got), amplitude(scaling) * true, rtol=6e-8, atol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_transformers_stretches_alike(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "factor": 3.0, "rope_theta": THETA, "original_max_position_embeddings": TRAINED}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=TRAINED, rope_parameters=rope
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=1700)
    got = frequencies(64, THETA, RopeScaling(kind, 3.0, TRAINED), 1700)
    np.testing.assert_allclose(got, inverse.double().numpy(), rtol=3e-6)  # theirs is float32
    assert amplitude(RopeScaling(kind, 3.0)) == pytest.approx(factor, rel=1e-12)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["linear:2", "ntk:1.5", "dynamic:8", "yarn:4"])
def test_the_command_lines_form_is_read_and_comes_back_from_config(text: str) -> None:
    scaling = RopeScaling.parse(text)
    kind, _, factor = text.partition(":")
    assert (scaling.kind, scaling.factor) == (kind, float(factor))
    assert RopeScaling.from_dict(scaling.to_dict()) == scaling


@pytest.mark.parametrize(
    "text", ["yarn", "yarn:", "yarn:x", "yarn:0", "yarn:-2", "yarn:nan", "yarn:inf", "su:2", ":", ""]
)
def test_what_is_no_scaling_is_an_error_with_a_hint_or_a_range(text: str) -> None:
    with pytest.raises(ConfigError):
        RopeScaling.parse(text)


def test_hugging_faces_forms_are_read() -> None:
    assert RopeScaling.from_dict({"type": "linear", "factor": 2}) == RopeScaling("linear", 2)
    full = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99, "beta_fast": 30, "beta_slow": 2}
    assert RopeScaling.from_dict(full | {"attention_factor": 1.5}) == RopeScaling("yarn", 4.0, 99, 30, 2, 1.5)
    assert RopeScaling.from_dict({"rope_type": "default", "rope_theta": 1e4}) is None
    assert RopeScaling.from_dict({"rope_theta": 1e4}) is None


def test_a_dynamic_length_is_rounded_up_to_whole_trained_lengths() -> None:
    scaling = RopeScaling("dynamic", 2.0)
    assert [scaling.over(n, TRAINED)[1] for n in (1, 512, 513, 1500)] == [512, 512, 1024, 1536]
    assert RopeScaling("yarn", 2.0).over(9999, TRAINED)[1] == 0
    assert isinstance(RopeTable(D, THETA).rows(0, 1)[0], mx.array)
