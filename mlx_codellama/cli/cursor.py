"""Source files: what is read of them or of stdin, what a target names in them, and how an answer goes back."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from pathlib import Path

import click

from mlx_codellama import inputs
from mlx_codellama.errors import OutputError, PromptError
from mlx_codellama.staging import write_file

MAX_BYTES = 16 * 2**20  # of a text; no source file is larger, and the rest would only be read to be left out
TOO_LONG = "no context holds so much: give the part that counts"
STDIN = Path("-")


def read_text(path: Path, missing: str = "") -> str:
    """The text of a file, or of stdin where path is STDIN: strictly UTF-8, every line ending as it is.

    missing  what to say of a stdin that is a terminal, where nobody has piped anything in
    Raises PromptError, also for more than MAX_BYTES, of which no more is read; click.UsageError.
    """
    name = str(path)
    if path == STDIN:
        if sys.stdin.isatty():
            raise click.UsageError(missing)
        content, name = sys.stdin.buffer.read(MAX_BYTES + 1), "stdin"
        if len(content) > MAX_BYTES:
            raise PromptError(f"stdin has more than {MAX_BYTES:,} bytes", hint=TOO_LONG)
    else:
        try:
            content = inputs.read_bytes(path, MAX_BYTES)
        except OSError as error:
            hint = TOO_LONG if error.errno == errno.EFBIG else "name a text file, or give its text on standard input"
            raise PromptError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} in line {line})",
            hint="convert it first, for example with iconv -f LATIN1 -t UTF-8",
        ) from None


def split_target(target: str) -> tuple[Path, int | None, int | None]:
    """`FILE`, `FILE:LINE` or `FILE:LINE:COL` → its parts, with a colon at the end too, as grep and compilers write it.
    A file that really has such a name wins."""
    if not Path(target).exists():
        match = re.fullmatch(r"(.+?):(\d+)(?::(\d+))?:?", target, re.DOTALL)
        if match:
            return Path(match[1]), int(match[2]), int(match[3]) if match[3] else None
    return Path(target), None, None


def check_replaceable(path: Path) -> Path:
    """The file that `path` names, links followed. Raises OutputError where it must not or cannot be replaced.

    Root may write everything, so the mode counts by itself: a file that nobody may write was meant to stay.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is no ordinary file", hint="leave out --in-place to see the completion")
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise OutputError(f"{path} is read-only", hint="allow writing with chmod u+w, or leave out --in-place")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder of {path} is read-only", hint="allow writing there, or leave out --in-place")
    return target


def replace_file(path: Path, text: str, *, was: str) -> None:
    """Put new text in place of a file in one step, keeping its mode and its owner; a link keeps pointing at its file.

    was  what the file held when it was read. Generating takes minutes, and an edit made meanwhile must not be lost
    Raises OutputError, also for a file that holds anything else by now; the file is then as it was.
    """

    def unchanged(target: Path) -> None:
        if inputs.read_bytes(target, MAX_BYTES) != was.encode("utf-8"):
            raise OutputError(f"{path} was changed while it was being filled", hint="it was left as it is now")

    gone = OutputError(f"{path} is no longer there", hint="nothing was written")
    try:
        write_file(check_replaceable(path), text.encode("utf-8"), before=unchanged)
    except FileNotFoundError:
        raise gone from None
    except OutputError as error:
        raise gone if isinstance(error.__cause__, FileNotFoundError) else error from None
