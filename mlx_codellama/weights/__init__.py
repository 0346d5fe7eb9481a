"""Tensors on disk: what a checkpoint holds, reading it in bounded memory, and writing it all or nothing.

`specs` says what a tensor, a block of its rows and a stream of blocks are; `header` checks safetensors headers before a
byte is trusted; `reading` turns files into blocks; `checkpoint` reads folders in our layout; `saving` writes them;
`state` is for runs that can be resumed, `arrays` for what a session keeps.
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
