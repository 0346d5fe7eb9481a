"""Tensors of a torch file (`.pth`, `.bin`), read where they lie.

Since torch 1.6 such a file is a zip whose entries are stored, not compressed: `<name>/data.pkl` describes the tensors,
`<name>/data/<key>` holds the bytes of one storage. A tensor is read by its position; the file is never loaded whole.
Zip structures: APPNOTE.TXT 6.3.10 §4.3-4.5 (PKWARE).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_codellama.convert.torch_pickle import TensorRef, read_pickle
from mlx_codellama.errors import CheckpointError
from mlx_codellama.weights.reading import Bytes, FileRows, InputFile, Rows
from mlx_codellama.weights.specs import ITEM_BYTES

MAX_DIRECTORY_BYTES = 4 << 20  # 70B in one file takes 0.1 MB of each
MAX_PICKLE_BYTES = 4 << 20
MAX_STRIDE = 64  # items between neighbours along the denser axis
FULL16, FULL32, FULL64 = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One stored file of a zip: where its bytes are."""

    offset: int
    nbytes: int
    crc: int


def torch_rows(path: Path) -> dict[str, Rows]:
    """A reader for every tensor of a torch file, by name. Reads the zip's directory and the pickle only.

    Raises UnsafePickleError for a pickle that wants more than tensors, CheckpointError for a file that is damaged,
    big-endian, in torch's old format, or whose tensors reach beyond their storages.
    """
    file = InputFile(path)
    entries = read_directory(file)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _damaged(path, f"{len(pickles)} entries are called data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if (order := entries.get(f"{prefix}byteorder")) is not None:
        marker = _content(file, order, limit=16)
        if marker != b"little":
            raise CheckpointError(f"{path} holds {marker.decode('latin-1')!r}-endian numbers; only little is read")
    value = read_pickle(_content(file, entries[pickles[0]], limit=MAX_PICKLE_BYTES), str(path))
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds no table of tensors")
    rows: dict[str, Rows] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorRef):
            raise CheckpointError(f"{path}: {str(name)[:200]!r} is no tensor", hint="expected a plain table of tensors")
        entry = entries.get(f"{prefix}data/{tensor.storage.key}")
        if entry is None:
            raise _damaged(path, f"the storage of {name[:200]!r} is missing")
        if entry.nbytes != tensor.storage.numel * ITEM_BYTES[tensor.storage.dtype]:
            raise _damaged(path, f"the storage of {name[:200]!r} has {entry.nbytes} bytes, the pickle says otherwise")
        rows[name] = _rows(file, entry, tensor, name)
    return rows


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole torch file: {why}", hint="fetch the file again")


def _content(file: InputFile, entry: Entry, *, limit: int) -> bytes:
    if entry.nbytes > limit:
        raise _damaged(file.path, f"its description takes {entry.nbytes} bytes")
    data = _bytes(file, entry.offset, entry.nbytes)
    if zlib.crc32(data) != entry.crc:
        raise _damaged(file.path, "its description does not match its checksum")
    return data


def _bytes(file: InputFile, offset: int, nbytes: int) -> bytes:
    out = np.empty(nbytes, np.uint8)
    file.read(offset, out)
    return out.tobytes()


# ── the zip ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_directory(file: InputFile) -> dict[str, Entry]:
    """Every entry of a zip of stored entries. Raises CheckpointError; allocates at most the directory's size."""
    path = file.path
    if file.size < 22 or _bytes(file, 0, 4) != b"PK\x03\x04":
        raise _no_zip(file)
    start, nbytes, count = _directory_place(file)
    data = _bytes(file, start, nbytes)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > nbytes:
            raise _damaged(path, "its directory is damaged")
        flags, method, crc, packed, size, n_name, n_extra, n_comment, header = struct.unpack_from(
            "<HH4xIIIHHH8xI", data, at + 8
        )
        end = at + 46 + n_name + n_extra + n_comment
        if end > nbytes:
            raise _damaged(path, "its directory is damaged")
        raw_name = data[at + 46 : at + 46 + n_name]
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        size, packed, header = _wide(extra, size, packed, header, path)
        name = raw_name.decode("utf-8", "replace")
        if flags & 1 or method != 0 or packed != size:
            raise _damaged(path, f"{name[:200]!r} is compressed or encrypted, which torch never does")
        if name in entries:
            raise _damaged(path, f"it holds {name[:200]!r} twice")
        entries[name] = Entry(_data_offset(file, header, raw_name, size, start), size, crc)
        at = end
    if at != nbytes:
        raise _damaged(path, "its directory is damaged")
    last = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < last:
            raise _damaged(path, "its entries overlap")
        last = entry.offset + entry.nbytes
    return entries


