"""What git ignores in a folder, read from git's own files. We never run git: it may be missing, and a repository's
configuration can name programs that it would start.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mlx_codellama import env, inputs
from mlx_codellama.errors import PromptError
from mlx_codellama.repository.git_index import tracked_paths
from mlx_codellama.repository.ignore import Rules, TooManyGlobs
from mlx_codellama.repository.inside import read_inside

MOST_EXCLUDE_BYTES = 1 << 20  # per exclude file
MOST_CONFIG_BYTES = 1 << 20
MOST_INDEX_BYTES = 64 << 20  # about 600,000 files; a larger index is not read
MOST_INCLUDES = 32  # limit on included configuration files

_HEADER = re.compile(r'[ \t]*\[[ \t]*([A-Za-z0-9.-]+)(?:[ \t]+("(?:[^"\\]|\\.)*"))?[ \t]*\]')
_KEY = re.compile(r"[ \t]*([A-Za-z][A-Za-z0-9-]*)[ \t]*(=?)")
_ESCAPES = {"n": "\n", "t": "\t", "b": "\b"}


@dataclass
class Excludes:
    """The top of the working tree, and the rules for the whole folder in question, the strongest first."""

    top: Path
    inside: str  # the folder in question, relative to top: "" or "a/b"
    ignore_case: bool = False
    rules: list[Rules] = field(default_factory=list)
    index: Path | None = None  # the file that lists tracked files
    hash_bytes: int = 20

    @cached_property
    def tracked(self) -> set[bytes]:
        """Files that git tracks, relative to top, and the folders above them."""
        with suppress(OSError):
            content = _read_if_there(self.index, MOST_INDEX_BYTES) if self.index is not None else None
            return tracked_paths(content or b"", hash_bytes=self.hash_bytes)
        return set()


def find_excludes(root: Path) -> Excludes:
    """The rules outside a folder that apply in it: core.excludesFile, .git/info/exclude, .gitignore of its parents.

    If there is no repository, the folder itself is the top, and the user's excludes apply.
    root  a resolved path, without links

    Raises PromptError if one of these files is too large.
    """
    top, own, git = _find_repository(root)
    settings: dict[str, str] = {}
    for place in [*map(Path, env.git_config_paths()), *([git / "config"] if git else [])]:
        _read_config(place, settings, [MOST_INCLUDES])
    ignore_case = settings.get("core.ignorecase", "").lower() in ("true", "yes", "on", "1")
    inside = "" if top == root else root.relative_to(top).as_posix()
    found = Excludes(top, inside, ignore_case, index=own and own / "index")
    found.hash_bytes = 32 if settings.get("extensions.objectformat", "").lower() == "sha256" else 20
    chosen = settings.get("core.excludesfile")
    user = Path(os.path.expanduser(chosen)) if chosen else Path(env.config_folder(), "git", "ignore")
    if chosen != "":
        _add(found, user if user.is_absolute() else top / user)
    if git is not None:
        _add(found, git / "info" / "exclude")
    parts = inside.split("/") if inside else []
    for depth in range(len(parts)):
        folder = "/".join(parts[:depth])
        name = f"{folder}/.gitignore".lstrip("/")
        try:
            found.rules.insert(0, read_gitignore(found, folder))
        except FileNotFoundError:
            continue
        except (OSError, TooManyGlobs) as error:
            raise _too_much(top / name, error) from None
    return found


def read_gitignore(excludes: Excludes, folder: str) -> Rules:
    """The rules of the .gitignore in a folder relative to the top. Raises OSError and TooManyGlobs."""
    content = read_inside(excludes.top, f"{folder}/.gitignore".lstrip("/"), MOST_EXCLUDE_BYTES)
    return Rules(content, os.fsencode(folder), ignore_case=excludes.ignore_case)


def _read_if_there(path: Path, limit: int) -> bytes | None:
    """The content of one of git's files; None if it is absent or unreadable. Raises OSError if it is too large."""
    try:
        return inputs.read_bytes(path, limit)
    except ValueError:  # a NUL in the path
        return None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise
        return None


