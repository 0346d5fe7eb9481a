"""A quantised model is the model of its dequantised weights, in the precision that was asked for."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from oracles.checkpoints import tiny_args
from oracles.mlx_models import logits, rms

from mlx_codellama.loader import random_model
from mlx_codellama.model import Model
from mlx_codellama.placement import place
from mlx_codellama.quant import RECIPES, recipe


def dense_twin(model: Model) -> Model:
    """The same model, whose codes are held as they are stored, with every packed matrix written out in float32."""
    held = dict(model.named_parameters())
    twin = Model(replace(model.args, quantization=None))
    weights = []
    for name, array in held.items():
        path, _, part = name.rpartition(".")
        scales, biases = held.get(f"{path}.scales"), held.get(f"{path}.biases")
        if scales is not None and part == "weight":
            quant = model.args.quant_of(path)
            if biases is not None:  # MLX would multiply in the scales' 16 bits
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            how = {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}
            array = mx.dequantize(array, scales, biases, **how).astype(mx.float32)
        if part == "weight":
            weights.append((name, array))
    twin.load_weights(weights)
    return twin


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_the_logits_are_those_of_the_dequantised_weights_to_float32_rounding(name: str, wide: bool) -> None:
    args = tiny_args(gqa=True)
    args = replace(args, quantization=recipe(name, args))
    placement = place(args, dtype="float32", exact=True)
    stored = random_model(args, placement=placement.as_stored())
    model = random_model(args, placement=placement) if wide else stored
    ids = np.random.RandomState(8).randint(0, args.vocab_size, (2, 23))
    found, wanted = logits(model, ids), logits(dense_twin(stored), ids)
    # Somewhere bfloat16 activations would err by 2⁻⁹ of what they are, some 2e-3; float32 ones by 1e-7 and their sums.
    assert rms(found - wanted) <= 2e-6 * wanted.std()
