"""The parts of a checkpoint: specs of tensors, blocks of their rows, streams of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_codellama.config import ModelArgs, QuantArgs
from mlx_codellama.errors import CheckpointError

BLOCK_BYTES = 32 << 20  # upper bound on the source bytes of a block, unless one attention head is larger
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float16": 2,
    "bfloat16": 2,
    "uint16": 2,
    "int16": 2,
    "float32": 4,
    "uint32": 4,
    "int32": 4,
    "float64": 8,
    "uint64": 8,
    "int64": 8,
}
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class TensorSpec:
    """The description of a tensor: name, shape and dtype (MLX's name, such as "bfloat16" or "uint32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along axis 0."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Block:
    """Rows start .. start + len(array) of tensor `name`, along axis 0; array [rows, *shape[1:]] in the spec's dtype."""

    name: str
    start: int
    array: mx.array


@dataclass(frozen=True)
class Progress:
    """The progress of a conversion. Bytes are source bytes if the stream counts them, else output bytes."""

    done_bytes: int
    total_bytes: int
    name: str
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        """Seconds left at the mean rate so far; infinite before the first byte."""
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s else math.inf


class Stream(Protocol):
    """A whole model as blocks of rows, never in memory at once.

    args         the model, with the dtype and quantisation that will be written
    specs        every tensor, in the order of ModelArgs.tensor_shapes(); a quantised matrix is weight, scales, biases
    files        files to copy unchanged: file name → path (tokenizer.model, …)
    record       provenance for run.json (hashes of the inputs, …); complete once blocks() is exhausted
    total_bytes  source bytes that blocks() will read, and
    done_bytes   those it has read so far
    blocks()     every row of every spec once; rows of one tensor in ascending order; may be called again
    """

    @property
    def args(self) -> ModelArgs: ...
    @property
    def specs(self) -> list[TensorSpec]: ...
    @property
    def files(self) -> dict[str, Path]: ...
    @property
    def record(self) -> dict[str, Any]: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def done_bytes(self) -> int: ...
    def blocks(self) -> Iterator[Block]: ...


def packed_specs(path: str, shape: tuple[int, ...], quant: QuantArgs, dtype: str) -> list[TensorSpec]:
    """Specs of the quantised matrix at module `path`, of dense shape [out, in]: `QuantArgs.parts`, floats in dtype.

    Raises CheckpointError if `in` is not a multiple of the group size.
    """
    columns = shape[1]
    if columns % quant.group_size or columns * quant.bits % 32:
        raise CheckpointError(
            f"{path}: {columns} input features cannot be quantised in groups of {quant.group_size}",
            hint="choose a smaller group size, or leave this module unquantised",
        )
    return [
        TensorSpec(f"{path}.{name}", part.shape, dtype if part.dtype == "float" else part.dtype)
        for name, part in quant.parts(shape).items()
    ]


def tensor_specs(args: ModelArgs) -> list[TensorSpec]:
    """Every tensor of a checkpoint of this model, quantised as args says, in the order checkpoints are written."""
    specs: list[TensorSpec] = []
    for name, shape in args.tensor_shapes().items():
        path = name.removesuffix(".weight")
        quant = args.quant_of(path) if len(shape) == 2 else None
        specs += packed_specs(path, shape, quant, args.dtype) if quant else [TensorSpec(name, shape, args.dtype)]
    return specs


def tensors_that(names: Sequence[str], one: str, many: str) -> str:
    """The subject of an error: "tensor 'a' is missing", or "3 tensors are missing, first 'a'"."""
    first = repr(names[0][:200])
    return f"tensor {first} {one}" if len(names) == 1 else f"{len(names):,} tensors {many}, first {first}"
