"""Open files below a folder without following links. `inputs` does the same for files that a path names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_folder(root: Path, path: str) -> Iterator[int]:
    """A descriptor of the folder `path` below root ("" is root itself). Raises OSError, also for a link on the way.

    It is opened component by component, so a folder that is swapped for a link meanwhile does not lead outside.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in path.split("/") if path else ():
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def read_inside(root: Path, path: str, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises OSError, also for a link on the way."""
    folder, _, name = path.rpartition("/")
    with open_folder(root, folder) as descriptor:
        _check(os.stat(name, dir_fd=descriptor, follow_symlinks=False), limit)  # opening a device has effects
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=descriptor)
        return _read(file, limit)


def _check(status: os.stat_result, limit: int) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "a link")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a file")
    if status.st_size > limit:
        raise OSError(errno.EFBIG, "too large")


def _read(file: int, limit: int) -> bytes:
    with os.fdopen(file, "rb") as stream:
        _check(os.fstat(stream.fileno()), limit)
        content = stream.read(limit + 1)  # the file may grow meanwhile
    if len(content) > limit:
        raise OSError(errno.EFBIG, "too large")
    return content
