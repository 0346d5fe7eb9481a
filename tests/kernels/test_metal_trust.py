"""Trust in real kernels in the simulator: a broken one is found at its first use, and answers stay right."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from metal_sim import on_metal

from mlx_codellama.cli import doctor
from mlx_codellama.errors import BackendError
from mlx_codellama.kernels import dispatch, kv_attention_rows, rope_append
from mlx_codellama.kernels.gpu import catalogue, kernel, trust
from mlx_codellama.kernels.gpu.source import KernelText, kernel_text
from mlx_codellama.kernels.packed_kv import RowFormat

FMT = RowFormat(64, 8, 4)
WRONG = ("kv_attention_lanes", "score = k_scale * score", "score = k_offset * score")
NO_METAL = ("kv_attention_lanes", "float score = 0;", "floot score = 0;")
RACE = ("kv_attention_lanes", "threadgroup_barrier(", "simdgroup_barrier(")
Breaker = Callable[[tuple[str, str, str]], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Breaker:
    """Put a mistake into a kernel; verdicts go to a folder of the test."""
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))

    def breaks(mistake: tuple[str, str, str]) -> None:
        name, old, new = mistake

        def text(language: str, file: str, asked: str) -> KernelText:
            found = kernel_text(language, file, asked)
            assert asked != name or old in found.body
            return found._replace(body=found.body.replace(old, new)) if asked == name else found

        monkeypatch.setattr(kernel, "kernel_text", text)
        dispatch._forget()

    return breaks


def attend() -> tuple[mx.array, mx.array]:
    """What the op gives, and its reference."""
    mx.random.seed(4)
    k, v = mx.random.normal((1, 2, 39, 64)), mx.random.normal((1, 2, 39, 64))
    q, rows = mx.random.normal((1, 4, 1, 64)), FMT.pack(k, v)
    got = kv_attention_rows.kv_attention_rows(q, rows, FMT, scale=0.2, offset=38)
    return got, kv_attention_rows.reference(q, rows, FMT, scale=0.2, offset=38)


def close(pair: tuple[mx.array, mx.array]) -> bool:
    return bool((mx.abs(pair[0] - pair[1]).max() < 1e-5).item())


@pytest.mark.parametrize(
    ("mistake", "said"), [(WRONG, "differs from the reference"), (NO_METAL, "floot"), (RACE, "nobody has written|race")]
)
def test_a_broken_kernel_is_replaced_by_pure_mlx(broken: Breaker, mistake: tuple[str, str, str], said: str) -> None:
    if mistake == RACE and platform.system() == "Darwin":
        pytest.skip("on a GPU a race may go well")
    for launches in (True, False):  # tried, then remembered by the next process
        broken(mistake)
        with on_metal() as sim:
            with pytest.warns(trust.KernelWarning, match=f"kv_attention_lanes<float32.*({said})") as caught:
                both = [attend(), attend()]
            assert all(map(close, both))
            assert len(caught) == 1
            assert dispatch.paths()["kv_attention_rows"] == "mlx"
            # A finding of the simulator is no word of a compiler: the next process tries again.
            assert platform.system() == "Darwin" or bool(sim.traced) == (launches or mistake == RACE)


def test_a_mended_kernel_is_trusted_again(broken: Breaker) -> None:
    broken(WRONG)
    with on_metal(checked=False), pytest.warns(trust.KernelWarning):
        attend()
    broken(("kv_attention_lanes", "", ""))
    dispatch.forget_paths()
    with on_metal(checked=False):
        assert close(attend())
        assert dispatch.paths()["kv_attention_rows"] == "metal"


def test_a_broken_kernel_is_an_error_where_metal_is_required(broken: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(NO_METAL)
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    with on_metal(checked=False), pytest.raises(BackendError, match="kv_attention_lanes") as caught:
        attend()
    assert "doctor --kernels" in caught.value.hint


def test_one_broken_kernel_leaves_the_others_in_use(broken: Breaker) -> None:
    broken(("rope_append", "b * c + a * s", "b * c - a * s"))
    q, k = mx.random.normal((1, 4, 2, 64)), mx.random.normal((1, 2, 2, 64))
    angle = mx.random.uniform(shape=(2, 32))
    with on_metal(checked=False):
        with pytest.warns(trust.KernelWarning, match="rope_append<float32"):
            got = rope_append.rope_append(q, k, k, mx.cos(angle), mx.sin(angle), FMT)
        assert close(attend())
        assert dispatch.paths()["kv_attention_rows"] == "metal"
        assert dispatch.paths()["rope_append"] == "mlx"
    want = rope_append.reference(q, k, k, mx.cos(angle), mx.sin(angle), FMT)
    assert close((got[0], want[0]))
    assert (got[1] == want[1]).all().item()


def test_doctor_shows_what_each_kernel_does(broken: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(WRONG)
    monkeypatch.setattr(catalogue, "DTYPES", (mx.float16,))
    monkeypatch.setattr(catalogue, "WIDTHS", ((4, 4),))
    monkeypatch.setattr(catalogue, "QUERY_ROWS", (1, 8))
    with on_metal(checked=False):
        shown = CliRunner().invoke(doctor.command, ["--kernels"])
        written = CliRunner().invoke(doctor.command, ["--kernels", "--json"])
    assert shown.exit_code == written.exit_code == 1
    assert "rope_append<float16, D128, K4 V4>" in shown.stdout
    assert "of the allowed error" in shown.stdout
    kernels = {entry["kernel"]: entry for entry in json.loads(written.stdout)["kernels"]}
    failed = [name for name, entry in kernels.items() if not entry["passed"]]
    assert len(kernels) == 7  # rope_append; lanes and tiles, of segments and of a window too
    assert failed == [f"kv_attention_lanes<float16, D128, K4 V4, 1 rows{end}>" for end in ("", ", window")]
    assert "differs from the reference" in kernels["kv_attention_lanes<float16, D128, K4 V4, 1 rows>"]["error"]
    assert "kv_attention_lanes" in written.stderr


def test_doctor_says_where_there_is_no_gpu() -> None:
    if dispatch.backend() != "cpu":
        pytest.skip("there is a GPU")
    shown = CliRunner().invoke(doctor.command, ["--kernels"])
    assert "no GPU here" in shown.stdout
