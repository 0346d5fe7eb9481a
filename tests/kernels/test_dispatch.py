"""Dispatch: which path an op takes is recorded, and a required backend never falls back without an error."""

from __future__ import annotations

import inspect
import json
import sys
import zlib
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_codellama.cli import doctor
from mlx_codellama.cli.group import group
from mlx_codellama.errors import BackendError
from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.kv_attention import kv_attention
from mlx_codellama.kernels.quant_matmul import quant_matmul
from mlx_codellama.kernels.rms_norm import rms_norm
from mlx_codellama.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="paths of the CPU backend")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What dispatch found out about the machine is forgotten before and after each test."""
    for cached in (dispatch.backend, dispatch.native):
        cached.cache_clear()
    yield
    for cached in (dispatch.backend, dispatch.native):
        cached.cache_clear()


def test_the_path_of_an_op_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_NATIVE", "0")
    rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)
    assert dispatch.paths() == {"rms_norm": "mlx.fast"}
    monkeypatch.delenv("MLX_CODELLAMA_NATIVE")
    dispatch.native.cache_clear()
    dispatch.forget_paths()
    rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)
    assert dispatch.paths()["rms_norm"] == ("mlx.fast" if dispatch.native() is None else "native")


def test_several_paths_of_an_op_are_counted_the_most_frequent_first() -> None:
    dispatch.record("rope", "mlx")
    dispatch.record("rope", "native", 22)
    dispatch.record("rope", "native", 2)
    dispatch.record("swiglu", "native", 7)
    assert dispatch.paths() == {"rope": "native ×24, mlx ×1", "swiglu": "native"}
    dispatch.forget_paths()
    assert dispatch.paths() == {}


def test_native_kernels_that_are_switched_off_are_an_error_where_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_NATIVE", "0")
    assert dispatch.native() is None
    dispatch.native.cache_clear()
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
    with pytest.raises(BackendError, match="MLX_CODELLAMA_NATIVE is 0"):
        rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)


def test_native_kernels_that_are_absent_are_an_error_where_required(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    assert dispatch.native() is None
    dispatch.native.cache_clear()
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
    with pytest.raises(BackendError, match="no mlx_codellama_cpu"):
        swiglu(mx.ones(4), mx.ones(4))


def test_doctor_shows_the_instruction_set_and_the_threads() -> None:
    ops = dispatch.native()
    if ops is None:
        pytest.skip("no native kernels")
    shown = CliRunner().invoke(group, ["doctor"])
    assert f"used: {ops.isa()}, threads: {ops.threads()}" in shown.stdout
    document = json.loads(CliRunner().invoke(group, ["doctor", "--json"]).stdout.splitlines()[-1])
    assert (document["native"], document["instruction_set"], document["threads"]) == ("used", ops.isa(), ops.threads())


def test_doctor_says_what_a_pure_install_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finder that finds no mlx_codellama_cpu, as where there was no compiler."""
    monkeypatch.delenv("MLX_CODELLAMA_NATIVE", raising=False)
    for name in [n for n in sys.modules if n.startswith("mlx_codellama_cpu")]:
        monkeypatch.delitem(sys.modules, name)
    found = PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda n, *a: None if n == "mlx_codellama_cpu" else found(n, *a))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in str(f).lower()])
    shown = CliRunner().invoke(doctor.command, [])
    assert shown.exit_code == 0
    assert "not used: the package mlx-codellama-cpu is not installed (pip install ./csrc" in shown.stdout


