"""The BLAS under MLX, seen from fresh processes: what is loaded is decided once per process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_codellama import blas

native = pytest.mark.skipif(
    importlib.util.find_spec("mlx_codellama_cpu") is None, reason="mlx-codellama-cpu is not installed (make ext)"
)


def run(code: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_CODELLAMA_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Pairwise different sizes; large enough to be cut into parts, odd, tiny and empty; every combination of transposes.
PRODUCTS = """
from mlx_codellama import blas
assert blas.ensure().active, blas.state()
import mlx.core as mx, numpy as np
rng = np.random.default_rng(5)
for m, n, k in [(129, 203, 67), (1, 515, 300), (700, 1, 31), (3, 2, 5), (0, 4, 3), (96, 640, 256)]:
    for ta in (0, 1):
        for tb in (0, 1):
            a = rng.standard_normal((k, m) if ta else (m, k), dtype=np.float32)
            b = rng.standard_normal((n, k) if tb else (k, n), dtype=np.float32)
            x, y = (a.T if ta else a), (b.T if tb else b)
            got = np.array((mx.array(a).T if ta else mx.array(a)) @ (mx.array(b).T if tb else mx.array(b)))
            want = x.astype(np.float64) @ y.astype(np.float64)
            bound = k * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(y)) + 1e-30
            assert got.shape == want.shape and (np.abs(got - want) <= bound).all(), (m, n, k, ta, tb)
print("libscipy_openblas" in open("/proc/self/maps").read())
"""


@native
@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_products_go_through_openblas_and_are_right_for_any_number_of_threads(threads: str) -> None:
    assert run(PRODUCTS, MLX_CODELLAMA_THREADS=threads).strip() == "True"


# Through ctypes, for MLX asks for one order of storage only: every order, transposition and stride of each function.
EVERY_FORM = """
import ctypes, itertools, sys
import numpy as np
from mlx_codellama import blas
assert blas.ensure().active
library = blas._library
rng = np.random.default_rng(3)
complex_ = np.complex64
worst = 0
for name, dtype in (("cblas_sgemm", np.float32), ("cblas_dgemm", np.float64), ("cblas_cgemm", complex_)):
    f = getattr(library, name)
    f.restype = None
    for (m, n, k), order, ta, tb, beta in itertools.product(
        [(130, 70, 65), (3, 200, 5)], (101, 102), (111, 112, 113), (111, 112), (0, 0.5)
    ):
        def matrix(rows, columns):  # with 3 elements between the end of a row, or column, and the next
            shape = (rows, columns + 3) if order == 101 else (columns, rows + 3)
            whole = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype is complex_ else 0)
            whole = whole.astype(dtype)
            return whole, whole[:, :columns] if order == 101 else whole[:, :rows].T
        a, a_ = matrix(*((m, k) if ta == 111 else (k, m)))
        b, b_ = matrix(*((k, n) if tb == 111 else (n, k)))
        c, c_ = matrix(m, n)
        op = {111: lambda x: x, 112: lambda x: x.T, 113: lambda x: x.conj().T}
        wide = np.complex128 if dtype is complex_ else np.float64
        want = 2 * (op[ta](a_).astype(wide) @ op[tb](b_).astype(wide)) + (beta * c_.astype(wide) if beta else 0)
        if not beta:
            c[:] = np.nan  # what is there must not count
        kept = c.copy()
        number = {np.float32: ctypes.c_float, np.float64: ctypes.c_double}.get(dtype)
        two = [np.array([x], dtype) for x in (2, beta)]
        alpha_, beta_ = (number(x[0]) for x in two) if number else (ctypes.c_void_p(x.ctypes.data) for x in two)
        at = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, c)]
        ld = [x.shape[1] for x in (a, b, c)]
        f(order, ta, tb, m, n, k, alpha_, at[0], ld[0], at[1], ld[1], beta_, at[2], ld[2])
        size = 1e-12 if dtype is np.float64 else 2e-5
        assert np.abs(c_ - want).max() < size * max(1, np.abs(want).max()), (name, m, order, ta, tb, beta)
        assert np.array_equal(c[:, -3:], kept[:, -3:], equal_nan=True)
print("right")
"""


@native
@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_form_of_the_three_functions_is_right(threads: str) -> None:
    assert run(EVERY_FORM, MLX_CODELLAMA_THREADS=threads).strip() == "right"


@native
@pytest.mark.parametrize("content", [b"", b"not a library", None], ids=["empty", "no library", "another library"])
def test_an_openblas_that_cannot_be_used_is_said_and_products_stay_right(content: bytes | None, tmp_path: Path) -> None:
    """None: a library that lacks the functions, as that of another version might."""
    folder = tmp_path / "scipy_openblas32" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "scipy_openblas32" / "__init__.py").touch()
    other = importlib.util.find_spec("_ctypes")
    assert other is not None
    assert other.origin
    (folder / blas.OPENBLAS).write_bytes(Path(other.origin).read_bytes() if content is None else content)
    code = EVERY_FORM + "print(blas.state().active, blas.state().reason)"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "MLX_CODELLAMA_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("right\nFalse plain products instead, for OpenBLAS cannot be used: ")
    assert str(folder) in found.stdout
    assert "pip install" in found.stdout
    assert found.stderr.count("\n") == 1  # once, though it was asked for many times
    assert "OpenBLAS cannot be used" in found.stderr


@native
def test_importing_mlx_first_warns_and_changes_nothing() -> None:
    out = run(
        "import warnings\n"
        "import mlx.core as mx\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from mlx_codellama import blas\n"
        "    blas.ensure()\n"
        "print(blas.state().active, [w.category.__name__ for w in seen])\n"
        "mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))\n"
        "print('libscipy_openblas' in open('/proc/self/maps').read())\n"
    )
    assert out.split() == ["False", "['RuntimeWarning']", "False"]


def test_it_can_be_switched_off() -> None:
    out = run(
        "from mlx_codellama import blas\nprint(blas.ensure().active, blas.state().reason)", MLX_CODELLAMA_BLAS="0"
    )
    assert out.startswith("False")


@native
def test_it_costs_less_than_15_ms_and_does_not_import_mlx() -> None:
    out = run(
        "import sys, time, warnings\n"
        "t = time.process_time()\n"
        "from mlx_codellama import blas\n"
        "blas.ensure()\n"
        "print(time.process_time() - t, 'mlx.core' in sys.modules, 'numpy' in sys.modules)\n"
    )
    seconds, mlx, numpy = out.split()
    assert (mlx, numpy) == ("False", "False")
    assert float(seconds) < 0.1  # CPU time: 4 ms on an idle machine; other processes count little
