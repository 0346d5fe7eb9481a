"""The order in which files matter to the one being written, and how many of them fit a number of tokens."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_codellama.repository.folder import Folder, Skipped
from mlx_codellama.repository.imports import distance, imported

LEAST_TOKENS = 24  # what is left when looking for more is not worth it
MISSES = 40  # files in a row that do not fit, after which the rest is not tried
MOST_BYTES_PER_TOKEN = 16  # a file with more bytes than this times the room cannot fit: its tokens are not counted

_SLASHES = (
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cxx",
    ".hpp",
    ".hh",
    ".cu",
    ".cuh",
    ".m",
    ".mm",
    ".metal",
    ".java",
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".mjs",
    ".cjs",
    ".go",
    ".rs",
    ".swift",
    ".kt",
    ".scala",
    ".cs",
    ".php",
    ".dart",
    ".zig",
    ".proto",
)
_COMMENTS = dict.fromkeys(_SLASHES, ("// ", "")) | {
    **dict.fromkeys((".sql", ".lua", ".hs", ".elm"), ("-- ", "")),
    **dict.fromkeys((".html", ".xml", ".md", ".vue", ".svelte"), ("<!-- ", " -->")),
    **dict.fromkeys((".css", ".scss", ".less"), ("/* ", " */")),
    **dict.fromkeys((".el", ".clj", ".lisp", ".scm"), ("; ", "")),
    **dict.fromkeys((".tex", ".erl"), ("% ", "")),
}
_PROSE = frozenset((".md", ".rst", ".txt", ".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".xml", ".html", ".tex"))


@dataclass(frozen=True)
class Piece:
    """One file of the context. tokens: of its header and text; why: "imported", "same folder", "2 folders away"."""

    path: str
    text: str
    tokens: int
    why: str


@dataclass(frozen=True)
class Packed:
    """The context: the pieces as they stand in it, least important first, so the nearest is next to the cursor."""

    pieces: list[Piece] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def text(self) -> str:
        return "".join(_framed(piece.path, piece.text) for piece in self.pieces)


def header(path: str) -> str:
    """A line of comment with the file's name, in the language of its ending."""
    before, after = _COMMENTS.get(posixpath.splitext(path)[1].lower(), ("# ", ""))
    return f"{before}{path}{after}\n"


def pack(folder: Folder, own: str | None, text: str, *, budget: int, n_tokens: Callable[[str], int]) -> Packed:
    """Choose files for the context of `own`, the file being written (relative to the folder), whose text is given.

    First what it imports, in its own order; then by the number of folders between, the same kind of file first, prose
    and settings last, then by name. A file goes in whole or not at all; one that does not fit is passed over for the
    next. The same folder, file and budget always give the same context.

    own       None where the text belongs to no file: then distances count from the root
    budget    tokens, as n_tokens counts those of one piece of text
    """
    first = imported(own, text, folder.paths) if own else []
    place = posixpath.dirname(own) if own else ""
    ending = posixpath.splitext(own)[1] if own else ""

    def rank(path: str) -> tuple[bool, int, bool, str]:
        kind = posixpath.splitext(path)[1]
        return kind in _PROSE, distance(place, path), kind != ending, path

    rest = sorted((path for path in folder.paths if path != own and path not in first), key=rank)
    chosen: list[Piece] = []
    room, misses = budget, 0
    for path in [*first, *rest]:
        if room < LEAST_TOKENS or misses >= MISSES:
            break
        body = folder.read(path)
        if body is None or not body.strip():
            continue
        framed = _framed(path, body)
        tokens = n_tokens(framed) if len(framed) <= MOST_BYTES_PER_TOKEN * room else room + 1
        if tokens > room:
            misses += 1
            if path in first:
                folder.skipped.append(Skipped(path, f"imported, but does not fit the {room} tokens left"))
            continue
        misses = 0
        room -= tokens
        chosen.append(Piece(path, body, tokens, "imported" if path in first else _away(distance(place, path))))
    return Packed(chosen[::-1], list(folder.skipped))


def _framed(path: str, text: str) -> str:
    return header(path) + text.strip("\n") + "\n\n\n"


def _away(steps: int) -> str:
    return "same folder" if steps == 0 else "1 folder away" if steps == 1 else f"{steps} folders away"
