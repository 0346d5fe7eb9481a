"""Detect the layout of a folder of weights, and open its weights as a stream."""

from __future__ import annotations

import hashlib
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_codellama import inputs
from mlx_codellama.config import VARIANTS
from mlx_codellama.convert.hf import bin_rows, hf_args
from mlx_codellama.convert.meta import PARAMS, check_variant, meta_rows
from mlx_codellama.convert.npz import WEIGHTS as NPZ_WEIGHTS
from mlx_codellama.convert.npz import npz_rows
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.hub import fetch, looks_like_hub_id
from mlx_codellama.loader import check_vocabulary
from mlx_codellama.shards import BIN, SAFETENSORS, candidates
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights.checkpoint import COMPANIONS, Checkpoint, safetensors_rows, weight_files


class Layout(Enum):
    """The published layouts of Code Llama."""

    SAFETENSORS = "safetensors"  # Hugging Face, MLX, ours
    BIN = "pytorch bin"
    META = "meta"
    NPZ = "npz of mlx-examples"


def detect(folder: Path) -> Layout:
    """The layout of a folder; safetensors win if a folder has several. Raises CheckpointError."""

    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    safetensors, bins = candidates(names, SAFETENSORS), candidates(names, BIN)

    def has(pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names)

    if (folder / "config.json").exists():
        if safetensors:
            return Layout.SAFETENSORS
        if bins:
            return Layout.BIN
        if (folder / NPZ_WEIGHTS).exists():
            return Layout.NPZ
    if has("consolidated*.pth"):
        return Layout.META
    if safetensors or bins or has(NPZ_WEIGHTS):
        raise CheckpointError(f"{folder} has weights but no config.json", hint="fetch config.json of the same model")
    if has("*.gguf"):
        raise CheckpointError(f"{folder} holds GGUF files, which are not read", hint="convert the original release")
    if has("adapter*.safetensors") or has("adapter_model.bin"):
        raise CheckpointError(
            f"{folder} holds an adapter, not a model",
            hint="merge it into the model it was trained on, and convert that",
        )
    raise CheckpointError(
        f"{folder} holds no weights",
        hint="expected config.json with *.safetensors or pytorch_model*.bin, or params.json with consolidated.NN.pth",
    )


def open(  # shadows the builtin on purpose: convert.open(src)
    src: str | Path, *, rope_theta: float | None = None, variant: str | None = None, dtype: str | None = None
) -> Checkpoint:
    """A model's weights as a stream, under our names, in our rotary order.

    src         a folder, or a hub id such as `codellama/CodeLlama-7b-hf`, which is fetched first
    rope_theta  for sources that do not state it
    variant     a key of config.VARIANTS: checks that the source is that model, and supplies what its files omit
    dtype       cast every floating-point tensor to it; default: as stored
    This reads descriptions only. blocks() reads the weights, checks them for NaN and hashes them. Raises
    CheckpointError, UnsafePickleError, ConfigError, TokenizerError, DownloadError.
    """
    if variant is not None and variant not in VARIANTS:
        raise ConfigError(f"unknown variant {variant!r}", hint=f"known: {', '.join(VARIANTS)}")
    folder = Path(src)
    if not folder.exists() and looks_like_hub_id(str(src)):
        folder = fetch(str(src))
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", hint="pass a folder with weights, or a hub id")
    layout, aside = detect(folder), list[str]()
    if layout is Layout.META:
        args, rows = meta_rows(folder, rope_theta=rope_theta, variant=variant)
        described = PARAMS
    elif layout is Layout.NPZ:
        args, rows = npz_rows(folder, rope_theta=rope_theta, variant=variant)
        described = "config.json"
    else:
        args = hf_args(folder, rope_theta=rope_theta, variant=variant)
        form = SAFETENSORS if layout is Layout.SAFETENSORS else BIN
        chosen = weight_files(folder, form)
        aside = chosen.aside
        rows = safetensors_rows(folder, chosen) if form is SAFETENSORS else bin_rows(folder, chosen)
        described = "config.json"
    check_variant(args, variant)
    check_vocabulary(Tokenizer.load(folder), args)
    names = COMPANIONS if layout in (Layout.SAFETENSORS, Layout.BIN) else COMPANIONS[:1]
    files = {name: folder / name for name in names if (folder / name).is_file()}
    record: dict[str, Any] = {
        "path": str(src),
        "layout": layout.value,
        "variant": variant,
        "sha256": {path.name: _sha256(path) for path in (folder / described, *files.values())},
    }
    return Checkpoint(args, rows, files=files, record=record, dtype=dtype, aside=aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        for piece in inputs.pieces(path):
            digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
