"""The state of a run (parameters, optimiser, counters) as one safetensors file, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlx_codellama.errors import CheckpointError, OutputError
from mlx_codellama.weights.header import read_header


def write_state(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write arrays and string metadata. Raises OutputError; an interrupted write leaves the old file."""
    partial = path.with_name(f".{path.name}.partial.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays, metadata)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write {path}: {error}", hint="is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and metadata of `write_state`. Raises CheckpointError for a damaged or foreign file."""
    read_header(path)
    loaded = cast("tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(path), return_metadata=True))
    arrays, metadata = loaded
    if "train" not in metadata:
        raise CheckpointError(f"{path} is not the state of a training run")
    return arrays, metadata
