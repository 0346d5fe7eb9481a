"""Models with stretched positions: the options reach every pass, and no chunk or reused cache changes the angles."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracles.meta_reference import Geometry, hf_config, random_weights, to_hf
from stand_ins import tiny_tokenizer

import mlx_codellama
from mlx_codellama.api import CodeLlama
from mlx_codellama.errors import CacheError, ConfigError
from mlx_codellama.model import Model

GEOMETRY = Geometry(dim=96, n_layers=2, n_heads=3, n_kv_heads=3, ffn_dim=80, vocab_size=416, rope_theta=1e4)
TRAINED = 40
IDS = np.random.RandomState(4).randint(3, 400, 130).tolist()
KINDS = ["linear:4", "ntk:4", "dynamic:4", "yarn:4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained to read 40 tokens."""
    path = tmp_path_factory.mktemp("short")
    (path / "config.json").write_text(json.dumps(hf_config(GEOMETRY, max_position_embeddings=TRAINED)))
    (path / "tokenizer.model").write_bytes(tiny_tokenizer().model_bytes)
    weights = to_hf(random_weights(GEOMETRY, seed=5), GEOMETRY)
    mx.save_safetensors(str(path / "model.safetensors"), {name: mx.array(w) for name, w in weights.items()})
    return path


def stretched(folder: Path, kind: str | None, **options: object) -> CodeLlama:
    return mlx_codellama.load(folder, dtype="float32", rope_scaling=kind, **options)  # type: ignore[arg-type]


def test_the_context_grows_with_the_factor(folder: Path) -> None:
    assert stretched(folder, None).max_context == TRAINED
    assert stretched(folder, "yarn:4").max_context == 4 * TRAINED
    assert stretched(folder, "yarn:4", max_context=77).max_context == 77


def test_ntk_is_another_theta_and_every_kind_gives_other_logits(folder: Path) -> None:
    seen = {kind: stretched(folder, kind, max_context=200).logits(IDS) for kind in [None, *KINDS]}
    assert len({x.tobytes() for x in seen.values()}) == len(seen)
    config = hf_config(GEOMETRY, max_position_embeddings=TRAINED) | {"rope_theta": 1e4 * 4 ** (32 / 30)}
    other = Model(mlx_codellama.config.ModelArgs.from_dict(config))
    other.load_weights(stretched(folder, None).model.named_parameters())
    np.testing.assert_allclose(np.array(other(mx.array([IDS]))[0]), seen["ntk:4"], atol=2e-4)


def test_dynamic_scaling_leaves_short_texts_as_they_were(folder: Path) -> None:
    short = IDS[:TRAINED]
    assert np.array_equal(stretched(folder, "dynamic:4").logits(short), stretched(folder, None).logits(short))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_reuse_change_no_id(folder: Path, kind: str) -> None:
    one = stretched(folder, kind, prefill_chunk=1000).complete(IDS[:100], max_tokens=12).ids
    assert stretched(folder, kind, prefill_chunk=7).complete(IDS[:100], max_tokens=12).ids == one
    reusing = stretched(folder, kind)
    for end in (20, 30, 90, 100, 25):  # dynamic: over the edge of three lengths, and back
        fresh = stretched(folder, kind).complete(IDS[:end], max_tokens=9)
        again = reusing.complete(IDS[:end], max_tokens=9)
        assert again.ids == fresh.ids
    assert reusing.complete(IDS[:26], max_tokens=8).stats.cached_tokens == 25


def test_a_saved_cache_keeps_the_angles_it_was_made_with(folder: Path, tmp_path: Path) -> None:
    first = stretched(folder, "dynamic:4")
    first.complete(IDS[:50], max_tokens=10)  # 60 tokens: the second length
    first.save_cache(tmp_path / "a")
    second = stretched(folder, "dynamic:4")
    second.load_cache(tmp_path / "a")
    answer = second.complete(IDS[:55], max_tokens=10)
    assert answer.stats.cached_tokens == 50
    assert answer.ids == stretched(folder, "dynamic:4").complete(IDS[:55], max_tokens=10).ids
    second.load_cache(tmp_path / "a")
    assert second.complete(IDS[:100], max_tokens=10).stats.cached_tokens == 0  # a third length: other angles
    for other in (None, "yarn:4", "dynamic:2"):
        with pytest.raises(CacheError, match="rotary"):
            stretched(folder, other).load_cache(tmp_path / "a")


def test_a_config_that_scales_is_read_and_is_not_scaled_twice(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
    config |= {"rope_scaling": scaling, "max_position_embeddings": 4 * TRAINED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.array_equal(stretched(tmp_path, None).logits(IDS), stretched(folder, "yarn:4").logits(IDS))
    with pytest.raises(ConfigError, match="already"):
        stretched(tmp_path, "yarn:2")
