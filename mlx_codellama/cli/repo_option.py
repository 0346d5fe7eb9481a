"""`--repo`: files of a repository before the text to be continued or filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output

if TYPE_CHECKING:
    from mlx_codellama.repository import Packed, Skipped

NOTES = 8  # reasons for skipping files that are listed
NAMES = 5  # files named with each

repo_options = options.stack(
    click.option(
        "--repo", type=options.ExistingPath(file_okay=False), metavar="DIR",
        help="Put files of this project before the text: first what it imports, then what is nearest. They are listed "
        "on stderr.",
    ),
    click.option(
        "--repo-tokens", type=click.IntRange(min=1), default=4096, show_default=True,
        help="With --repo: use at most this many tokens for other files, fewer if the context has less room.",
    ),
)  # fmt: skip


def say(packed: Packed) -> None:
    """List the files on stderr, in the order of the prompt, with tokens and reason."""
    n = output.counted(len(packed.pieces), "file")
    output.say(f"repo: {n}, {packed.tokens:,} tokens; the last is nearest to the cursor")
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
    return [why if names[0] == "" else f"{_listed(names)} skipped: {why}" for why, names in reasons.items()]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def document(packed: Packed | None) -> dict[str, Any]:
    """The part of a `--json` document that tells of --repo."""
    if packed is None:
        return {}
    return {"repository": [{"path": piece.path, "tokens": piece.tokens, "why": piece.why} for piece in packed.pieces]}
