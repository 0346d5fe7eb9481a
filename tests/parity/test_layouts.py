"""Every layout, written without any library, gives the model of Meta's maths: the part of parity that needs no peer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import meta_shards, random_weights, tiny_args, to_float32, write_hf, write_meta
from oracles.meta_reference import Geometry, Weights, forward
from oracles.mlx_models import logits, rms

from mlx_codellama import convert
from mlx_codellama.loader import load_model
from mlx_codellama.weights import save


def meta_weights(gqa: bool) -> tuple[Geometry, Weights]:
    """The tiny model of oracles.checkpoints as the reference takes it."""
    args = tiny_args(gqa=gqa)
    geometry = Geometry(
        dim=args.hidden_size,
        n_layers=args.num_hidden_layers,
        n_heads=args.num_attention_heads,
        n_kv_heads=args.num_key_value_heads,
        ffn_dim=args.intermediate_size,
        vocab_size=args.vocab_size,
        rope_theta=args.rope_theta,
        norm_eps=args.rms_norm_eps,
    )
    (rank,) = meta_shards(args, random_weights(args, seed=41), 1)
    return geometry, {name: to_float32(tensor) for name, tensor in rank.items() if name != "rope.freqs"}


@pytest.mark.parametrize("gqa", [False, True], ids=["mha", "gqa"])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "meta of 1", "meta of 2", "meta of 4", "meta of 8"])
def test_a_converted_checkpoint_has_the_logits_of_metas_maths(layout: str, gqa: bool, tmp_path: Path) -> None:
    args = tiny_args(gqa=gqa)
    source, weights = tmp_path / "source", random_weights(args, seed=41)
    if layout.startswith("meta"):
        write_meta(source, args, weights, shards=int(layout[-1]))
    else:
        write_hf(source, args, weights, shards=2, kind=layout)
    save(tmp_path / "out", convert.open(source))
    geometry, reference = meta_weights(gqa)
    ids = np.random.RandomState(42).randint(0, geometry.vocab_size, (2, 11))
    truth = forward(reference, geometry, ids)
    plain = forward(reference, geometry, ids, dtype=np.float32)
    ours = logits(load_model(tmp_path / "out", dtype="float32").model, ids)
    assert truth.std() > 0.2
    assert rms(ours - truth) <= 2 * rms(plain - truth)
