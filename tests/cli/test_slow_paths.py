"""A model that a Linux CPU multiplies far slower than it could is announced once, with what to do about it."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_codellama import load
from mlx_codellama.config import GEOMETRIES
from mlx_codellama.kernels import dispatch
from mlx_codellama.memory import with_bits
from mlx_codellama.placement import place
from mlx_codellama.quant import apply, recipe
from mlx_codellama.weights import Checkpoint, save

from .conftest import Run, document

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="no native kernels that could be absent")
REAL, TINY = GEOMETRIES["1.1b"], replace(GEOMETRIES["1.1b"], num_hidden_layers=1, vocab_size=64)


@pytest.fixture(scope="module")
def three_bits(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = Checkpoint.open(tiny)
    out = tmp_path_factory.mktemp("q3") / "model"
    save(out, apply(recipe("q3", stream.args), stream))
    return out


def test_other_widths_and_large_models_are_slow_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(place(with_bits(REAL, bits)).why_slow() for bits in (2, 4, 16))
    monkeypatch.setattr(dispatch, "native_missing", lambda: "No module named 'mlx_codellama_cpu'")
    said = {bits: place(with_bits(REAL, bits)).why_slow() for bits in (2, 4, 16)}
    assert "no native CPU kernels (No module named 'mlx_codellama_cpu')" in said[2] == said[4]
    assert "pip install ./csrc" in said[4]
    assert said[16] == ""  # MLX's BLAS multiplies by floats
    assert place(with_bits(TINY, 4)).why_slow() == ""  # nobody waits for it
    assert place(with_bits(TINY, 3)).why_slow() == said[4]


def test_codes_that_fit_only_as_they_are_stored_are_announced() -> None:
    assert "held as 4 or 8 they would not fit" in place(with_bits(REAL, 3)).as_stored().why_slow()
    assert "take a model of 4 bits" in place(with_bits(REAL, 3)).as_stored().why_slow()
    assert place(with_bits(REAL, 4)).as_stored().why_slow() == ""


def test_kernels_that_are_switched_off_or_of_another_version_are_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"no {name}")

    assert dispatch.native_missing() == ""
    ops = dispatch.importlib.import_module("mlx_codellama_cpu.ops")
    monkeypatch.setattr(ops, "INTERFACE", 1)  # that one `native` warns of
    assert dispatch.native_missing() == ""
    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    assert dispatch.native_missing() == "no mlx_codellama_cpu.ops"
    monkeypatch.setenv("MLX_CODELLAMA_NATIVE", "0")
    assert dispatch.native_missing() == ""


def test_load_warns_once_and_a_command_says_it_as_a_note(
    three_bits: Path, tmp_path: Path, spawn: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(three_bits)
    stub = tmp_path / "mlx_codellama_cpu"
    stub.mkdir()
    (stub / "__init__.py").write_text("raise ImportError('not built here')")
    done = spawn("complete", "x", "-m", three_bits, "-n", 2, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: no native CPU kernels (not built here): ")
    assert done.stderr.count("native") == 2
    assert "KernelWarning" not in done.stderr


def test_plan_says_it_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("plan", "--geometry", "1.1b", "--bits")
    assert "codes of 2 and 3 bits are held as 4, of 5 and 6 as 8" in run(*ask, 4).stdout  # as the table has them
    assert document(run(*ask, 4, "--json"))["slow"] == ""
    monkeypatch.setattr(dispatch, "native_missing", lambda: "not built here")
    assert "Slow here: no native CPU kernels (not built here)" in run(*ask, 4).stdout
    assert "not built here" in document(run(*ask, 4, "--json"))["slow"]


def test_quantize_tells_what_such_codes_take_in_memory(run: Run, tiny: str, tmp_path: Path) -> None:
    three, four = (run("quantize", tiny, tmp_path / name, "--recipe", name) for name in ("q3", "q4"))
    got = document(run("quantize", tiny, tmp_path / "again", "--recipe", "mixed", "--json"))
    model = load(tmp_path / "again").model
    assert got["held_bytes"] == sum(array.nbytes for _, array in model.named_parameters())
    assert "in memory " in three.stdout
    assert "in memory " not in four.stdout
