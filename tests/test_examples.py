"""Every example runs on the bundled demo model, and is short enough to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DEMO = ROOT / "mlx_codellama" / "demo"
ARGUMENTS = {"chat.py": [], "complete.py": [], "infill.py": [], "token_ids.py": []}
HOLES = {"stack.py"}  # not Python until filled


def run(command: list[str]) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys() | HOLES


def test_examples_are_short() -> None:
    for path in EXAMPLES.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_example_runs(name: str) -> None:
    assert run([sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]]).strip()


def test_token_ids_takes_the_folder_that_is_named() -> None:
    named = run([sys.executable, str(EXAMPLES / "token_ids.py"), str(DEMO)])
    assert named == run([sys.executable, str(EXAMPLES / "token_ids.py")])


def test_the_demo_shows_the_hole_and_then_python_without_it() -> None:
    out = run(["sh", "examples/demo.sh"])
    before, _, after = out.partition("── mlx-codellama infill")
    assert "<FILL_ME>" in before
    filled = after.partition("\n")[2].partition("\n──")[0]
    assert "<FILL_ME>" not in filled
    compile(filled, "stack.py", "exec")
    assert "\n        self.items.append(item)\n" in filled  # what follows the hole is not written again
    assert "\n+        self.items.append(item)\n" in after  # the diff
    last, ended = after.rpartition("──")[0::2]
    assert last.rpartition("──")[2].partition("\n")[2].startswith("append(item)\n")  # without what follows, it is
    assert ". .venv/bin/activate, then mlx-codellama --help" in ended  # how to reach the command
