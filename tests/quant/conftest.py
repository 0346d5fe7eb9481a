"""A small model as a stream, with widths that are pairwise different and all multiples of 32 but not all of 64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.config import ModelArgs
from mlx_codellama.weights import Block, TensorSpec

ARGS = ModelArgs(
    hidden_size=192,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=320,
    vocab_size=259,
    rope_theta=1e6,
    max_position_embeddings=512,
)


class Weights:
    """A Stream of seeded normal weights with a few outliers, in blocks of 50 rows (no multiple of anything else)."""

    def __init__(self, args: ModelArgs, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)
        self.args = args
        self.specs = [TensorSpec(name, shape, args.dtype) for name, shape in args.tensor_shapes().items()]
        self.files: dict[str, Path] = {}
        self.record: dict[str, Any] = {"source": "seeded"}
        self.total_bytes = sum(spec.nbytes for spec in self.specs)
        self.done_bytes = 0
        self.arrays = {}
        for spec in self.specs:
            values = 0.02 * rng.standard_normal(spec.shape)
            values.reshape(-1)[::997] *= 10
            self.arrays[spec.name] = mx.array(values.astype(np.float32)).astype(getattr(mx, args.dtype))

    def blocks(self) -> Iterator[Block]:
        self.done_bytes = 0
        for spec in self.specs:
            array = self.arrays[spec.name]
            for start in range(0, len(array), 50):
                block = Block(spec.name, start, array[start : start + 50])
                self.done_bytes += block.array.nbytes
                yield block


@pytest.fixture
def args() -> ModelArgs:
    return ARGS


@pytest.fixture
def weights() -> Weights:
    return Weights(ARGS)


@pytest.fixture
def weights_in() -> Callable[[str], Weights]:
    """Makes the same stream in a dtype."""
    return lambda dtype: Weights(replace(ARGS, dtype=dtype))
