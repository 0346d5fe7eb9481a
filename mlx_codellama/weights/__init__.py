"""Tensors on disk: describe a checkpoint, read it in bounded memory, write it as a whole or not at all.

`specs` defines tensors, blocks of their rows, and streams of blocks. `header` checks safetensors headers before any
data is used. `reading` turns files into blocks. `checkpoint` reads folders in our layout, and `saving` writes them.
`state` stores training runs, and `arrays` stores caches.
"""

from __future__ import annotations

from mlx_codellama.weights.arrays import ArraysFile, write_arrays
from mlx_codellama.weights.checkpoint import Checkpoint
from mlx_codellama.weights.codes import widen_codes
from mlx_codellama.weights.header import TensorInfo, read_header, read_metadata
from mlx_codellama.weights.reading import BlockReader, FileRows, InputFile, Rows
from mlx_codellama.weights.run import read_run, run_text, update_run
from mlx_codellama.weights.saving import refuse_existing, refuse_source_within, save
from mlx_codellama.weights.specs import (
    BLOCK_BYTES,
    Block,
    Progress,
    Stream,
    TensorSpec,
    packed_specs,
    tensor_specs,
)
from mlx_codellama.weights.state import read_state, write_state

__all__ = [
    "BLOCK_BYTES",
    "ArraysFile",
    "Block",
    "BlockReader",
    "Checkpoint",
    "FileRows",
    "InputFile",
    "Progress",
    "Rows",
    "Stream",
    "TensorInfo",
    "TensorSpec",
    "packed_specs",
    "read_header",
    "read_metadata",
    "read_run",
    "read_state",
    "refuse_existing",
    "refuse_source_within",
    "run_text",
    "save",
    "tensor_specs",
    "update_run",
    "widen_codes",
    "write_arrays",
    "write_state",
]
