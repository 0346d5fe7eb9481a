"""Find the source files of a folder by name, and read them one at a time. Opens nothing outside the folder, except the
files in which git stores what it ignores.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

from mlx_codellama.errors import PromptError
from mlx_codellama.repository.git_excludes import Excludes, find_excludes, read_gitignore
from mlx_codellama.repository.ignore import Rules, TooManyGlobs, is_ignored
from mlx_codellama.repository.inside import open_folder, read_inside
from mlx_codellama.repository.names import is_plain, may_hold_secrets

HUGE_BYTES = 256 * 1024  # larger files are data, or generated
MOST_FILES = 100_000
MOST_ENTRIES = 400_000  # names seen, used or not
MOST_DEPTH = 64  # folders in folders
MOST_RULE_STEPS = 40_000_000  # bytes of rules, and Rules.cost: half a minute for hostile input, else a second or two

SECRETS = "may hold secrets"

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
_PRIVATE_KEY = re.compile(rb"PRIVATE KEY-----(?:\\[nr]|[\s\"'+,])*[A-Za-z0-9+/=]{40}")


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was skipped, and a readable reason. Path "" is the root folder."""

    path: str
    why: str


@dataclass
class Folder:
    """Sorted paths of source files, relative to the root, with slashes. `read` opens one of them."""

    root: Path
    paths: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def note(self, path: str, why: str) -> None:
        """Record once that a path was skipped."""
        skipped = Skipped(path, why)
        if skipped not in self._noted:
            self._noted.add(skipped)
            self.skipped.append(skipped)

    def __post_init__(self) -> None:
        self._noted = set(self.skipped)

    def read(self, path: str) -> str | None:
        """The text of a file with `\\n` line ends; None, and a note in `skipped`, if it is not usable text.

        It is opened component by component from the root, without following links. So even a folder that is swapped for
        a link meanwhile does not lead outside.
        """
        try:
            content = read_inside(self.root, path, HUGE_BYTES)
        except OSError as error:
            self.note(path, error.strerror or "cannot be read")
            return None
        if b"\0" in content:
            self.note(path, "binary")
            return None
        if _PRIVATE_KEY.search(content):
            self.note(path, SECRETS)
            return None
        try:
            return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError:
            self.note(path, "not UTF-8")
            return None


def path_inside(root: Path, file: Path) -> str:
    """The file's path inside a folder, with slashes, links resolved. Raises PromptError if it is not inside."""
    inside = os.path.relpath(os.path.realpath(file), os.path.realpath(root))
    if inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise PromptError(f"{file} is not inside {root}", hint="--repo names the folder of the project with the file")
    return inside.replace(os.sep, "/")


def read_folder(root: Path, near: str = "") -> Folder:
    """Walk a folder, starting with the parts nearest to its subfolder `near`.

    Skipped: hidden files, version control, dependencies, virtual environments, build results, what git ignores, links.
    Skipped with a note: possible secrets, links that lead outside, names that are not one line of UTF-8, unreadable
    folders, and whatever exceeds a limit.

    Raises PromptError if root is not a folder or cannot be read, or if its own ignore files are too large.
    """
    if not root.is_dir():
        raise PromptError(f"{root} is not a folder", hint="--repo names the folder of a project")
    return _Walk(Path(os.path.realpath(root)), near).run()


