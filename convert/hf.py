"""Hugging Face's and MLX's layouts: config.json with safetensors, or with pytorch_model*.bin."""

from __future__ import annotations

from pathlib import Path

from mlx_codellama.config import VARIANTS, ModelArgs, load_config
from mlx_codellama.convert.torch_zip import torch_rows
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.weights.checkpoint import read_index, shard_paths
from mlx_codellama.weights.reading import Rows

BIN_INDEX = "pytorch_model.bin.index.json"
BIN_PATTERN = "pytorch_model*.bin"


def hf_args(folder: Path, *, rope_theta: float | None, variant: str | None) -> ModelArgs:
    """The model of config.json; a named variant states the rope_theta of a file that has none."""
    if rope_theta is None and variant in VARIANTS:
        try:
            return load_config(folder)
        except ConfigError:
            return load_config(folder, rope_theta=VARIANTS[variant].args.rope_theta)
    return load_config(folder, rope_theta=rope_theta)


def bin_rows(folder: Path) -> dict[str, Rows]:
    """Readers of every tensor in a folder of pytorch_model*.bin. Computed buffers (`….inv_freq`) are left out.

    Raises CheckpointError or UnsafePickleError.
    """
    listed = read_index(folder / BIN_INDEX) if (folder / BIN_INDEX).exists() else None
    rows: dict[str, Rows] = {}
    for path in shard_paths(folder, BIN_INDEX, BIN_PATTERN):
        for name, found in torch_rows(path).items():
            if name in rows:
                raise CheckpointError(f"two files hold {name[:200]!r}, one is {path}")
            if listed is not None and listed.pop(name, path.name) != path.name:
                raise CheckpointError(f"{path} holds {name[:200]!r}, which {BIN_INDEX} says is elsewhere")
            rows[name] = found
    if listed:
        raise CheckpointError(f"{len(listed)} tensors of {BIN_INDEX} are in no file, first {min(listed)[:200]!r}")
    return {name: found for name, found in rows.items() if not name.endswith(".inv_freq")}
