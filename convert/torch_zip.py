"""Tensors of a torch file (`.pth`, `.bin`), read in place.

Since torch 1.6 such a file is an uncompressed zip: `<name>/data.pkl` describes the tensors, `<name>/data/<key>` holds
the bytes of one storage. Each tensor is read at its position; the file is never loaded whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mlx_codellama.convert.stored_zip import SIGNATURE, Entry, content, damaged, expect, read_bytes, read_directory
from mlx_codellama.convert.torch_pickle import TensorRef, read_pickle
from mlx_codellama.errors import CheckpointError
from mlx_codellama.weights.reading import Bytes, FileRows, InputFile, Rows
from mlx_codellama.weights.specs import ITEM_BYTES

MAX_PICKLE_BYTES = 512 << 10  # 70B in one file takes 0.1 MB
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization's MAGIC_NUMBER, pickled
# The hint must not suggest to load such a file, not even to save it again: loading a pickle executes its contents.
_TAKE_SAFETENSORS = "such a file can run code when it is loaded; take the safetensors of the same model"
MAX_STRIDE = 64  # items between neighbours along the denser axis


def torch_rows(path: Path) -> dict[str, Rows]:
    """A reader for every tensor of a torch file, by name. Reads the zip's directory and the pickle only.

    Raises UnsafePickleError for a pickle that needs more than tensors, and CheckpointError for a file that is damaged,
    big-endian or in torch's old format, or whose tensors exceed their storages.
    """
    file = InputFile(path)
    _refuse_other_formats(file)
    entries = read_directory(file)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise damaged(path, f"{len(pickles)} entries are called data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if (order := entries.get(f"{prefix}byteorder")) is not None:
        marker = content(file, order, limit=16)
        if marker != b"little":
            raise CheckpointError(f"{path} holds {marker.decode('latin-1')!r}-endian numbers; only little is read")
    value = read_pickle(content(file, entries[pickles[0]], limit=MAX_PICKLE_BYTES), str(path))
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds no table of tensors")
    rows: dict[str, Rows] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorRef):
            inside = isinstance(tensor, dict) and any(isinstance(value, TensorRef) for value in tensor.values())
            what = "is a table of its own, as in the checkpoint of a training run" if inside else "is no tensor"
            hint = "save that table alone" if inside else "expected a plain table of tensors"
            raise CheckpointError(f"{path}: {str(name)[:200]!r} {what}", hint=hint)
        if tensor.negative and tensor.storage.dtype not in NegatedRows.SIGN:
            raise CheckpointError(f"{path}: {name[:200]!r} is negated, and of {tensor.storage.dtype}")
        entry = entries.get(f"{prefix}data/{tensor.storage.key}")
        if entry is None:
            raise damaged(path, f"the storage of {name[:200]!r} is missing")
        if entry.nbytes != tensor.storage.numel * ITEM_BYTES[tensor.storage.dtype]:
            raise damaged(path, f"the storage of {name[:200]!r} has {entry.nbytes} bytes, the pickle says otherwise")
        expect(file, entry)
        dense = _rows(file, entry, tensor, name)
        rows[name] = NegatedRows(dense) if tensor.negative else dense
    return rows


def _refuse_other_formats(file: InputFile) -> None:
    head = read_bytes(file, 0, min(file.size, 512))
    if head.startswith(SIGNATURE):
        return
    if head.startswith(OLD_TORCH) or b"././@" in head or head[257:262] == b"ustar":
        raise CheckpointError(f"{file.path} is in torch's format from before version 1.6", hint=_TAKE_SAFETENSORS)
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{file.path} is a bare pickle, not a file of tensors", hint=_TAKE_SAFETENSORS)
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{file.path} is a pointer of git-lfs, not the weights", hint="run `git lfs pull`")


def _rows(file: InputFile, entry: Entry, tensor: TensorRef, name: str) -> Rows:
    dtype, shape = tensor.storage.dtype, tensor.shape
    item = ITEM_BYTES[dtype]
    offset = entry.offset + tensor.offset * item
    dense, strides = 1, []
    for n in reversed(shape):
        strides.append(dense)
        dense *= max(n, 1)
    # The stride of an axis of length 1 (or of an empty tensor) has no meaning.
    if all(n <= 1 or a == b for n, a, b in zip(shape, tensor.strides, reversed(strides), strict=True)):
        return FileRows(file, offset, dtype, shape)
    if len(shape) > 2 or any(n > 1 and stride == 0 for n, stride in zip(shape, tensor.strides, strict=True)):
        raise CheckpointError(
            f"{file.path}: {name[:200]!r} is stored in a way no weight is (shape {shape}, strides {tensor.strides})"
        )
    by_row, by_column = tensor.strides if len(shape) == 2 else (*tensor.strides, 1)
    if min(by_row, by_column) > MAX_STRIDE:
        raise CheckpointError(f"{file.path}: {name[:200]!r} is stored too thinly (strides {tensor.strides})")
    return StridedRows(file, offset, dtype, shape, (by_row, by_column))


class NegatedRows:
    """Floating-point numbers with their signs flipped: the meaning of torch's negative bit."""

    SIGN: ClassVar = {"float16": 0x8000, "bfloat16": 0x8000, "float32": 0x80000000}

    def __init__(self, rows: Rows) -> None:
        self.dtype, self.shape, self.step, self.files = rows.dtype, rows.shape, rows.step, rows.files
        self._rows = rows

    def read(self, start: int, stop: int, out: Bytes) -> None:
        self._rows.read(start, stop, out)
        items = out.reshape(-1).view(np.uint32 if self.dtype == "float32" else np.uint16)
        items ^= items.dtype.type(self.SIGN[self.dtype])


class StridedRows:
    """A matrix or vector whose items are not contiguous: a transposed or sliced storage.

    It is read line by line along the denser axis, so each line is one short read.
    """

    step = 1

    def __init__(
        self, file: InputFile, offset: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, int]
    ) -> None:
        self.file, self.offset, self.dtype, self.shape, self._strides = file, offset, dtype, shape, strides
        self.files = [file]

    def read(self, start: int, stop: int, out: Bytes) -> None:
        if not out.size:
            return
        item = ITEM_BYTES[self.dtype]
        n_columns = self.shape[1] if len(self.shape) == 2 else 1
        lines = out.reshape(stop - start, n_columns, item)
        by_row, by_column = self._strides
        first = start * by_row
        if by_row < by_column:  # transposed: a line is a column
            lines, by_row, by_column = lines.transpose(1, 0, 2), by_column, by_row
        span = np.empty((((lines.shape[1] - 1) * by_column + 1), item), np.uint8)
        for i in range(lines.shape[0]):
            self.file.read(self.offset + (first + i * by_row) * item, span)
            lines[i] = span[::by_column]
