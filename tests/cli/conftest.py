"""A tiny checkpoint with random weights, and ways to run the commands on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten

from mlx_codellama.cli.group import group
from mlx_codellama.config import ModelArgs
from mlx_codellama.loader import random_model
from mlx_codellama.tokenizer import Tokenizer

Run = Callable[..., Result]


def write_checkpoint(folder: Path, tokenizer: Tokenizer, *, context: int = 96) -> Path:
    """A checkpoint folder in our layout: random float32 weights, all dimensions different, reads `context` tokens."""
    args = ModelArgs(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=96,
        vocab_size=tokenizer.vocab_size,
        rope_theta=1e6,
        max_position_embeddings=context,
        dtype="float32",
    )
    folder.mkdir(parents=True)
    model = random_model(args, seed=5, dtype="float32")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(args.to_dict()))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> str:
    """The folder of a checkpoint that can infill and reads 96 tokens."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", small_tokenizer))


@pytest.fixture
def run() -> Run:
    """Run a command in this process: run("infill", "a.py:1", input=…) → click's Result, stdout and stderr apart."""

    def invoke(*args: object, **kwargs: Any) -> Result:
        return CliRunner().invoke(group, [str(a) for a in args], **kwargs)

    return invoke


@pytest.fixture
def spawn() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as its own process."""

    def start(*args: object, env: dict[str, str] | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_codellama", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})}, **kwargs
        )

    return start


def document(result: Result | subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON document that is the last line of stdout."""
    last = result.stdout.splitlines()[-1]
    parsed = json.loads(last)
    assert isinstance(parsed, dict)
    return parsed
