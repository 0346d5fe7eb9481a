"""Source files: read as UTF-8, named with a line and a column, replaced in one step, compared as a patch."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from pathlib import Path

from mlx_codellama import inputs
from mlx_codellama.errors import OutputError, PromptError
from mlx_codellama.hole import split_lines
from mlx_codellama.staging import write_file

MAX_BYTES = 16 * 2**20  # no source file is larger, and no context holds more
TOO_LONG = "no context holds that much: give only the part that matters"


def read_text(path: Path) -> str:
    """The text of a file with its own line endings.

    Raises PromptError if it is not UTF-8, cannot be read, or has more than MAX_BYTES, of which none are read then.
    """
    try:
        content = inputs.read_bytes(path, MAX_BYTES)
    except OSError as error:
        hint = TOO_LONG if error.errno == errno.EFBIG else "name a text file, or pipe its text in"
        raise PromptError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    return decode(content, str(path))


def decode(content: bytes, name: str) -> str:
    """content as text. Raises PromptError if it is not UTF-8 or has more than MAX_BYTES."""
    if len(content) > MAX_BYTES:
        raise PromptError(f"{name} has more than {MAX_BYTES:,} bytes", hint=TOO_LONG)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} in line {line})",
            hint="convert it first, for example with iconv -f LATIN1 -t UTF-8",
        ) from None


def split_target(target: str) -> tuple[Path, int | None, int | None]:
    """`FILE`, `FILE:LINE` or `FILE:LINE:COL` → its parts; a colon may follow, as grep and compilers write it.

    If a file has exactly this name, the target is that file.
    """
    if not Path(target).exists():
        match = re.fullmatch(r"(.+?):(\d+)(?::(\d+))?:?", target, re.DOTALL)
        if match:
            return Path(match[1]), int(match[2]), int(match[3]) if match[3] else None
    return Path(target), None, None


def check_replaceable(path: Path) -> Path:
    """The file that `path` names, links followed. Raises OutputError if it must not or cannot be replaced.

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
    Raises OutputError, also if the file holds anything else by now; the file is then as it was.
    """

    def unchanged(target: Path) -> None:
        if inputs.read_bytes(target, MAX_BYTES) != was.encode("utf-8"):
            raise OutputError(
                f"{path} was changed while it was being filled, and is left as it is", hint="run the command again"
            )

    gone = OutputError(f"{path} is no longer there, and nothing was written")
    try:
        write_file(check_replaceable(path), text.encode("utf-8"), before=unchanged)
    except FileNotFoundError:
        raise gone from None
    except OutputError as error:
        raise gone if isinstance(error.__cause__, FileNotFoundError) else error from None


def unified_diff(old: str, new: str, name: str) -> str:
    """A patch that makes the file `name`, which holds `old`, hold `new`, as `diff -u` writes it."""
    shown = patch_name(name)
    lines = difflib.unified_diff(split_lines(old), split_lines(new), quoted(f"a/{shown}"), quoted(f"b/{shown}"))
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def patch_name(name: str) -> str:
    """The file's path as a patch names it, for `patch -p1` in this folder: relative if it lies inside, without `..`."""
    real, here = os.path.abspath(name), os.getcwd()
    inside = os.path.relpath(real, here)
    return real.lstrip("/") if inside == os.pardir or inside.startswith(os.pardir + os.sep) else inside


def quoted(name: str) -> str:
    """name in the header of a patch: as git writes it, in quotes if it holds a control code, a quote or a backslash;
    followed by a tab if it holds a space, at which `patch` would end it."""
    if any(letter < " " or letter in '"\\\x7f' for letter in name):
        escapes = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
        shown = (escapes.get(c, c if c >= " " and c != "\x7f" else f"\\{ord(c):03o}") for c in name)
        return f'"{"".join(shown)}"'
    return name + "\t" * (" " in name)
