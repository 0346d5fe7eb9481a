"""The zip container of torch and numpy files: uncompressed entries, each read in place.

Structures: APPNOTE.TXT 6.3.10 §4.3-4.5 (PKWARE), with the 64-bit forms. All claims of the
directory are checked before any entry is read. Memory is bounded by the size of the directory.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_codellama.errors import CheckpointError
from mlx_codellama.weights.reading import InputFile

MAX_DIRECTORY_BYTES = 1 << 20  # 70B in one file takes 0.1 MB
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class Entry:
    """One stored file of a zip: the position of its bytes. crc is 0 if the writer did not compute it."""

    offset: int
    nbytes: int
    crc: int


def read_directory(file: InputFile) -> dict[str, Entry]:
    """Every entry of an uncompressed zip. Raises CheckpointError; allocates at most the directory's size."""
    path = file.path
    if file.size < 22 or read_bytes(file, 0, 4) != SIGNATURE:
        raise damaged(path, "it does not begin as one")
    start, nbytes, count = _directory_place(file)
    data = read_bytes(file, start, nbytes)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > nbytes:
            raise damaged(path, "its directory is damaged")
        flags, method, crc, packed, size, n_name, n_extra, n_comment, header = struct.unpack_from(
            "<HH4xIIIHHH8xI", data, at + 8
        )
        end = at + 46 + n_name + n_extra + n_comment
        if end > nbytes:
            raise damaged(path, "its directory is damaged")
        raw_name = data[at + 46 : at + 46 + n_name]
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        size, packed, header = _wide(extra, size, packed, header, path)
        name = raw_name.decode("utf-8", "replace")
        if flags & 1 or method != 0 or packed != size:
            raise damaged(path, f"{name[:200]!r} is compressed or encrypted, which tensors never are")
        if name in entries:
            raise damaged(path, f"it holds {name[:200]!r} twice")
        entries[name] = Entry(_data_offset(file, header, raw_name, size, start), size, crc)
        at = end
    if at != nbytes:
        raise damaged(path, "its directory is damaged")
    last = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < last:
            raise damaged(path, "its entries overlap")
        last = entry.offset + entry.nbytes
    return entries


def _directory_place(file: InputFile) -> tuple[int, int, int]:
    """Position, bytes and number of entries of the central directory."""
    tail_at = max(0, file.size - 22 - FULL16 - 20)
    tail = read_bytes(file, tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + 22 > len(tail) or at + 22 + struct.unpack_from("<H", tail, at + 20)[0] != len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise damaged(file.path, "its end is missing")
    disks, here, count, nbytes, start = struct.unpack_from("<HHxxHII", tail, at + 4)
    end = tail_at + at
    if disks or here:
        disks = here = 0 if (disks, here) in ((FULL16, FULL16), (0, FULL16), (FULL16, 0)) else 1
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        (end,) = struct.unpack_from("<Q", tail, at - 12)
        if end > file.size - 56:
            raise damaged(file.path, "its end is damaged")
        record = read_bytes(file, end, 56)
        if record[:4] != b"PK\x06\x06":
            raise damaged(file.path, "its end is damaged")
        disks, here, _, count, nbytes, start = struct.unpack_from("<IIQQQQ", record, 16)
    if disks or here or start + nbytes != end or nbytes > MAX_DIRECTORY_BYTES or count * 46 > nbytes:
        raise damaged(file.path, "its end does not describe its directory")
    return start, nbytes, count


def _wide(extra: bytes, size: int, packed: int, header: int, path: Path) -> tuple[int, int, int]:
    """The three 64-bit fields of an entry, taken from its extra data if the 32-bit ones are full."""
    values = [size, packed, header]
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + nbytes]
        if kind == 1:
            for i, value in enumerate(values):
                if value == FULL32:
                    if len(body) < 8:
                        raise damaged(path, "its directory is damaged")
                    (values[i],) = struct.unpack_from("<Q", body)
                    body = body[8:]
            break
        at += 4 + nbytes
    return values[0], values[1], values[2]


def _data_offset(file: InputFile, header: int, name: bytes, size: int, limit: int) -> int:
    """The position of an entry's bytes, from its local header. They must end before the directory at `limit`."""
    if header + 30 + len(name) > limit:
        raise damaged(file.path, "an entry lies outside the file")
    local = read_bytes(file, header, 30 + len(name))
    n_name, n_extra = struct.unpack_from("<HH", local, 26)
    if local[:4] != SIGNATURE or local[30:] != name or n_name != len(name):
        raise damaged(file.path, "an entry is not where its directory says")
    offset = header + 30 + n_name + n_extra
    if offset + size > limit:
        raise damaged(file.path, "an entry runs past the end of the file")
    return int(offset)


def content(file: InputFile, entry: Entry, *, limit: int) -> bytes:
    """A small entry, whole and checked. Raises CheckpointError if it exceeds limit or its checksum is wrong."""
    if entry.nbytes > limit:
        raise damaged(file.path, f"its description takes {entry.nbytes} bytes")
    data = read_bytes(file, entry.offset, entry.nbytes)
    if entry.crc and zlib.crc32(data) != entry.crc:
        raise damaged(file.path, "its description does not match its checksum")
    return data


def expect(file: InputFile, entry: Entry) -> None:
    """Check the bytes of an entry while they are streamed."""
    if entry.crc and entry.nbytes:
        file.expect(entry.offset, entry.nbytes, entry.crc)


def read_bytes(file: InputFile, offset: int, nbytes: int) -> bytes:
    """nbytes from offset. Raises CheckpointError if the file is too short."""
    out = np.empty(nbytes, np.uint8)
    file.read(offset, out)
    return out.tobytes()


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that violates its format."""
    return CheckpointError(f"{path} is not a whole file of tensors: {why}", hint="fetch the file again")
