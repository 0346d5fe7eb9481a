"""`--repo`: files of a repository before the text to be continued or filled."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output

if TYPE_CHECKING:
    from mlx_codellama.repository import Packed, Skipped

NOTES = 8  # reasons for skipping files, said on stderr
NAMES = 5  # files named with each

repo_options = options.stack(
    click.option(
        "--repo",
        type=options.ExistingPath(file_okay=False),
        metavar="DIR",
        help="Put files of this project before the text: what its file imports first, then the nearest. Listed on "
        "stderr.",
    ),
    click.option(
        "--repo-tokens",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        help="With --repo: at most this many tokens of other files, fewer where the context has less room.",
    ),
)


def with_repository(
    repo: Path,
    file: Path | None,
    text: str,
    n_tokens: Callable[[str], int],
    prompt_tokens: Callable[[str], int],
    most_repo: int,
    most_prompt: int,
) -> tuple[str, Packed]:
    """(what goes before the text, what it is made of); said on stderr.

    text           of the file being written, whole: its imports decide
    n_tokens       tokens of a piece of text
    prompt_tokens  tokens of the whole prompt with this before it
    most_repo      tokens for other files; most_prompt: for the whole prompt
    """
    from mlx_codellama.repository import pack_before, path_inside, read_folder

    own = None if file is None else path_inside(repo, file)
    folder = read_folder(repo, os.path.dirname(own or ""))
    before, packed = pack_before(
        folder, own, text, budget=most_repo, n_tokens=n_tokens, most_prompt=most_prompt, prompt_tokens=prompt_tokens
    )
    say(packed)
    return before, packed


def say(packed: Packed) -> None:
    """The files on stderr, in the order of the prompt, with tokens and reason."""
    n = len(packed.pieces)
    output.say(f"repo: {n} file{'' if n == 1 else 's'}, {packed.tokens:,} tokens; the last is nearest to the cursor")
    if packed.pieces:
        rows = [(f"{piece.tokens:,}", piece.path, piece.why) for piece in packed.pieces]
        output.say(output.table(("tokens", "file", "why"), rows))
    notes = _notes(packed.skipped)
    for text in notes[:NOTES]:
        output.note(text)
    if len(notes) > NOTES:
        output.note(f"more skipped, for {output.counted(len(notes) - NOTES, 'other reason')}")


def _notes(skipped: Sequence[Skipped]) -> list[str]:
    """One line for each reason, with the first names."""
    reasons: dict[str, list[str]] = {}
    for one in skipped:
        reasons.setdefault(one.why, []).append(one.path)
    notes = []
    for why, names in reasons.items():
        if names[0] == "":
            notes.append(why)
            continue
        listed = ", ".join(names[:NAMES])
        more = f" and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
        notes.append(f"{listed}{more} skipped: {why}")
    return notes


def document(packed: Packed) -> list[dict[str, Any]]:
    """For `--json`."""
    return [{"path": piece.path, "tokens": piece.tokens, "why": piece.why} for piece in packed.pieces]
