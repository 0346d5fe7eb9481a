"""Memory and threads that the system refuses: an exception, in processes of their own, and never a crash."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

# Limits are set once everything is loaded and its threads have begun.
START = """
import resource
import mlx_codellama
import mlx.core as mx
from mlx_codellama.errors import refused_by_system
from mlx_codellama_cpu import ops
def right():
    return bool(mx.all(ops.rms_norm(mx.ones((512, 512)), mx.ones(512), 0.0) @ mx.ones((512, 512)) == 512).item())
assert right()
def size():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
def limit(n):
    resource.setrlimit(resource.RLIMIT_AS, (n, resource.RLIM_INFINITY))
def refused(work):
    held = mx.get_active_memory()
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        assert refused_by_system(error), error
        limit(resource.RLIM_INFINITY)
        return mx.get_active_memory() - held < 2**20 and right()
    return False
MB = 2**20
"""


def run(code: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.split()


# What is made before the limit, and what then asks for 400 MB.
WORK = {
    "an operation of MLX": ("x = mx.zeros(4 * MB)", "mx.concatenate([x] * 25)"),
    "one that MLX begins later": ("x = mx.zeros(4 * MB)", "mx.concatenate([x] * 25).sum() + 1"),
    "an operation of ours": ("x = mx.zeros(1, mx.int8)", "ops.zeros_like(x, [400 * MB])"),
    "one that needs a copy, on MLX's own thread": (
        "x, t = mx.zeros((1, 3, MB, 32))[..., ::2], mx.zeros((MB, 8)); mx.eval(t)",
        "ops.rope(x, t, t)",
    ),
}


@pytest.mark.parametrize("what", WORK)
def test_memory_that_the_system_does_not_give_is_an_exception_and_the_process_goes_on(what: str) -> None:
    made, work = WORK[what]
    assert run(f"{made}\nmx.eval(x)\nlimit(size() + 300 * MB)\nprint(refused(lambda: mx.eval({work})))") == ["True"]


def test_memory_that_the_kernels_threads_do_not_get_is_an_exception_too() -> None:
    """Each of 8 threads unpacks weights into memory of its own, the first time that it does so."""
    code = """
w, s, b = mx.quantize(mx.zeros((1024, 256)), group_size=64, bits=4)
x = mx.zeros((2048, 256))
mx.eval(w, s, b, x)
def work():
    mx.eval(ops.quant_matmul(x, w, s, b, group_size=64, bits=4, terms=2))
def within(extra):
    limit(size() + extra)
    return refused(work)
# First the result is too large, then what all threads share, then what some of them need.
found = [within(step * MB // 2) for step in range(40)]
print(found.count(True), found.count(False), found[-1])
"""
    refusals, successes, last = run(code, MLX_CODELLAMA_THREADS="8")
    assert int(refusals) > 3, successes
    assert last == "False"


def test_where_the_system_gives_no_more_threads_fewer_work() -> None:
    script = """
import resource, ctypes
from mlx_codellama import blas
library = ctypes.CDLL(blas._find("mlx_codellama_cpu", blas.FORWARDER), mode=ctypes.RTLD_GLOBAL)
vm = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (vm * 1024 + 40 * 2**20, resource.RLIM_INFINITY))
print(getattr(library, "_ZN3mcl7threadsEv")())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MLX_CODELLAMA_THREADS": "900"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 100  # of 2 MB each
