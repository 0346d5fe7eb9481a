"""What of a folder is source: names first, contents one file at a time. Nothing outside the folder is ever opened."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from mlx_codellama.errors import PromptError
from mlx_codellama.repository.ignore import Rule, is_ignored, read_rules

HUGE_BYTES = 256 * 1024  # larger files are data, or written by programs
MOST_FILES = 20_000
JUNK_FOLDERS = frozenset(
    (
        "node_modules",
        "bower_components",
        "vendor",
        "third_party",
        "venv",
        "env",
        "virtualenv",
        "site-packages",
        "__pycache__",
        "__pypackages__",
        "build",
        "dist",
        "target",
        "out",
        "coverage",
        "htmlcov",
        "bin",
        "obj",
    )
)
JUNK_ENDINGS = (
    ".min.js",
    ".min.css",
    ".map",
    ".lock",
    ".log",
    ".svg",
    ".pyc",
    ".ipynb",
    ".csv",
    ".tsv",
    ".jsonl",
    ".parquet",
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".onnx",
    ".gguf",
    ".model",
    ".pb.go",
    "_pb2.py",
    "-lock.json",
    "-lock.yaml",
)


@dataclass(frozen=True)
class Skipped:
    """A file that was passed over, and why, in words for people."""

    path: str
    why: str


@dataclass
class Folder:
    """Names of source files, relative to the root, with slashes, sorted. `read` opens one of them."""

    root: Path
    paths: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def read(self, path: str) -> str | None:
        """The text of a file with `\\n` line ends; None, and a note in `skipped`, where it is no text of ours.

        Opened without following a link, part by part from the root, so a folder that is exchanged for a link
        meanwhile does not lead outside either.
        """
        try:
            content = _read_inside(self.root, path)
        except OSError as error:
            self.skipped.append(Skipped(path, error.strerror or "cannot be read"))
            return None
        if content is None:
            self.skipped.append(Skipped(path, "too large" if _size(self.root, path) else "not a file"))
            return None
        if b"\0" in content[:8192]:
            self.skipped.append(Skipped(path, "binary"))
            return None
        try:
            return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError:
            self.skipped.append(Skipped(path, "not UTF-8"))
            return None


def read_folder(root: Path) -> Folder:
    """Walk a folder. Left out: hidden, version control, dependencies, virtual environments, build results, what a
    .gitignore names, huge files, and links. Links that lead outside are noted.

    Raises PromptError where root is no folder.
    """
    if not root.is_dir():
        raise PromptError(f"{root} is not a folder", hint="--repo names the folder of a project")
    found = Folder(Path(os.path.realpath(root)))
    rules: list[Rule] = []
    for here, folders, files in os.walk(found.root, followlinks=False):
        inside = os.path.relpath(here, found.root).replace(os.sep, "/")
        inside = "" if inside == "." else inside
        if ".gitignore" in files and (text := _own_text(found.root, f"{inside}/.gitignore".lstrip("/"))) is not None:
            rules += read_rules(text, inside)
        keep = []
        for name in sorted(folders):
            path = f"{inside}/{name}".lstrip("/")
            full = Path(here, name)
            if full.is_symlink():
                _note_link(found, path)
            elif not (_is_junk_folder(full) or is_ignored(path, True, rules)):
                keep.append(name)
        folders[:] = keep
        for name in sorted(files):
            path = f"{inside}/{name}".lstrip("/")
            if name.startswith(".") or name.lower().endswith(JUNK_ENDINGS) or is_ignored(path, False, rules):
                continue
            if os.path.islink(os.path.join(here, name)):
                _note_link(found, path)
                continue
            found.paths.append(path)
            if len(found.paths) > MOST_FILES:
                raise PromptError(
                    f"{root} holds more than {MOST_FILES} files", hint="name a smaller part of it, or ignore the rest"
                )
    found.paths.sort()
    return found


def _note_link(found: Folder, path: str) -> None:
    target = Path(os.path.realpath(found.root / path))
    if not target.is_relative_to(found.root):
        found.skipped.append(Skipped(path, "a link that leads outside"))


def _is_junk_folder(folder: Path) -> bool:
    name = folder.name
    if name.startswith(".") or name in JUNK_FOLDERS or name.endswith(".egg-info"):
        return True
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _own_text(root: Path, path: str) -> str | None:
    try:
        content = _read_inside(root, path)
    except OSError:
        return None
    return None if content is None else content.decode("utf-8", "replace")


def _read_inside(root: Path, path: str) -> bytes | None:
    """The bytes of a regular file of at most HUGE_BYTES, else None. Raises OSError, also for a link on the way."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = path.split("/")
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
        with os.fdopen(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > HUGE_BYTES:
                return None
            return stream.read(HUGE_BYTES)
    finally:
        os.close(descriptor)


def _size(root: Path, path: str) -> int:
    try:
        status = os.lstat(root / path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
