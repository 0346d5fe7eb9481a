"""Tables of benchmarks/results/*.json as Markdown.

    python benchmarks/tables.py          print docs/measured.md
    python benchmarks/tables.py --write  write docs/measured.md, and the tables inside the demo model's card

Inside a page a table stands between `<!-- results: NAME -->` and `<!-- end -->`. NAME is the file's name without
`.json`. benchmarks/README.md lists the keys of a result file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mlx_codellama.staging import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "docs" / "measured.md"
CARD = ROOT / "mlx_codellama" / "demo" / "README.md"
SECTIONS = {  # heading: patterns of names; a result belongs to the first section that matches, else to the last
    "Start": ["startup"],
    "Generating": ["decode-*", "many*", "lookup*", "contention*"],
    "Reading prompts": ["prefill-*", "attention-*", "quant_matmul*"],
    "Memory": ["long_context*"],
    "Quality": ["exactness*", "kv_quality*", "demo_quality*"],
    "Conversion": ["convert-*"],
    "Training": ["train_step*"],
    "GPU kernels": ["metal_requests*", "attention_gpu*"],
    "More": ["*"],
}
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


def measured(results: Path = RESULTS) -> str:
    """docs/measured.md: the table of every result file, by section."""
    lines = [
        "# Measured",
        "",
        "Generated from `benchmarks/results` by `make docs`; do not edit it. Below each table stand the command,",
        "the commit and the machine. Unless a row says otherwise, weights are random, at the dimensions named. Rows",
        "called `peer` are other programs, measured in the same run. [How to measure](../benchmarks/README.md).",
        "",
    ]
    left = sorted(results.glob("*.json"))
    for heading, patterns in SECTIONS.items():
        here = [path for path in left if any(path.match(f"{pattern}.json") for pattern in patterns)]
        left = [path for path in left if path not in here]
        if here:
            lines += [f"## {heading}", ""]
            lines += [table(json.loads(path.read_text(encoding="utf-8"))) for path in here]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        write_file(MEASURED, measured().encode())
        write_file(CARD, filled(CARD.read_text(encoding="utf-8")).encode())
    elif not arguments:
        print(measured(), end="")
    else:
        sys.exit("usage: tables.py [--write]")


if __name__ == "__main__":
    main(sys.argv[1:])
