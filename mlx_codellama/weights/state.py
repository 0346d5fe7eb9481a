"""The state of a run (parameters, optimiser, counters) as one safetensors file, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx

from mlx_codellama.errors import CheckpointError
from mlx_codellama.staging import replacing, write_at
from mlx_codellama.weights.header import header_bytes, read_header
from mlx_codellama.weights.saving import raw_bytes
from mlx_codellama.weights.specs import TensorSpec


def write_state(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write arrays and string metadata. Raises OutputError; an interrupted write keeps the old file."""
    arrays = dict(sorted(arrays.items()))  # so that the same state gives the same bytes, resumed or not
    specs = [TensorSpec(name, a.shape, str(a.dtype).removeprefix("mlx.core.")) for name, a in arrays.items()]
    header = header_bytes([(s.name, s.dtype, s.shape, s.nbytes) for s in specs], metadata)
    with replacing(path) as fd:
        end = write_at(fd, memoryview(header), 0)
        for array in arrays.values():
            end += write_at(fd, raw_bytes(array), end)


def read_state(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and metadata of `write_state`. Raises CheckpointError for a damaged or foreign file."""
    read_header(path)
    loaded = cast("tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(path), return_metadata=True))
    arrays, metadata = loaded
    if "train" not in metadata:
        raise CheckpointError(f"{path} is not the state of a training run")
    return arrays, metadata
