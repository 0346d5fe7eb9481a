"""What Linux lets this process hold: its control groups, with all above them, and its resource limits.

Nothing is read here: `file` gives a file's text, `limit` a resource limit's value, each None where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# What `ulimit -v` must leave beside arrays: stacks and arenas of threads still to come, and Python's own objects.
RESERVE_BYTES = 64 * 2**20

File = Callable[[str], "str | None"]


class Limit(NamedTuple):
    """name: of whatever sets it. total_bytes: what may be held. free_bytes: of these, not held yet."""

    name: str
    total_bytes: int
    free_bytes: int


class _Files(NamedTuple):
    """Names within the folder of a control group; `limits` are files too. The rest are lines of `stat`."""

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]  # pages of files, which are given up on demand
    unwritten: tuple[str, ...]  # of these, what has to be written first


# memory.high kills nobody, but a process above it is slowed down until it stands still.
_VERSION_2 = _Files(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file"),
    ("file_dirty", "file_writeback"),
)
_VERSION_1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
    ("total_dirty", "total_writeback"),
)


def control_groups(file: File) -> list[Limit]:
    """The limits of this process's control groups and of every group above them that can be seen (versions 1 and 2)."""
    found: list[Limit] = []
    for folder, files in _folders(file):
        stated = [n for name in files.limits if (n := number(file(f"{folder}/{name}"))) is not None]
        if stated:
            stat = _table(file(f"{folder}/memory.stat"))
            given_up = sum(stat.get(k, 0) for k in files.cached) - sum(stat.get(k, 0) for k in files.unwritten)
            used = (number(file(f"{folder}/{files.used}")) or 0) - max(0, given_up)
            found.append(Limit("control group", min(stated), max(0, min(stated) - max(0, used))))
    return found


def _folders(file: File) -> Iterator[tuple[str, _Files]]:
    mounts = list(_mounts(file("/proc/self/mountinfo")))
    memberships = [line.split(":", 2) for line in (file("/proc/self/cgroup") or "0::/\n1:memory:/").splitlines()]
    for _, controllers, path in (m for m in memberships if len(m) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        for of, root, point in mounts:
            if of is files:
                for within in _upwards(path, root):
                    yield point + within, files


def _mounts(mountinfo: str | None) -> Iterator[tuple[_Files, str, str]]:
    """Kind, root and mount point of each hierarchy that counts memory; the usual ones where the list cannot be read."""
    if mountinfo is None:
        yield _VERSION_2, "/", "/sys/fs/cgroup"
        yield _VERSION_2, "/", "/sys/fs/cgroup/unified"
        yield _VERSION_1, "/", "/sys/fs/cgroup/memory"
        return
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        fields, about = mount.split(" "), kind.split(" ")
        if len(fields) < 5 or len(about) < 3:
            continue
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), path) for path in fields[3:5])
        if about[0] == "cgroup2":
            yield _VERSION_2, root, point
        elif about[0] == "cgroup" and "memory" in about[2].split(","):
            yield _VERSION_1, root, point


def _upwards(path: str, root: str) -> Iterator[str]:
    """The group at `path` and those above it, as paths below the mount point of a hierarchy whose `root` is mounted.

    A container may be told paths of the machine that it cannot reach: what is mounted is then its own group.
    """
    root = root.rstrip("/")
    inside = path == root or path.startswith(f"{root}/")
    parts = [part for part in path[len(root) :].split("/") if part] if inside else []
    if ".." in parts:
        parts = []
    for n in range(len(parts), -1, -1):
        yield "".join(f"/{part}" for part in parts[:n])


def resource_limits(file: File, limit: Callable[[str], int | None]) -> list[Limit]:
    """RLIMIT_AS (`ulimit -v`) and RLIMIT_DATA (`ulimit -d`) of this process, where they are set."""
    status = _table((file("/proc/self/status") or "").replace(":", " "))
    found: list[Limit] = []
    for option, name, field in (("-v", "RLIMIT_AS", "VmSize"), ("-d", "RLIMIT_DATA", "VmData")):
        total = limit(name)
        if total is not None:
            used = 1024 * status.get(field, 0) + RESERVE_BYTES
            found.append(Limit(f"ulimit {option}", total, max(0, total - used)))
    return found


def _table(text: str | None) -> dict[str, int]:
    """Lines of a name and a number, with or without a unit."""
    return {name: int(n) for name, n in re.findall(r"^(\w+)\s+(\d{1,20})\b", text or "", re.MULTILINE)}


def number(text: str | None) -> int | None:
    """The number that a file holds; None where it holds another word or does not exist."""
    return int(text) if text is not None and re.fullmatch(r"\s*\d{1,20}\s*", text, re.ASCII) else None
