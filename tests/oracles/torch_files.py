"""A writer of torch's zip files without torch, for tests: plain, shared and strided storages, and lies on request.

Bytes follow what torch.save writes (protocol 2, stored entries, data on 64-byte borders); tests marked `peers` hold
this writer to torch itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STORAGE = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as bits: data has dtype uint16 for bfloat16, else numpy's own; strides and offset in items."""

    dtype: str
    data: NDArray[np.generic]  # the storage: one-dimensional once written
    shape: tuple[int, ...] | None = None  # default: data.shape
    strides: tuple[int, ...] | None = None
    offset: int = 0


def pickle_tensors(tensors: Mapping[str, Stored], *, ordered: bool = True, parameters: bool = False) -> bytes:
    """The pickle of a state dict. Tensors with the very same `data` share a storage."""
    keys: dict[int, str] = {}
    out = [b"\x80\x02"]
    out.append(b"ccollections\nOrderedDict\nq\x00)Rq\x01" if ordered else b"}q\x01")
    out.append(b"(")
    for name, tensor in tensors.items():
        key = keys.setdefault(id(tensor.data), str(len(keys)))
        shape = tensor.data.shape if tensor.shape is None else tensor.shape
        strides = dense_strides(shape) if tensor.strides is None else tensor.strides
        out.append(text(name))
        body = b"ctorch._utils\n_rebuild_tensor_v2\n(("
        body += text("storage") + b"ctorch\n" + STORAGE[tensor.dtype].encode() + b"\n"
        body += text(key) + text("cpu") + integer(tensor.data.size) + b"tQ"
        body += integer(tensor.offset) + integers(shape) + integers(strides)
        body += b"\x89ccollections\nOrderedDict\n)RtR"
        if parameters:
            body = b"ctorch._utils\n_rebuild_parameter\n(" + body + b"\x88ccollections\nOrderedDict\n)RtR"
        out.append(body)
    out.append(b"u")
    if ordered:
        out.append(b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)Rsb")
    return b"".join(out) + b"."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + struct.pack("<B", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, dense = [], 1
    for n in reversed(shape):
        strides.append(dense)
        dense *= n
    return tuple(reversed(strides))


def write_torch(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    root: str = "archive",
    byteorder: str | None = "little",
    zip64: bool = False,
    ordered: bool = True,
    parameters: bool = False,
    pickle: bytes | None = None,
    checked: bool = True,
) -> None:
    """Write a torch file. byteorder None leaves the marker out, as torch before 2.1 did; pickle replaces data.pkl;
    checked False leaves the checksums at 0, as torch.serialization.set_crc32_options(False) does."""
    entries = [("data.pkl", pickle or pickle_tensors(tensors, ordered=ordered, parameters=parameters))]
    if byteorder is not None:
        entries.append(("byteorder", byteorder.encode()))
    stored: dict[int, bytes] = {}
    for tensor in tensors.values():
        stored.setdefault(id(tensor.data), np.ascontiguousarray(tensor.data).tobytes())
    entries += [(f"data/{i}", data) for i, data in enumerate(stored.values())]
    entries.append(("version", b"3\n"))
    path.write_bytes(zip_bytes([(f"{root}/{name}", data) for name, data in entries], zip64=zip64, checked=checked))


def zip_bytes(
    entries: Sequence[tuple[str, bytes]], *, zip64: bool = False, method: int = 0, checked: bool = True
) -> bytes:
    """A zip of stored entries. zip64 writes every size and position in its 64-bit form."""
    out, directory = bytearray(), bytearray()
    for name, data in entries:
        raw, crc, at = name.encode(), zlib.crc32(data) * checked, len(out)
        pad = -(at + 30 + len(raw) + 4) % 64  # torch begins every storage on a 64-byte border
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, method, 0, 0, crc, len(data), len(data), len(raw), pad + 4)
        out += raw + struct.pack("<2sH", b"FB", pad) + b"Z" * pad + data
        size, place, extra = len(data), at, b""
        if zip64:
            extra = struct.pack("<HHQQQ", 1, 24, len(data), len(data), at)
            size = place = 0xFFFFFFFF
        lengths = (len(raw), len(extra), 0, 0, 0)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, method, 0, 0, crc, size, size, *lengths, 0, place)
        directory += raw + extra
    start, count = len(out), len(entries)
    out += directory
    if zip64:
        end = len(out)
        out += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    else:
        out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
    return bytes(out)
