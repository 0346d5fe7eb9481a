"""The order in which files matter to the one being written, and how many of them fit a number of tokens."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_codellama.errors import printable
from mlx_codellama.repository.folder import Folder, Skipped
from mlx_codellama.repository.imports import distance, imported
from mlx_codellama.repository.names import CODE, kind_of

LEAST_TOKENS = 24  # what is left when looking for more is not worth it
MARGIN = 8  # tokens that pieces of text may take more when joined, and control ids
MOST_READ = 2_000  # files opened in all
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
    """A line of comment with the file's name, in the language of its ending. No name ends the comment or the line."""
    before, after = _COMMENTS.get(posixpath.splitext(path)[1].lower(), ("# ", ""))
    name = printable(path)
    for end in ("-->", "*/", "?>"):
        name = name.replace(end, f"{end[:-1]} {end[-1]}")
    return f"{before}{name}{after}\n"


def pack(folder: Folder, own: str | None, text: str, *, budget: int, n_tokens: Callable[[str], int]) -> Packed:
    """Choose files for the context of `own`, the file being written (relative to the folder), whose text is given.

    First what it imports, in its own order. Then code, by the number of folders between, files of its own ending first;
    then what is neither, settings, prose, licences and metadata, each in that order too. A file goes in whole or not at
    all; one that does not fit is passed over for the next. The same folder, file and budget give the same context.

    own       None where the text belongs to no file: then distances count from the root
    budget    tokens, as n_tokens counts those of one piece of text
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
    """(what goes before the text in a prompt, what it is made of): as `pack`, and the whole prompt keeps to a limit.

    The name of `own` stands at its end, so that the text follows as the files before it do. "" where no file fits.

    prompt_tokens  tokens of the whole prompt with this before it; at most most_prompt
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
