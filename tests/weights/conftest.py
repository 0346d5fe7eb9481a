"""One small checkpoint in two shards, and streams made of given blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.checkpoints import random_weights, tiny_args, write_hf

from mlx_codellama.config import ModelArgs
from mlx_codellama.weights import Block, TensorSpec

ARGS = tiny_args(n_layers=1)
WEIGHTS = random_weights(ARGS)


class Given:
    """A Stream of the blocks that a function yields."""

    def __init__(self, specs: list[TensorSpec], blocks: Callable[[], Iterator[Block]], args: ModelArgs = ARGS) -> None:
        self.args, self.specs, self.blocks = args, specs, blocks
        self.files: dict[str, Path] = {}
        self.record: dict[str, Any] = {}
        self.total_bytes = self.done_bytes = 0


@pytest.fixture
def given() -> type[Given]:
    return Given


@pytest.fixture(scope="session")
def args() -> ModelArgs:
    return ARGS


@pytest.fixture(scope="session")
def weights() -> dict[str, Any]:
    return WEIGHTS


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("weights") / "source", ARGS, WEIGHTS, shards=2)
