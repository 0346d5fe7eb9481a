"""Open files that others wrote: regular files only, and with a limit on their size.

A FIFO would block forever, a device has no end, and a JSON file of one gigabyte takes two of memory. Refused files
raise OSError with a sentence in `strerror`, so callers report them like a missing permission.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_BYTES = 16 << 20  # an index of 70B takes 0.1 MB, a run.json with every tensor 0.5 MB
PIECE_BYTES = 4 << 20
MAX_DIGITS = 40  # of an integer in JSON, far more than a description of a model needs
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> int:
    """A descriptor for reading. Follows links, does not block. Raises OSError for anything but a regular file."""
    _check(path, os.stat(path))  # before opening: opening some devices has effects
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check(path, os.fstat(descriptor))  # it may have been swapped meanwhile
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: str | Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The whole content of a regular file. Raises OSError, also if it has more than limit bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"it has {max(size, len(data)):,} bytes, more than the {limit:,} allowed", str(path))
    return data


def pieces(path: str | Path, nbytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """The content of a regular file of any size, in pieces. Raises OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        while piece := file.read(nbytes):
            yield piece


def read_json(path: str | Path, limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises OSError like `read_bytes`, and ValueError like `parse_json`."""
    return parse_json(read_bytes(path, limit))


def parse_json(text: bytes | str) -> Any:
    """Parse JSON strictly: a repeated key is an error, because its value is ambiguous.

    Raises ValueError for a repeated key, invalid JSON or UTF-8, and integers of more than MAX_DIGITS digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it names {name[:200]!r} twice")
            seen.add(name)
    return table


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)
