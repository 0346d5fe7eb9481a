"""The BLAS under MLX, seen from fresh processes: what is loaded is decided once per process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

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
