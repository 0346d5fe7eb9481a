"""Meta's own files: params.json and consolidated.NN.pth, one shard per model-parallel rank.

Joining: we read the rows of a block from each shard into their place, so only one block is in memory, however many
shards there are. Rotary order: Meta rotates neighbours (2i, 2i+1), we rotate halves (i, i + D/2), so we reorder the
rows of every head of wq and wk after joining (transformers' convert_llama_weights_to_hf.py, `permute`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_codellama.config import VARIANTS, ModelArgs, read_object
from mlx_codellama.convert.names import EMBEDDING, IGNORED, OUTPUT, MetaTensor, meta_tensors
from mlx_codellama.convert.torch_zip import torch_rows
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.weights.reading import Bytes, InputFile, Rows, row_bytes
from mlx_codellama.weights.specs import tensors_that

PARAMS = "params.json"
SAMPLE_ROWS = 8  # rows to compare when looking for repeated shards


def args_of_params(
    params: Mapping[str, Any], path: Path, *, vocab_size: int, rope_theta: float | None, variant: str | None
) -> ModelArgs:
    """The model that a params.json describes. `path` names the file in errors.

    `variant` supplies what the file cannot state (ModelArgs.from_params).
    """
    try:
        args = ModelArgs.from_params(params, vocab_size=vocab_size, rope_theta=rope_theta, variant=variant)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has a value of the wrong kind: {error}") from None
    return replace(args, eos_token_id=VARIANTS[variant].args.eos_token_id) if variant else args


def shard_paths(folder: Path) -> list[Path]:
    """consolidated.00.pth … in rank order. Raises CheckpointError if one is missing or misnamed."""
    paths = sorted(path for path in folder.glob("consolidated*.pth") if not path.name.startswith("."))
    for i, path in enumerate(paths):
        match = re.fullmatch(r"consolidated\.(\d\d)\.pth", path.name)
        if match is None:
            raise CheckpointError(f"{path} is not named as a shard", hint="expected consolidated.00.pth, .01.pth, …")
        if int(match[1]) != i:
            raise CheckpointError(f"{folder / f'consolidated.{i:02d}.pth'} is missing", hint="fetch the missing shard")
    if not paths:
        raise CheckpointError(f"{folder} holds no consolidated.NN.pth")
    return paths


def meta_rows(folder: Path, *, rope_theta: float | None, variant: str | None) -> tuple[ModelArgs, dict[str, Rows]]:
    """The model in a folder of Meta's files and a reader for each tensor, under our names.

    Raises CheckpointError or ConfigError. Reads only params.json, the shards' descriptions and a few rows.
    """
    paths = shard_paths(folder)
    shards = [torch_rows(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.keys() != shards[0].keys():
            odd = min(shard.keys() ^ shards[0].keys())
            raise CheckpointError(f"{path} and {paths[0].name} do not hold the same tensors: {odd[:200]!r}")
    _refuse_repeated(paths, shards)
    if OUTPUT.name not in shards[0]:
        raise CheckpointError(f"{paths[0]} lacks {OUTPUT.name}", hint="expected Meta's names of tensors")
    vocab_size = sum(shard[OUTPUT.name].shape[0] for shard in shards if shard[OUTPUT.name].shape)
    params = read_object(folder / PARAMS, hint="fetch params.json of the same model")
    args = args_of_params(params, folder / PARAMS, vocab_size=vocab_size, rope_theta=rope_theta, variant=variant)
    table = meta_tensors(args.num_hidden_layers)
    if leftover := sorted(shards[0].keys() - {meta.name for meta in table.values()} - IGNORED):
        raise CheckpointError(
            tensors_that(leftover, "does not belong to this model", "do not belong to this model"),
            hint="params.json may belong to another model",
        )
    shapes = args.tensor_shapes()
    rows: dict[str, Rows] = {}
    for ours, meta in table.items():
        if meta.name not in shards[0]:
            raise CheckpointError(f"{paths[0]} lacks {meta.name}", hint="params.json may belong to another model")
        parts = [shard[meta.name] for shard in shards]
        rows[ours] = _joined(parts, meta, shapes[ours], args.head_dim)
    return args, rows


def _refuse_repeated(paths: list[Path], shards: list[dict[str, Rows]]) -> None:
    """Refuse a shard that repeats another: the first rows of a split tensor are equal."""
    seen: dict[bytes, Path] = {}
    for path, shard in zip(paths, shards, strict=True):
        rows = shard.get(EMBEDDING.name)
        if rows is None or not rows.shape:
            return
        count = min(SAMPLE_ROWS * rows.step, rows.shape[0])
        sample = np.empty((count, min(row_bytes(rows), 1 << 20)), np.uint8)
        if sample.shape[1] != row_bytes(rows):
            return  # no embedding is this wide; the shape check reports it
        rows.read(0, count, sample)
        if (first := seen.setdefault(sample.tobytes(), path)) is not path and sample.any():
            raise CheckpointError(f"{path} repeats {first.name}", hint="fetch the shard again")


def _joined(parts: list[Rows], meta: MetaTensor, shape: tuple[int, ...], head_dim: int) -> Rows:
    if meta.axis is None:
        parts = parts[:1]
    expected = list(shape)
    if meta.axis is not None:
        expected[meta.axis] //= len(parts)
    for part in parts:
        if part.shape != tuple(expected) or (meta.axis is not None and shape[meta.axis] % len(parts)):
            raise CheckpointError(
                f"{part.files[0].path}: {meta.name} has shape {part.shape}, expected {tuple(expected)} in each of "
                f"{len(parts)} shards",
                hint="a shard is missing or there twice, or params.json belongs to another model",
            )
        if part.dtype != parts[0].dtype:
            raise CheckpointError(f"{part.files[0].path}: {meta.name} is {part.dtype}, elsewhere {parts[0].dtype}")
    rows = parts[0] if len(parts) == 1 else JoinedRows(parts, meta.axis or 0, shape)
    return HalvesRows(rows, head_dim) if meta.heads else rows


class JoinedRows:
    """One tensor from equal parts along axis 0 or 1."""

    step = 1

    def __init__(self, parts: list[Rows], axis: int, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = parts[0].dtype, shape
        self.files: list[InputFile] = [file for part in parts for file in part.files]
        self._parts, self._axis = parts, axis

    def read(self, start: int, stop: int, out: Bytes) -> None:
        if self._axis == 0:
            n = self._parts[0].shape[0]
            for i, part in enumerate(self._parts):
                first, last = max(start - i * n, 0), min(stop - i * n, n)
                if first < last:
                    part.read(first, last, out[first + i * n - start : last + i * n - start])
            return
        width = out.shape[1] // len(self._parts)
        columns = np.empty((stop - start, width), np.uint8)
        for i, part in enumerate(self._parts):
            part.read(start, stop, columns)
            out[:, i * width : (i + 1) * width] = columns


class HalvesRows:
    """Rows of each head reordered from Meta's rotary order (pairs) to ours (halves): row 2i + j moves to j·D/2 + i."""

    def __init__(self, rows: Rows, head_dim: int) -> None:
        self.dtype, self.shape, self.files, self.step = rows.dtype, rows.shape, rows.files, head_dim
        self._rows = rows

    def read(self, start: int, stop: int, out: Bytes) -> None:
        pairs = np.empty_like(out)
        self._rows.read(start, stop, pairs)
        n_heads, half, width = (stop - start) // self.step, self.step // 2, out.shape[1]
        np.copyto(out.reshape(n_heads, 2, half, width), pairs.reshape(n_heads, half, 2, width).transpose(0, 2, 1, 3))


def check_variant(args: ModelArgs, variant: str | None) -> None:
    """Raise ConfigError if args is not the released model that the caller named."""
    if variant is None:
        return
    released = VARIANTS.get(variant)
    if released is None:
        raise ConfigError(f"unknown variant {variant!r}", hint=f"known: {', '.join(VARIANTS)}")
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "rope_theta",
    )
    wrong: Mapping[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) != getattr(released.args, n)}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ConfigError(f"{variant} has {name} {getattr(released.args, name)}, this model {value}")
