"""Rank files by relevance to the one being written, and choose those that fit a token budget."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_codellama.errors import printable
from mlx_codellama.repository.folder import Folder, Skipped
from mlx_codellama.repository.imports import distance, imported
from mlx_codellama.repository.names import CODE, kind_of

LEAST_TOKENS = 24  # stop when fewer tokens are left
MARGIN = 8  # extra tokens for joined pieces of text and control ids
MOST_READ = 2_000  # limit on opened files
MISSES = 40  # stop after this many files in a row that do not fit
MOST_BYTES_PER_TOKEN = 16  # skip files with more bytes per token left, without counting tokens

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


@dataclass(frozen=True)
class Piece:
    """One file of the context. tokens counts header and text; why: "imported", "same folder", "2 folders away"."""

    path: str
    text: str
    tokens: int
    why: str


@dataclass(frozen=True)
class Packed:
    """The context: its pieces in order, least important first, so the most important is next to the cursor."""

    pieces: list[Piece] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def text(self) -> str:
        return "".join(_framed(piece.path, piece.text) for piece in self.pieces)


def header(path: str) -> str:
    """A comment line with the file's name, in the language of its suffix. No name can end the comment or the line."""
    before, after = _COMMENTS.get(posixpath.splitext(path)[1].lower(), ("# ", ""))
    name = printable(path)
    for end in ("-->", "*/", "?>"):
        name = name.replace(end, f"{end[:-1]} {end[-1]}")
    return f"{before}{name}{after}\n"


def pack(folder: Folder, own: str | None, text: str, *, budget: int, n_tokens: Callable[[str], int]) -> Packed:
    """Choose files for the context of `own`, the file being written (relative to the folder), whose text is given.

    First come its imports, in its own order. Then code, by the number of folders between, files with its own suffix
    first; then other files, settings, prose, licences and metadata, each in the same order. A file goes in whole or not
    at all; if it does not fit, the next is tried. The same folder, file and budget give the same context.

    own       None if the text belongs to no file; distances then count from the root
    budget    in tokens, as n_tokens counts those of a text
    """
    first = imported(own, text, folder.paths)
    taken = {own, *first}
    place = posixpath.dirname(own) if own else ""
    ending = posixpath.splitext(own)[1] if own else ""

    def rank(path: str) -> tuple[int, int, bool, str]:
        alike = posixpath.splitext(path)[1] == ending != ""
        return CODE if alike else kind_of(path), distance(place, path), not alike, path

    rest = sorted((path for path in folder.paths if path not in taken), key=rank)
    is_imported = set(first)
    skipped: list[Skipped] = []
    chosen: list[Piece] = []
    room, misses = budget, 0
    for n_read, path in enumerate([*first, *rest]):
        if n_read == MOST_READ:
            skipped.append(Skipped("", f"{MOST_READ:,} files were read; the others are farther away"))
            break
        if room < LEAST_TOKENS or misses >= MISSES:
            break
        body = folder.read(path)
        if body is None or not body.strip():
            continue
        framed = _framed(path, body)
        tokens = n_tokens(framed) if len(framed) <= MOST_BYTES_PER_TOKEN * room else room + 1
        if tokens > room:
            misses += 1
            if path in is_imported:
                skipped.append(Skipped(path, f"imported, but does not fit the {room} tokens left"))
            continue
        misses = 0
        room -= tokens
        chosen.append(Piece(path, body, tokens, "imported" if path in is_imported else _away(distance(place, path))))
    return Packed(chosen[::-1], [*folder.skipped, *skipped])


def pack_before(
    folder: Folder,
    own: str | None,
    text: str,
    *,
    budget: int,
    n_tokens: Callable[[str], int],
    most_prompt: int,
    prompt_tokens: Callable[[str], int],
) -> tuple[str, Packed]:
    """(the text to put before a prompt, its pieces): like `pack`, with a limit on the whole prompt.

    It ends with the header of `own`, so the prompt's text looks like the files before it. "" if no file fits.

    prompt_tokens  counts the tokens of the whole prompt after a given text; at most most_prompt
    """
    title = header(own) if own else ""
    budget = min(budget, most_prompt - prompt_tokens(title) - MARGIN)
    while budget > 0:
        packed = pack(folder, own, text, budget=budget, n_tokens=n_tokens)
        before = packed.text + title if packed.pieces else ""
        excess = prompt_tokens(before) - most_prompt
        if excess <= 0 or not before:
            return before, packed
        budget -= excess + MARGIN
    return "", Packed(skipped=list(folder.skipped))


def _framed(path: str, text: str) -> str:
    return header(path) + text.strip("\n") + "\n\n\n"


def _away(steps: int) -> str:
    return "same folder" if steps == 0 else "1 folder away" if steps == 1 else f"{steps} folders away"
