"""The layouts of Hugging Face and MLX: config.json with safetensors, or with pytorch_model*.bin."""

from __future__ import annotations

from pathlib import Path

from mlx_codellama.config import VARIANTS, ModelArgs, load_config
from mlx_codellama.convert.torch_zip import torch_rows
from mlx_codellama.errors import ConfigError
from mlx_codellama.shards import Chosen
from mlx_codellama.weights.checkpoint import shard_rows
from mlx_codellama.weights.reading import Rows


def hf_args(folder: Path, *, rope_theta: float | None, variant: str | None) -> ModelArgs:
    """The model that config.json describes. `variant` supplies rope_theta if the file has none."""
    if rope_theta is None and variant in VARIANTS:
        try:
            return load_config(folder)
        except ConfigError:
            return load_config(folder, rope_theta=VARIANTS[variant].args.rope_theta)
    return load_config(folder, rope_theta=rope_theta)


def bin_rows(folder: Path, chosen: Chosen) -> dict[str, Rows]:
    """A reader for every tensor in a folder of pytorch_model*.bin. Raises like `shard_rows` and `torch_rows`."""
    return shard_rows(folder, chosen, torch_rows)
