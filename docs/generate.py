"""Write the generated pages of docs/: `python docs/generate.py` (or `make docs`). tests/test_docs.py compares them."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_codellama import env
from mlx_codellama.cli.group import VERBS, group
from mlx_codellama.staging import write_file

DOCS = Path(__file__).resolve().parent
WIDTH = 100  # columns of the help in cli.md


def env_page() -> str:
    """docs/env.md: every environment variable the package reads."""
    lines = [
        "# Environment variables",
        "",
        "Generated from `mlx_codellama/env.py` by `make docs`; edit that table, not this page.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
    ]
    for variable in env.VARIABLES:
        default = f"`{variable.default}`" if variable.default else "unset"
        lines.append(f"| `{variable.name}` | {default} | {variable.meaning.replace('|', chr(92) + '|')} |")
    lines += [
        "",
        "Downloads go through huggingface_hub, which has variables of its own, such as `HF_HOME` for its cache.",
    ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """docs/cli.md: the help of every command. It does not depend on the terminal it is made in."""
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
        "| 2 | usage error |",
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


PAGES = {"env.md": env_page, "cli.md": cli_page}


def main() -> None:
    for name, page in PAGES.items():
        write_file(DOCS / name, page().encode())


if __name__ == "__main__":
    main()
