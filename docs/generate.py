"""Write the generated pages of docs/: `python docs/generate.py` (or `make docs`). tests/test_docs.py compares them."""

from __future__ import annotations

from pathlib import Path

from mlx_codellama import env

DOCS = Path(__file__).resolve().parent


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
    """docs/cli.md: the help of every command."""
    from mlx_codellama.cli.pages import markdown

    return markdown()


PAGES = {"env.md": env_page, "cli.md": cli_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
