"""exact=True and --exact: the activations stay in float32, in every command and call that has the choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_codellama import load
from mlx_codellama.cli import bench
from mlx_codellama.config import load_config
from mlx_codellama.kernels import dispatch

from .conftest import Run, document

ops = pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

pytestmark = pytest.mark.skipif(
    dispatch.native() is None or ops.isa() == "portable", reason="activations are always float32 there"
)

PROMPT = "def add(a, b):\n    return a +"
OPS = ("quant_matmul", "decoder_block")


@pytest.fixture
def quantised(run: Run, tiny: str, tmp_path: Path) -> str:
    out = tmp_path / "q4"
    result = run("quantize", tiny, out, "--bits", 4, "--group-size", 32)
    assert result.exit_code == 0, result.stderr
    return str(out)


def paths() -> list[str]:
    """What the two ops did since the last time."""
    taken = dispatch.paths()
    dispatch.forget_paths()
    return [taken.get(op, "not run") for op in OPS]


def test_commands_take_the_path_that_is_asked_for(run: Run, quantised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in (("complete", PROMPT), ("infill", "-"), ("chat", "--plain")):
        for words, path in (((), "native int8"), (("--exact",), "native")):
            paths()
            result = run(*args, "-m", quantised, "-n", 4, *words, input="a = <FILL_ME>\n")
            assert result.exit_code == 0, result.stderr
            assert paths() == [path, path], (args, words)
    for words, path in (((), "native int8"), (("--exact",), "native")):
        monkeypatch.setitem(bench.GEOMETRIES, "7b", replace(load_config(Path(quantised)), quantization=None))
        for what in ((quantised,), ("--geometry", "7b", "--group-size", 32)):
            got = document(run("bench", *what, "--prompt", 5, "--tokens", 2, "--json", *words))
            assert [got["paths"][op] for op in OPS] == [path, path], what
            assert got["exact"] == bool(words)


def test_calls_take_the_path_that_is_asked_for_and_differ_a_little(quantised: str) -> None:
    ids, found = [1, 5, 9, 33, 7], {}
    for exact, path in ((False, "native int8"), (True, "native")):
        m = load(quantised, exact=exact)
        paths()
        found[exact] = m.logits(ids)
        assert paths()[0] == path
        m.complete(PROMPT, max_tokens=3)
        assert paths() == [path, path]
    difference = np.abs(found[True] - found[False]).max()
    assert 0 < difference < 1e-2 * np.abs(found[True]).max()