def _add(found: Excludes, path: Path) -> None:
    try:
        content = _read_if_there(path, MOST_EXCLUDE_BYTES)
        if content is not None:
            found.rules.insert(0, Rules(content, ignore_case=found.ignore_case))
    except (OSError, TooManyGlobs) as error:
        raise _too_much(path, error) from None


def _too_much(path: Path, error: Exception) -> PromptError:
    why = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return PromptError(
        f"{path} cannot be used: {why}",
        hint="--repo packs no file without knowing what git ignores; mend that file first",
    )


def _find_repository(root: Path) -> tuple[Path, Path | None, Path | None]:
    """(top of the working tree, its git folder, the git folder that all working trees share).

    (root, None, None) outside a repository.
    """
    device = os.stat(root).st_dev
    for folder in (root, *root.parents):
        try:
            if os.stat(folder).st_dev != device:  # git stops there too
                break
        except OSError:
            break
        git = _git_folders(folder)
        if git is not None:
            return folder, *git
    return root, None, None


def _git_folders(folder: Path) -> tuple[Path, Path] | None:
    git = folder / ".git"
    try:
        pointer = _read_if_there(git, MOST_CONFIG_BYTES)
        if pointer is not None:  # a submodule, or an additional working tree
            if not pointer.startswith(b"gitdir: "):
                return None
            git = folder / os.fsdecode(pointer[len(b"gitdir: ") :].rstrip(b"\r\n"))
        if not os.path.lexists(git / "HEAD"):
            return None
        shared = _read_if_there(git / "commondir", MOST_CONFIG_BYTES)
    except (OSError, ValueError):
        return None
    return git, git if shared is None else git / os.fsdecode(shared.rstrip(b"\r\n"))


def _read_config(path: Path, settings: dict[str, str], includes_left: list[int]) -> None:
    """Add the settings of a configuration file and of those that it includes. Skips broken lines."""
    try:
        content = _read_if_there(path, MOST_CONFIG_BYTES)
    except OSError:
        return
    for key, value in config_entries(os.fsdecode(content)) if content is not None else ():
        if key != "include.path":
            settings[key] = value
        elif includes_left[0] > 0 and value:
            includes_left[0] -= 1
            _read_config(path.parent / os.path.expanduser(value), settings, includes_left)


def config_entries(text: str) -> Iterator[tuple[str, str]]:
    """Entries such as ("core.ignorecase", "true") of sections without a subsection. A key without a value is true."""
    section = ""
    lines = iter(text.removeprefix("\ufeff").split("\n"))
    for line in lines:
        at = 0
        while header := _HEADER.match(line, at):
            section = "" if header[2] else header[1].lower()
            at = header.end()
        key = _KEY.match(line, at)
        if key is None:
            continue
        value = _config_value(line[key.end() :], lines) if key[2] else "true"
        if section:
            yield f"{section}.{key[1].lower()}", value


def _config_value(line: str, lines: Iterator[str]) -> str:
    """The value that begins on a line and may continue on the next, without quotes, comment and outer white space."""
    value: list[str] = []
    kept = 0  # characters of value before its trailing white space
    quoted = False
    characters = iter(line.removesuffix("\r").lstrip(" \t"))
    while True:
        character = next(characters, "")
        if not character or (character in "#;" and not quoted):
            return "".join(value[:kept])
        if character == '"':
            quoted = not quoted
            kept = len(value)
            continue
        if character == "\\":
            escaped = next(characters, "")
            if not escaped:  # the line continues
                characters = iter(next(lines, "").removesuffix("\r"))
                continue
            character = _ESCAPES.get(escaped, escaped)
            kept = len(value) + 1
        value.append(character)
        if quoted or character not in " \t":
            kept = len(value)