def _no_zip(file: InputFile) -> CheckpointError:
    head = _bytes(file, 0, min(file.size, 16))
    if head[:1] == b"\x80" or head[5:] == b"torch_file" or b"././@" in head:
        return CheckpointError(
            f"{file.path} is in torch's format from before version 1.6",
            hint="save it again with a recent torch, or take the safetensors of the same model",
        )
    if head.startswith(b"version https://"):
        return CheckpointError(f"{file.path} is a pointer of git-lfs, not the weights", hint="run `git lfs pull`")
    return _damaged(file.path, "it does not begin as one")


def _directory_place(file: InputFile) -> tuple[int, int, int]:
    """Position, bytes and number of entries of the central directory."""
    tail_at = max(0, file.size - 22 - FULL16 - 20)
    tail = _bytes(file, tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + 22 > len(tail) or at + 22 + struct.unpack_from("<H", tail, at + 20)[0] != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise _damaged(file.path, "its end is missing")
    disks, here, count, nbytes, start = struct.unpack_from("<HHxxHII", tail, at + 4)
    end = tail_at + at
    if disks or here:
        disks = here = 0 if (disks, here) in ((FULL16, FULL16), (0, FULL16), (FULL16, 0)) else 1
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        (end,) = struct.unpack_from("<Q", tail, at - 12)
        if end > file.size - 56:
            raise _damaged(file.path, "its end is damaged")
        record = _bytes(file, end, 56)
        if record[:4] != b"PK\x06\x06":
            raise _damaged(file.path, "its end is damaged")
        disks, here, _, count, nbytes, start = struct.unpack_from("<IIQQQQ", record, 16)
    if disks or here or start + nbytes != end or nbytes > MAX_DIRECTORY_BYTES or count * 46 > nbytes:
        raise _damaged(file.path, "its end does not describe its directory")
    return start, nbytes, count


def _wide(extra: bytes, size: int, packed: int, header: int, path: Path) -> tuple[int, int, int]:
    """The three 64-bit fields of an entry, taken from its extra data where the 32-bit ones are full."""
    values = [size, packed, header]
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + nbytes]
        if kind == 1:
            for i, value in enumerate(values):
                if value == FULL32:
                    if len(body) < 8:
                        raise _damaged(path, "its directory is damaged")
                    (values[i],) = struct.unpack_from("<Q", body)
                    body = body[8:]
            break
        at += 4 + nbytes
    return values[0], values[1], values[2]


def _data_offset(file: InputFile, header: int, name: bytes, size: int, limit: int) -> int:
    """Where an entry's bytes begin, from its local header. They must end before the directory at `limit`."""
    if header + 30 + len(name) > limit:
        raise _damaged(file.path, "an entry lies outside the file")
    local = _bytes(file, header, 30 + len(name))
    n_name, n_extra = struct.unpack_from("<HH", local, 26)
    if local[:4] != b"PK\x03\x04" or local[30:] != name or n_name != len(name):
        raise _damaged(file.path, "an entry is not where its directory says")
    offset = header + 30 + n_name + n_extra
    if offset + size > limit:
        raise _damaged(file.path, "an entry runs past the end of the file")
    return int(offset)


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(file: InputFile, entry: Entry, tensor: TensorRef, name: str) -> Rows:
    dtype, shape = tensor.storage.dtype, tensor.shape
    item = ITEM_BYTES[dtype]
    offset = entry.offset + tensor.offset * item
    dense, strides = 1, []
    for n in reversed(shape):
        strides.append(dense)
        dense *= max(n, 1)
    # The stride of an axis of length 1 (or of an empty tensor) says nothing.
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


class StridedRows:
    """A matrix, or a vector, whose items do not lie back to back: a transposed or sliced storage.

    Read line by line along the denser axis, so that a line's bytes are one short read.
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
