"""README tables come from the results: the renderer shows medians and spreads, and replaces only marked blocks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"
DATA = {
    "question": "speed",
    "command": "python benchmarks/speed.py",
    "commit": "abc",
    "machine": {"cpu": "Some CPU", "cores": 3, "memory_bytes": 5 << 30, "system": "Linux x86_64"},
    "versions": {"mlx": "0.1", "peer": "7"},
    "measurements": [
        {"name": "walk", "unit": "s", "median": 0.0712, "low": 0.07, "high": 1234.5, "n": 3, "target": "< 1 s"},
        {"name": "walk", "unit": "s", "median": 2.0, "low": 2.0, "high": 2.0, "n": 1, "peer": "peer"},
    ],
    "notes": ["On a busy machine."],
}


@pytest.fixture
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tables", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ours_and_the_peer_stand_in_one_row(tables: ModuleType) -> None:
    text = tables.table(DATA)
    assert "| walk | s | 0.0712 (0.0700 to 1,230) | < 1 s | 2.00 |" in text
    assert "Some CPU, 3 cores, 5 GiB" in text
    assert "On a busy machine." in text


def test_only_marked_blocks_change_and_a_second_run_changes_nothing(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps(DATA))
    before = "a\n<!-- results:speed -->\nold\n<!-- end results -->\nb\n"
    after = tables.render(before, tmp_path)
    assert "old" not in after
    assert after.startswith("a\n")
    assert after.endswith("<!-- end results -->\nb\n")
    assert tables.render(after, tmp_path) == after


def test_a_missing_result_is_an_error(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tables.render("<!-- results:none -->\n<!-- end results -->", tmp_path)
