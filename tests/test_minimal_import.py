"""What an import costs: the package, its light modules and the command's help load nothing heavy.

Counted in modules, not in seconds: time on a busy machine says little, a stray `import numpy` in sys.modules says all.
The times themselves (0.05 s, 0.3 s) are in benchmarks/.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"mlx", "numpy", "sentencepiece", "huggingface_hub", "safetensors", "click", "rich", "torch", "transformers"}


def loaded_after(code: str) -> set[str]:
    """Names of the modules a fresh interpreter holds after running code, less what it holds without it."""
    report = "import sys, json; before = set(sys.modules)\n{}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", report.format(code)], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_importing_the_package_loads_nothing_heavy() -> None:
    modules = loaded_after("import mlx_codellama")
    assert not roots(modules) & HEAVY
    assert {name for name in modules if name.startswith("mlx_codellama")} == {
        f"mlx_codellama{name}" for name in ("", ".blas", ".env")
    }
    assert len(modules) < 20  # measured: 11, the rest Python's own (typing, ctypes); the tail is for other versions


@pytest.mark.parametrize("module", ["errors", "env", "config", "memory", "placement"])
def test_light_modules_load_no_array_library(module: str) -> None:
    assert not roots(loaded_after(f"import mlx_codellama.{module}")) & HEAVY


def test_the_commands_help_loads_click_and_no_array_library() -> None:
    code = (
        "import sys, io, contextlib; sys.argv = ['mlx-codellama', '--help']\n"
        "from mlx_codellama.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    )
    assert roots(loaded_after(code)) & HEAVY == {"click"}


def test_heavy_modules_are_noticed() -> None:
    # The check above would pass for ever if it looked at the wrong names.
    assert "numpy" in roots(loaded_after("import numpy"))


def test_a_public_name_is_fetched_once_and_kept() -> None:
    modules = loaded_after("import mlx_codellama\nassert mlx_codellama.NotSupported is mlx_codellama.NotSupported")
    assert "mlx_codellama.errors" in modules
    assert not roots(modules) & HEAVY
