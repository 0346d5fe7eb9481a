"""The header of a safetensors file, fully checked before any of it is used.

Layout: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes
back to back. (github.com/huggingface/safetensors, README "Format".)
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_codellama import inputs
from mlx_codellama.errors import CheckpointError
from mlx_codellama.weights.specs import ITEM_BYTES

MAX_HEADER_BYTES = 8 << 20  # 70B in one file takes 0.1 MB
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
UNREAD = ("F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "C64")  # valid, but not supported here
DTYPE_CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype (MLX's name), shape, and the position of its bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file in the order of their bytes.

    Raises CheckpointError unless the tensors of the header fill the rest of the file exactly: for a wrong length,
    invalid JSON, duplicate names, unknown dtypes, and offsets that are negative, overlap, leave gaps, contradict the
    shape or exceed the file. Reads only the header.
    """
    text, size = _read(path)
    return _tensors(path, _entries(path, text), start=8 + len(text), size=size)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file. Raises like `read_header`."""
    metadata = _entries(path, _read(path)[0]).get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata is not a table of strings")
    return metadata


def _read(path: Path) -> tuple[bytes, int]:
    """The text of the header, and the size of the file in bytes."""
    try:
        with os.fdopen(inputs.open_regular(path), "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if len(head) < 8:
                raise _damaged(path, f"it has {size} bytes")
            (length,) = struct.unpack("<Q", head)
            if head + file.read(8) == b"version https://":
                raise CheckpointError(f"{path} is a pointer of git-lfs, not the weights", hint="run `git lfs pull`")
            file.seek(8)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
            text = file.read(length)
            if len(text) < length:
                raise _damaged(path, "it ends in its header")
            return text, size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file: {why}", hint="the file is damaged or cut short; fetch it again"
    )


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("no object")
        table = inputs.parse_json(text)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({str(error)[:200]})") from None
    if not isinstance(table, dict):
        raise _damaged(path, "its header is not an object")
    return table


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _tensors(path: Path, table: dict[str, Any], *, start: int, size: int) -> dict[str, TensorInfo]:
    metadata = table.pop("__metadata__", None) or {}  # MLX writes null if there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata is not a table of strings")
    found: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _damaged(path, f"{name[:200]!r} lacks dtype, shape or data_offsets, or has more")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if entry["dtype"] in UNREAD:
            raise CheckpointError(
                f"{path}: {name[:200]!r} is stored as {entry['dtype']}, which is not supported",
                hint="take the model in bfloat16, float16 or float32; `convert` quantises those",
            )
        if dtype is None:
            raise CheckpointError(f"{path}: {name[:200]!r} has the unknown dtype {str(entry['dtype'])[:50]!r}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > 8 or not all(map(_natural, shape)):
            raise _damaged(path, f"the shape of {name[:200]!r} is no list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
            raise _damaged(path, f"the offsets of {name[:200]!r} are no pair of positions")
        first, last = offsets
        if any(value > size for value in (*shape, *offsets)) and 0 not in shape:
            raise _damaged(path, f"{name[:200]!r} runs past the end of the file")
        if last - first != math.prod(shape) * ITEM_BYTES[dtype]:
            raise _damaged(
                path, f"{name[:200]!r} has {last - first} bytes, its shape {shape} of {dtype} says otherwise"
            )
        found.append((first, last, name, TensorInfo(dtype, tuple(shape), start + first, last - first)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for first, last, name, _ in found:
        if first != end:
            raise _damaged(path, f"{name[:200]!r} begins at {first}, the tensor before it ends at {end}")
        end = last
    if start + end != size:
        raise _damaged(path, f"its tensors end at {start + end}, the file at {size}")
    return {name: info for _, _, name, info in found}


def header_bytes(
    infos: list[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a safetensors file with these tensors (name, dtype, shape, nbytes) in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    end = 0
    for name, dtype, shape, nbytes in infos:
        table[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
