"""The files of a folder that a source file imports, found in its text alone, which may be unfinished.

Time is linear in the text and in the number of files: the text is read line by line without going back, and files are
looked up by their paths.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator

_PYTHON_ENDINGS = (".py", ".pyi")
_SCRIPT_ENDINGS = (".js", ".jsx", ".ts", ".tsx", ".mjs", ".cjs", ".mts", ".cts", ".vue", ".svelte")
_C_ENDINGS = (".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".hxx", ".cu", ".cuh", ".m", ".mm", ".metal", ".inl")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*"([^"\n]+)"', re.M)
_QUOTED = re.compile(r"""'([^'"\n]*)'|"([^'"\n]*)\"""")
_WORDS_BEFORE = ("from", "import", "require")
_SPACES = 100  # between a word of _WORDS_BEFORE and the quote
_MEMBERS = re.compile(r"[\w\s,.*\\]*")
_TRIED = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".vue", "/index.ts", "/index.tsx", "/index.js")
MOST_PARTS = 64  # in a dotted name or a quoted path


def imported(path: str | None, text: str, paths: Iterable[str]) -> list[str]:
    """The files among `paths` that the file `path` with this text imports, in the order of its imports.

    path  None if the text belongs to no file; it is then read as each language in turn, from the root
    """
    known = set(paths) - {path}
    folder = posixpath.dirname(path) if path else ""
    ending = posixpath.splitext(path)[1] if path else None
    found: list[str] = []
    if ending is None or ending in _PYTHON_ENDINGS:
        found += _modules(folder, list(dict.fromkeys(_python(text))), known)
    if ending is None or ending in _C_ENDINGS:
        found += _files(folder, list(dict.fromkeys(_INCLUDE.findall(text))), known)
    if ending is None or ending in _SCRIPT_ENDINGS:
        found += _files(folder, list(dict.fromkeys(_script(text))), known)
    return list(dict.fromkeys(found))


def _python(text: str) -> Iterator[str]:
    """Dotted names of modules in import statements; `from a import b` gives a.b, which may be a module, and a."""
    lines = iter(text.split("\n"))
    line: str | None = ""
    while line is not None:
        word, rest = [*line.split(None, 1), "", ""][:2]
        line = None
        if word == "import":
            rest, line = _statement(rest, lines)
            for module in rest.split(","):
                yield (module.split() or [""])[0]
        elif word == "from":
            source, names = [*rest.split(None, 1), "", ""][:2]
            if names.startswith(("import ", "import\t", "import(", "import\\")):
                names, line = _statement(names[len("import") :], lines)
                for member in names.strip("() ").split(","):
                    name = (member.split() or [""])[0]
                    yield source + name if source.endswith(".") else f"{source}.{name}"
                yield source
        if line is None:
            line = next(lines, None)


def _statement(rest: str, lines: Iterator[str]) -> tuple[str, str | None]:
    """(the text after `import`, on all its lines, without comments; a line that was read too many, or None)."""
    parts = [rest.split("#")[0].split(";")[0].strip()]
    in_brackets = parts[0].startswith("(")
    while (in_brackets and ")" not in parts[-1]) or parts[-1].endswith("\\"):
        parts[-1] = parts[-1].removesuffix("\\")
        line = next(lines, None)
        if line is None:
            break
        part = line.split("#")[0].strip()
        if part.split(" ")[0] in ("from", "import") or not _MEMBERS.fullmatch(part.split(")")[0]):
            return " ".join(parts), line  # the bracket is not closed yet
        parts.append(part)
    return " ".join(parts).replace("(", " ").split(")")[0], None


def _script(text: str) -> Iterator[str]:
    """Quoted relative paths after `from`, `import`, `import(` and `require(`."""
    for match in _QUOTED.finditer(text):
        target = match[1] or match[2] or ""
        if target.startswith("."):
            before = text[max(0, match.start() - _SPACES) : match.start()].rstrip(" \t")
            before = before.removesuffix("(").rstrip(" \t") if before.endswith("(") else before
            word = next((word for word in _WORDS_BEFORE if before.endswith(word)), "")
            if word and not before[: -len(word)][-1:].isidentifier():
                yield target


def _modules(folder: str, names: list[str], known: set[str]) -> Iterator[str]:
    """Files of dotted names: for a relative name below the file's package, else the closest below any folder."""
    here = [part for part in folder.split("/") if part]
    wanted: list[tuple[str, bool]] = []  # path without suffix; whether it starts at the root
    for name in names:
        dotted = name.lstrip(".")
        dots = len(name) - len(dotted)
        parts = dotted.split(".") if dotted else []
        if len(parts) > MOST_PARTS or dots > len(here) + 1 or not all(part.isidentifier() for part in parts):
            continue
        if dots:
            parts = here[: len(here) - dots + 1] + parts
        if parts:
            wanted.append(("/".join(parts), bool(dots)))
    stems: dict[str, list[str]] = {}
    for path in known:
        stem, ending = posixpath.splitext(path)
        if ending in _PYTHON_ENDINGS:
            stems.setdefault(stem.removesuffix("/__init__"), []).append(path)
    closest = _by_end({end for end, exact in wanted if not exact}, stems)
    for stem, exact in wanted:
        fits = stems.get(stem, []) if exact else [path for found in closest.get(stem, ()) for path in stems[found]]
        if fits:
            yield _closest(folder, fits)


def _files(folder: str, names: list[str], known: set[str]) -> Iterator[str]:
    """Files of quoted paths: relative to the file, else (without leading dots) the closest below any folder."""
    names = [name for name in names if name.count("/") < MOST_PARTS]
    by_end = _by_end({name for name in names if not name.startswith(".")}, known)
    for name in names:
        near = posixpath.normpath(posixpath.join(folder, name))
        stems = [near, posixpath.splitext(near)[0]]  # TypeScript imports x.ts as ./x.js
        exact = [stem + ending for stem in stems for ending in _TRIED if stem + ending in known]
        if exact:
            yield exact[0]
        elif fits := by_end.get(name):
            yield _closest(folder, fits)


def _by_end(ends: set[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """For each end, the paths that equal it or end with it after a slash."""
    last_parts = {end[end.rfind("/") + 1 :] for end in ends}
    found: dict[str, list[str]] = {}
    for path in paths:
        at = path.rfind("/") + 1
        if path[at:] not in last_parts:
            continue
        while True:
            if path[at:] in ends:
                found.setdefault(path[at:], []).append(path)
            if at == 0:
                break
            at = path.rfind("/", 0, at - 1) + 1
    return found


def _closest(folder: str, paths: list[str]) -> str:
    return min(paths, key=lambda path: (distance(folder, path), len(path), path))


def distance(folder: str, path: str) -> int:
    """Steps up and down from a folder to the folder of a path. Both are relative to the root, which is ""."""
    a = [part for part in folder.split("/") if part]
    b = [part for part in posixpath.dirname(path).split("/") if part]
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return len(a) + len(b) - 2 * shared