class _Walk:
    """One pass over the names in a folder."""

    def __init__(self, root: Path, near: str) -> None:
        self.found = Folder(root)
        self.excludes: Excludes = find_excludes(root)
        self.near = near.split("/") if near else []
        self.waiting: list[tuple[int, str, bool, list[Rules]]] = []  # a heap: see _wait
        self.entries, self.steps = 0, 0

    def run(self) -> Folder:
        self._wait("", False, self.excludes.rules)
        while self.waiting:
            _, path, ignored, rules = heappop(self.waiting)
            why = self._walk(path, ignored, rules)
            if why:
                self.found.note("", f"{why}: what is farther away was not looked at; --repo may name a smaller part")
                break
        self.found.paths.sort()
        return self.found

    def _wait(self, path: str, ignored: bool, rules: list[Rules]) -> None:
        """Queue a folder. ignored: use only its tracked files. rules: the strongest first."""
        parts = path.split("/") if path else []
        shared = 0
        while shared < min(len(parts), len(self.near)) and parts[shared] == self.near[shared]:
            shared += 1
        heappush(self.waiting, (len(parts) + len(self.near) - 2 * shared, path, ignored, rules))

    def _walk(self, path: str, all_ignored: bool, rules: list[Rules]) -> str:
        """Visit one folder. Returns the limit that ends the walk, or ""."""
        try:
            listed = self._list(path)
        except OSError as error:
            if not path:
                raise PromptError(
                    f"{self.found.root} cannot be read: {error.strerror}", hint="--repo names a folder"
                ) from None
            self.found.note(path, error.strerror or "cannot be read")
            return ""
        names = {name for name, _ in listed}
        if path and ("pyvenv.cfg" in names or "conda-meta" in names):
            return ""
        if ".gitignore" in names and not all_ignored:
            own = self._own_rules(path, dict(listed)[".gitignore"])
            if own is None:
                return ""
            self.steps += own.n_bytes
            rules = [own, *rules] if own else rules
        for name, mode in listed:
            below = f"{path}/{name}" if path else name
            ignored = all_ignored or self._is_ignored(below, stat.S_ISDIR(mode), rules)
            if name == ".git" or (ignored and self._from_top(below) not in self.excludes.tracked):
                continue
            self._take(below, name, mode, ignored, rules)
            if len(self.found.paths) > MOST_FILES:
                self.found.paths.pop()
                return f"more than {MOST_FILES:,} files"
            if self.steps > MOST_RULE_STEPS:
                return "the rules of .gitignore take too long"
        return f"more than {MOST_ENTRIES:,} names" if self.entries >= MOST_ENTRIES else ""

    def _list(self, path: str) -> list[tuple[str, int]]:
        """(name, file type bits of st_mode) of the entries of a folder, sorted by name."""
        listed = []
        with open_folder(self.found.root, path) as descriptor, os.scandir(descriptor) as entries:
            for entry in entries:
                self.entries += 1
                link, folder = entry.is_symlink(), entry.is_dir(follow_symlinks=False)
                file = entry.is_file(follow_symlinks=False)
                mode = stat.S_IFLNK if link else stat.S_IFDIR if folder else stat.S_IFREG if file else 0
                listed.append((entry.name, mode))
                if self.entries >= MOST_ENTRIES:
                    break
        return sorted(listed)

    def _own_rules(self, path: str, mode: int) -> Rules | None:
        """The rules of a folder's own .gitignore; None, and a note, if they cannot be read."""
        name = f"{path}/.gitignore".lstrip("/")
        if not stat.S_ISREG(mode):  # git does not follow a link here either
            self.found.note(name, "not a file")
            return Rules(b"")
        try:
            return read_gitignore(self.excludes, f"{self.excludes.inside}/{path}".strip("/"))
        except (OSError, TooManyGlobs) as error:
            why = (error.strerror if isinstance(error, OSError) else "") or str(error)
        if not path:
            raise PromptError(
                f"{self.found.root / name} cannot be used: {why}",
                hint="--repo packs no file without knowing what git ignores; mend that file first",
            )
        self.found.note(path, f"its .gitignore cannot be used: {why}")
        return None

    def _is_ignored(self, path: str, is_folder: bool, rules: list[Rules]) -> bool:
        full = self._from_top(path)
        self.steps += sum(part.cost(full) for part in rules)
        return is_ignored(full, is_folder, rules)

    def _from_top(self, path: str) -> bytes:
        return os.fsencode(f"{self.excludes.inside}/{path}" if self.excludes.inside else path)

    def _take(self, path: str, name: str, mode: int, ignored: bool, rules: list[Rules]) -> None:
        """Take an entry that git does not ignore, or an ignored folder that contains tracked files."""
        found = self.found
        if stat.S_ISDIR(mode):
            if name.startswith(".") or name in JUNK_FOLDERS or name.endswith((".egg-info", ".dist-info")):
                return
            if not is_plain(name):
                found.note(path, "its name is not one line of UTF-8 text")
            elif path.count("/") + 1 >= MOST_DEPTH:
                found.note(path, f"deeper than {MOST_DEPTH} folders")
            else:
                self._wait(path, ignored, rules)
            return
        if may_hold_secrets(name):
            found.note(path, SECRETS)
        elif name.startswith(".") or name.lower().endswith(JUNK_ENDINGS):
            return
        elif not is_plain(name):
            found.note(path, "its name is not one line of UTF-8 text")
        elif stat.S_ISLNK(mode):
            self._note_link(path)
        elif stat.S_ISREG(mode):
            found.paths.append(path)
        else:
            found.note(path, "not a file")

    def _note_link(self, path: str) -> None:
        """Note a link whose text leads outside. We do not resolve it, because that would access what is outside."""
        folder, _, name = path.rpartition("/")
        try:
            with open_folder(self.found.root, folder) as descriptor:
                target = os.readlink(name, dir_fd=descriptor)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.found.note(path, error.strerror or "cannot be read")
            return
        full = posixpath.normpath(posixpath.join(str(self.found.root), folder, target))
        root = str(self.found.root).rstrip("/")
        if full != root and not full.startswith(root + "/"):
            self.found.note(path, "a link that leads outside")