@pytest.mark.parametrize(("interface", "age"), [(None, "older"), (dispatch.INTERFACE + 1, "newer")])
def test_native_kernels_of_another_version_are_left_aside(
    monkeypatch: pytest.MonkeyPatch, interface: int | None, age: str
) -> None:
    """One warning, and MLX computes; an error where they are required. An older module has no number at all."""
    monkeypatch.delenv("MLX_CODELLAMA_NATIVE", raising=False)
    other = SimpleNamespace() if interface is None else SimpleNamespace(INTERFACE=interface)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: other)
    with pytest.warns(dispatch.KernelWarning, match=f"{age} than this mlx-codellama.*pip install") as caught:
        rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)
    assert len(caught) == 1
    rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)  # warnings are errors here: nothing more is said
    assert dispatch.paths()["rms_norm"] == "mlx.fast"
    assert age in dispatch.native_state()
    shown = CliRunner().invoke(doctor.command, [])
    assert shown.exit_code == 0
    assert f"not used: mlx-codellama-cpu is {age}" in " ".join(shown.stdout.split())
    dispatch.native.cache_clear()
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
    with pytest.raises(BackendError, match=age) as refused:
        rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)
    assert "pip install" in refused.value.hint


def test_a_change_of_the_native_functions_changes_their_number() -> None:
    """Where this fails: raise INTERFACE in mlx_codellama_cpu/ops.py and in dispatch, then write the new sum here."""
    ops = pytest.importorskip("mlx_codellama_cpu.ops")
    signatures = sorted(f"{name}{inspect.signature(f)}" for name, f in vars(ops).items() if inspect.isfunction(f))
    assert ops.INTERFACE == dispatch.INTERFACE
    assert (ops.INTERFACE, zlib.crc32("\n".join(signatures).encode())) == (8, 709055204)


def test_a_type_that_no_native_kernel_has_is_an_error_where_required(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.native() is None:
        pytest.skip("mlx-codellama-cpu is not installed")
    half = mx.ones((2, 3), mx.bfloat16)
    rms_norm(half, half[0], 1e-5)  # allowed where nothing is required
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
    dispatch.native.cache_clear()
    rms_norm(mx.ones((2, 3)), mx.ones(3), 1e-5)
    with pytest.raises(BackendError, match="bfloat16"):
        rms_norm(half, half[0], 1e-5)


def test_an_input_that_no_native_kernel_takes_is_an_error_where_required(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.native() is None:
        pytest.skip("mlx-codellama-cpu is not installed")
    wide = mx.ones((1, 2, 3, 257))  # heads wider than the native attention takes
    weight, *rest = mx.quantize(mx.ones((5, 64)), bits=3)  # no native product has 3 bits

    def attend() -> mx.array:
        return kv_attention(wide, wide[:, :1], wide[:, :1], scale=0.1, offset=0)

    def multiply() -> mx.array:
        return quant_matmul(mx.ones((2, 64)), weight, *rest, group_size=64, bits=3, mode="affine")

    assert attend().shape == (1, 2, 3, 257)  # allowed where nothing is required
    assert multiply().shape == (2, 5)
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
    with pytest.raises(BackendError, match="at most 256, not 257") as caught:
        attend()
    assert "MLX's own kernel" in caught.value.hint
    with pytest.raises(BackendError, match="3-bit affine"):
        multiply()


@pytest.mark.parametrize("wrong", ["metal", "cuda", "gpu"])
def test_a_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", wrong)
    with pytest.raises(BackendError) as caught:
        dispatch.backend()
    assert caught.value.hint


def test_a_simulated_backend_is_taken_inside_and_forgotten_after(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    @dispatch.remembered
    def kernel() -> str:
        built.append(dispatch.backend())
        return built[-1]

    here = dispatch.backend()
    assert [kernel(), kernel()] == [here, here]
    with dispatch.simulate("metal"):
        assert dispatch.backend() == "metal"
        assert dispatch.native() is None  # these compute on the CPU
        assert [kernel(), kernel()] == ["metal", "metal"]
        monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
        dispatch.backend.cache_clear()
        assert dispatch.backend() == "metal"
        monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "cpu")
        dispatch.backend.cache_clear()
        with pytest.raises(BackendError, match="on metal"):
            dispatch.backend()
        monkeypatch.delenv("MLX_CODELLAMA_REQUIRE")
    assert dispatch.backend() == here
    assert kernel() == here
    assert built == [here, "metal", here]  # once each: a kernel built for one backend never runs on another
