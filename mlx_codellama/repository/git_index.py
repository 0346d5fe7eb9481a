"""The files that a repository tracks, from git's index. Tracked files are not ignored, whatever the rules say."""

from __future__ import annotations

import struct

_VERSIONS = (2, 3, 4)
_STAT_BYTES = 40  # per entry, before the hash of its content
_EXTENDED = 0x4000
MOST_PATH_BYTES = 4096
MOST_BYTES = 64 << 20  # of all paths and folders, which can exceed the size of the index by far


def tracked_paths(index: bytes, *, hash_bytes: int = 20) -> set[bytes]:
    """The paths in an index, and all folders above them. Of a truncated index, those that could be read.

    hash_bytes  bytes of an object's name: 20, or 32 in a repository with SHA-256
    """
    found: set[bytes] = set()
    if len(index) < 12 or index[:4] != b"DIRC":
        return found
    version, n_entries = struct.unpack(">II", index[4:12])
    at, path, left = 12, b"", MOST_BYTES
    for _ in range(n_entries if version in _VERSIONS else 0):
        start, at = at, at + _STAT_BYTES + hash_bytes
        if at + 2 > len(index):
            break
        at += 4 if index[at] << 8 & _EXTENDED else 2
        if version == 4:  # length to keep of the last path, then the rest of this one
            dropped, at = _offset(index, at)
            if dropped > len(path):
                break
            path = path[: len(path) - dropped]
        else:
            path = b""
        end = index.find(b"\0", at, at + MOST_PATH_BYTES + 1)
        if end < 0:
            break
        path += index[at:end]
        at = end + 1 if version == 4 else start + (end - start + 8) // 8 * 8
        if len(path) > MOST_PATH_BYTES:
            break
        part = path.rstrip(b"/")
        while part and part not in found:
            left -= len(part)
            if left < 0:
                return found
            found.add(part)
            part = part[: max(0, part.rfind(b"/"))]
    return found


def _offset(data: bytes, at: int) -> tuple[int, int]:
    """(a number in git's encoding of offsets, the position after it). A number without an end gives one too large."""
    value = -1
    for place in range(at, min(at + 5, len(data))):
        value = (value + 1) << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return len(data), at
