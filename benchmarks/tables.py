"""Render benchmarks/results/*.json as Markdown tables.

    python benchmarks/tables.py                      all tables on stdout
    python benchmarks/tables.py --write README.md    replace what stands between the markers
    python benchmarks/tables.py --check README.md    fail where a table is not what the results say

Markers, NAME being a result's file name without .json:  <!-- results:NAME -->  …  <!-- end results -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- end results -->)", re.DOTALL)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:e}".partition("e")[2]))
    return f"{float(f'{value:.3g}'):,.{digits}f}"


def table(data: dict[str, Any]) -> str:
    """One row per measurement name, ours beside each peer; a line below says where and how it was measured."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for m in data["measurements"]:
        rows.setdefault((m["name"], m["unit"]), {})[m.get("peer", "ours")] = m
    peers = [p for p in dict.fromkeys(m.get("peer", "ours") for m in data["measurements"]) if p != "ours"]
    targets = any("target" in m for m in data["measurements"])
    head = ["", "unit", "ours", *(["target"] if targets else []), *peers]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (name, unit), cells in rows.items():
        row = [name, unit, _cell(cells.get("ours"))]
        if targets:
            row.append(cells.get("ours", {}).get("target", ""))
        lines.append("| " + " | ".join([*row, *(_cell(cells.get(p)) for p in peers)]) + " |")
    m = data["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, {m['system']}"
    versions = ", ".join(f"{n} {v}" for n, v in data["versions"].items() if n in ("mlx", *peers))
    lines += ["", f"Median (lowest to highest) on {where}; {versions}; commit {data['commit']}; `{data['command']}`."]
    return "\n".join([*lines, *(f"{note}" for note in data.get("notes", []))]) + "\n"


def _cell(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    spread = f" ({number(m['low'])} to {number(m['high'])})" if m["n"] > 1 else ""
    return number(m["median"]) + spread


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every marked block replaced. Raises FileNotFoundError for a result that does not exist."""

    def block(match: re.Match[str]) -> str:
        data = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + table(data) + match[4]

    return _BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args()
    file = options.write or options.check
    if file is None:
        for path in sorted(RESULTS.glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            if "measurements" in data:
                sys.stdout.write(f"### {path.stem}\n\n{table(data)}\n")
        return 0
    old = file.read_text(encoding="utf-8")
    new = render(old)
    if options.write and new != old:
        file.write_text(new, encoding="utf-8")
    if options.check and new != old:
        sys.stderr.write(f"error: a table in {file} differs from benchmarks/results\nhint: make docs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
