"""Which files of a folder a source file imports, read from its text alone: it may be half written."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator

_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)?|[^\n#]+)|import[ \t]+([^\n#]+))", re.M
)
_QUOTED = {  # a path in quotes: relative to the file, or to any folder
    (".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".m", ".mm", ".metal"): re.compile(
        r'^[ \t]*#[ \t]*(?:include|import)[ \t]+"([^"\n]+)"', re.M
    ),
    (".js", ".jsx", ".ts", ".tsx", ".mjs", ".cjs", ".vue", ".svelte"): re.compile(
        r"""(?:\bfrom[ \t]*|\bimport[ \t]*\(?[ \t]*|\brequire[ \t]*\([ \t]*)['"](\.[^'"\n]+)['"]"""
    ),
}
_ENDINGS = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".vue", "/index.ts", "/index.tsx", "/index.js")


def imported(path: str, text: str, paths: Iterable[str]) -> list[str]:
    """The files among `paths` that the file `path` with this text imports, in the order in which it names them."""
    known = set(paths) - {path}
    ending = posixpath.splitext(path)[1]
    found: Iterator[str] = iter(())
    if ending in (".py", ".pyi"):
        found = _python(path, text, known)
    for endings, pattern in _QUOTED.items():
        if ending in endings:
            found = _quoted(path, pattern.findall(text), known)
    return list(dict.fromkeys(found))


def _python(path: str, text: str, known: set[str]) -> Iterator[str]:
    folder = posixpath.dirname(path)
    places: dict[str, list[str]] = {}  # last part of a module's name → its files
    for name in known:
        if name.endswith((".py", ".pyi")):
            parts = posixpath.splitext(name)[0].split("/")
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if parts:
                places.setdefault(parts[-1], []).append(name)
    for match in _PYTHON.finditer(text):
        source, names, modules = match[1], match[2], match[3]
        if modules is not None:
            for module in modules.split(","):
                yield from _module(module.split(" as ")[0].strip(), folder, places)
            continue
        members = [re.split(r"\s", word.strip())[0] for word in names.strip("()\\ \t\n").split(",")]
        for member in members:  # a member may be a module of its own
            joined = source + member if source.endswith(".") or not source else f"{source}.{member}"
            yield from _module(joined, folder, places)
        yield from _module(source, folder, places)


def _module(name: str, folder: str, places: dict[str, list[str]]) -> Iterator[str]:
    """Files of a dotted name: below the file's own package for a relative one, else the closest below any folder."""
    dots = len(name) - len(name.lstrip("."))
    parts = [part for part in name.split(".") if part]
    if dots:
        for _ in range(dots - 1):
            folder = posixpath.dirname(folder)
        parts = [*(part for part in folder.split("/") if part), *parts]
    if not parts or not all(part.isidentifier() for part in parts):
        return
    wanted = "/".join(parts)
    fits = [place for place in places.get(parts[-1], ()) if _is_module(place, wanted, exact=bool(dots))]
    if fits:
        yield min(fits, key=lambda place: (distance(folder, place), len(place), place))


def _is_module(place: str, wanted: str, *, exact: bool) -> bool:
    stem = posixpath.splitext(place)[0].removesuffix("/__init__")
    return stem == wanted or (not exact and stem.endswith("/" + wanted))


def _quoted(path: str, names: list[str], known: set[str]) -> Iterator[str]:
    folder = posixpath.dirname(path)
    for name in names:
        near = posixpath.normpath(posixpath.join(folder, name))
        stems = [near, posixpath.splitext(near)[0]]  # TypeScript says ./x.js of x.ts
        exact = [stem + ending for stem in stems for ending in _ENDINGS if stem + ending in known]
        if exact:
            yield exact[0]
        elif not name.startswith("."):
            fits = [place for place in known if place.endswith("/" + name)]
            if fits:
                yield min(fits, key=lambda place: (distance(folder, place), len(place), place))


def distance(folder: str, path: str) -> int:
    """Steps from a folder to the folder of a path: up to where they meet, and down. Both relative, "" is the root."""
    a = [part for part in folder.split("/") if part]
    b = [part for part in posixpath.dirname(path).split("/") if part]
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return len(a) + len(b) - 2 * shared
