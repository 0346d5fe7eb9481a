"""Tables of the README from benchmarks/results/*.json.

    python benchmarks/tables.py                    print every table
    python benchmarks/tables.py --write README.md  put each between its markers

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, NAME being the file's name without `.json`.
The keys of a result file are listed in benchmarks/README.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mlx_codellama.staging import write_file

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def number(value: float) -> str:
    """Three significant digits, whole numbers in full and grouped, no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    exponent = int(f"{value:.2e}".partition("e")[2])  # after rounding: 9.999 is 10.0
    return f"{value:.{2 - exponent}f}"


def table(result: dict[str, Any]) -> str:
    """One result file as Markdown: caption, rows, and where and how it was measured."""
    rows = result["rows"]
    notes = any(row.get("note") for row in rows)
    lines = [
        f"**{result['question']}**",
        "",
        "| | median | spread | unit |" + (" note |" if notes else ""),
        "| --- | ---: | ---: | --- |" + (" --- |" if notes else ""),
    ]
    for row in rows:
        spread = "–".join(number(value) for value in row["spread"]) if row.get("spread") else ""
        line = f"| {row['name']} | {number(row['median'])} | {spread} | {row['unit']} |"
        lines.append(line + (f" {row.get('note') or ''} |" if notes else ""))
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value not in (None, ""))
    named = " ".join(row["name"] for row in rows).replace("_", "-")
    peers = [name for name in ("mlx-lm", "transformers", "torch") if name in named]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in peers if name in result.get("versions", {}))
    lines += ["", f"`{result['command']}` at {result['commit']}: {machine}{'; ' + versions if versions else ''}."]
    lines += [*result.get("notes", []), ""]
    return "\n".join(lines)


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every marked block replaced by its table. Raises FileNotFoundError for a NAME without a file."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{table(result)}{match[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        page = Path(arguments[1])
        write_file(page, filled(page.read_text(encoding="utf-8")).encode())
    elif not arguments:
        for path in sorted(RESULTS.glob("*.json")):
            print(f"## {path.stem}\n\n{table(json.loads(path.read_text(encoding='utf-8')))}")
    else:
        sys.exit("usage: tables.py [--write FILE]")


if __name__ == "__main__":
    main(sys.argv[1:])
