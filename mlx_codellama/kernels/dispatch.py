"""Which backend runs, which path each op took, and whether falling back is allowed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

from mlx_codellama import env
from mlx_codellama.errors import BackendError

P = ParamSpec("P")
R = TypeVar("R")

INTERFACE = 8  # of mlx_codellama_cpu.ops: the functions there, and how they are called

_PATHS: dict[str, dict[str, int]] = {}  # op → path → how often
_REMEMBERED: list[functools._lru_cache_wrapper[Any]] = []
REINSTALL = "install the native kernels that belong to it with: pip install ./csrc, in its checkout"
_simulated = ""  # the backend that tests have put in the place of this machine's


class KernelWarning(RuntimeWarning):
    """A kernel is left aside."""


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """functools.cache for what hangs on the backend, such as built kernels: `simulate` forgets it on both ends.

    Every `mx.fast.metal_kernel` is built at its first use, inside a function that carries this decorator.
    """
    cached = functools.lru_cache(maxsize=None)(function)
    _REMEMBERED.append(cached)
    return cached  # type: ignore[return-value]  # the same call, with a cache_clear besides


def _forget() -> None:
    for cached in _REMEMBERED:
        cached.cache_clear()


@contextlib.contextmanager
def simulate(name: str) -> Iterator[None]:
    """Inside, `backend()` is `name` whatever MLX computes on, so ops take that backend's paths.

    For tests that put a simulator in the place of MLX's kernels (tools/metal_sim); MLX's own ops go on computing on
    the machine's device.
    """
    global _simulated
    before, _simulated = _simulated, name
    _forget()
    try:
        yield
    finally:
        _simulated = before
        _forget()


@remembered
def backend() -> str:
    """The backend that MLX computes on: metal, cuda or cpu. MLX_CODELLAMA_REQUIRE turns any other into an error."""
    gpu = "metal" if sys.platform == "darwin" else "cuda"
    name = _simulated or ("cpu" if mx.default_device() == mx.Device(mx.cpu) else gpu)
    required = env.get(env.REQUIRE)
    if required not in ("", "metal", "cuda", "cpu"):
        raise BackendError(f"{env.REQUIRE.name} is {required!r}", hint="use metal, cuda or cpu")
    if required == "cpu" and name != "cpu" and not _simulated:
        mx.set_default_device(mx.Device(mx.cpu))
        name = "cpu"
    if required and required != name:
        raise BackendError(f"{required} is required, but MLX runs on {name} here", hint="see `mlx-codellama doctor`")
    return name


_inherited = False  # this process was forked from one in which MLX was at work


def _forked() -> None:
    global _inherited
    _inherited = _inherited or backend.cache_info().currsize > 0  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def check_process() -> None:
    """Raises BackendError in a child of os.fork() whose parent had used MLX: it would wait for threads for ever."""
    if _inherited:
        raise BackendError(
            "this process was forked from one that had used MLX, whose threads do not survive a fork",
            hint="start processes with multiprocessing.get_context('spawn'), or fork before a model is loaded",
        )


@remembered
def native() -> ModuleType | None:
    """`mlx_codellama_cpu.ops`, or None: not on the CPU, not installed, switched off with MLX_CODELLAMA_NATIVE=0, or of
    another version, which one warning says.

    Raises BackendError where MLX_CODELLAMA_REQUIRE=cpu asks for it and it cannot be had.
    """
    if backend() != "cpu" or sys.platform != "linux":
        return None
    ops, why = _native_ops()
    if ops is not None and why and env.get(env.REQUIRE) != "cpu":
        warnings.warn(f"{why}. MLX's own kernels run instead, slower; {REINSTALL}", KernelWarning, stacklevel=4)
    if why and env.get(env.REQUIRE) == "cpu":
        raise BackendError(f"the native CPU kernels are required: {why}", hint=REINSTALL)
    return None if why else ops


def native_state() -> str:
    """Why `native()` is None on a Linux CPU; empty where it is not, and on other backends."""
    return _native_ops()[1] if backend() == "cpu" and sys.platform == "linux" else ""


def native_missing() -> str:
    """Why the native kernels are not installed where this Linux CPU could have them; empty where they are, or where
    MLX_CODELLAMA_NATIVE=0 says that nobody wants them. One of another version is `native`'s own warning."""
    if backend() != "cpu" or sys.platform != "linux" or env.get(env.NATIVE) == "0":
        return ""
    ops, why = _native_ops()
    return why if ops is None else ""


def _native_ops() -> tuple[ModuleType | None, str]:
    """The module as far as it can be had, and why it cannot be used."""
    if env.get(env.NATIVE) == "0":
        return None, f"{env.NATIVE.name} is 0"
    try:
        ops = importlib.import_module("mlx_codellama_cpu.ops")
    except ImportError as error:
        if getattr(error, "name", None) == "mlx_codellama_cpu":
            return None, "the package mlx-codellama-cpu is not installed (pip install ./csrc, with a C++ compiler)"
        return None, str(error)
    found = getattr(ops, "INTERFACE", 1)
    if found == INTERFACE:
        return ops, ""
    age = "older" if found < INTERFACE else "newer"
    return ops, f"mlx-codellama-cpu is {age} than this mlx-codellama (its interface is {found}, not {INTERFACE})"


def native_float32(*arrays: mx.array) -> Any:
    """`native()` where all arrays are float32, which is what it computes; else None.

    Raises BackendError for another dtype where MLX_CODELLAMA_REQUIRE=cpu asks for the native kernels.
    """
    ops = native()
    other = next((a.dtype for a in arrays if a.dtype != mx.float32), None)
    if other is None or ops is None:
        return ops
    name = str(other).removeprefix("mlx.core.")
    fall_back(f"no native CPU kernel computes in {name}", hint="load with dtype='float32' (--dtype)")
    return None


def fall_back(why: str, *, hint: str = "") -> None:
    """Say that a native kernel is there but not for this input: a BackendError where MLX_CODELLAMA_REQUIRE=cpu."""
    if env.get(env.REQUIRE) == "cpu" and native() is not None:
        raise BackendError(why, hint=hint or f"without {env.REQUIRE.name}=cpu, MLX's own kernel runs")


def record(op: str, path: str, times: int = 1) -> None:
    """Count a path that an op takes, at trace time. Paths read `mlx`, `mlx.fast`, `native`, `metal`, `cuda`.

    times  how many layers take it in the one call
    """
    taken = _PATHS.setdefault(op, {})
    taken[path] = taken.get(path, 0) + times


def paths() -> dict[str, str]:
    """op → its path, for every op that ran since `forget_paths`; `native ×24, mlx ×1` where it took several."""
    return {op: _mixture(taken) for op, taken in sorted(_PATHS.items())}


def forget_paths() -> None:
    """Start counting from zero."""
    _PATHS.clear()


def _mixture(taken: dict[str, int]) -> str:
    if len(taken) == 1:
        return next(iter(taken))
    most_first = sorted(taken.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{path} ×{times}" for path, times in most_first)
