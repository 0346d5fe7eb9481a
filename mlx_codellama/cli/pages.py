"""docs/cli.md: the help of every command, as click prints it."""

from __future__ import annotations

import click

from mlx_codellama.cli.group import VERBS, group

WIDTH = 100


def markdown() -> str:
    """The page. It does not depend on the terminal it is made in."""
    parts = [
        "# Command line",
        "",
        "Generated from the commands' own help by `make docs`; edit the files in `mlx_codellama/cli/`, not this page.",
        "",
        "Data goes to stdout, everything else to stderr. With `--json` the last line of stdout is one compact JSON",
        "document. A failure is an `error:` line, mostly followed by a `hint:`, both on stderr.",
        "",
        "| exit status | meaning |",
        "| --- | --- |",
        "| 0 | done |",
        "| 1 | failed |",
        "| 2 | wrong use |",
        "| 130 | interrupted with Ctrl-C |",
        "| 141 | the reader of stdout went away |",
        "",
        *_section("mlx-codellama", group, None),
    ]
    with _context("mlx-codellama", group, None) as top:
        for verb in VERBS:
            command = group.get_command(top, verb)
            assert command is not None
            parts += _section(f"mlx-codellama {verb}", command, top)
    return "\n".join(parts).rstrip() + "\n"


def _context(name: str, command: click.Command, parent: click.Context | None) -> click.Context:
    settings = {"help_option_names": ["-h", "--help"], "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name.split()[-1], parent=parent, **settings)  # type: ignore[arg-type]


def _section(name: str, command: click.Command, parent: click.Context | None) -> list[str]:
    with _context(name, command, parent) as context:
        lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return [f"## {name}", "", "```text", *lines, "```", ""]
