"""The thread pool under the native kernels, from processes of their own: its size, a fork, two callers at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

START = """
import os, sys, threading
import mlx_codellama
import mlx.core as mx
import numpy as np
from mlx_codellama_cpu import ops
x = mx.random.normal((512, 4096), key=mx.random.key(1))  # long tasks: whoever does not wait for the last one is wrong
want = np.array(x / mx.sqrt(mx.mean(x * x, -1, keepdims=True) + 1e-5))
def right():
    return bool(np.abs(np.array(ops.rms_norm(x, mx.ones(4096), 1e-5)) - want).max() < 1e-5)
"""


def run(code: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("threads", ["1", "3", "7"])
def test_as_many_threads_work_as_are_asked_for(threads: str) -> None:
    assert run("print(right(), ops.threads())", MLX_CODELLAMA_THREADS=threads) == ["True", threads]


def test_without_a_number_there_is_a_thread_per_core_at_most() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MLX_CODELLAMA_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", START + "print(ops.threads())"], env=environment, capture_output=True, text=True
    )
    assert 1 <= int(done.stdout) <= (os.cpu_count() or 1)


def test_a_child_that_was_forked_has_a_pool_of_its_own() -> None:
    """Threads do not survive a fork; a child that waited for its parent's would wait for ever."""
    code = """
import ctypes, os, signal
from mlx_codellama import blas
library = ctypes.CDLL(blas._find("mlx_codellama_cpu", blas.FORWARDER), mode=ctypes.RTLD_GLOBAL)
library.mcl_blas_use(blas.ensure().library.encode())
import numpy as np
def wrong(n=768):
    a, b, c = (np.ones((n, n), np.float32) for _ in "abc")
    a_, b_, c_ = (ctypes.c_void_p(x.ctypes.data) for x in (a, b, c))
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    library.cblas_sgemm(101, 111, 111, n, n, n, one, a_, n, b_, n, zero, c_, n)
    return int((c != n).any())
print(sum(wrong() for _ in range(5)))  # looked at the moment it returns: nothing may be under way
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(wrong())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), wrong())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLX_CODELLAMA_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["0", "0", "0"], done.stderr


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_instruction_set_is_the_one_asked_for(isa: str) -> None:
    if isa == "avx2" and run("print(ops.isa())") == ["portable"]:
        pytest.skip("this machine has no AVX2")
    assert run("print(right(), ops.isa())", MLX_CODELLAMA_ISA=isa) == ["True", isa]


def test_two_callers_at_once_both_get_all_of_their_work() -> None:
    code = """
found = []
def work():
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        found.extend(right() for _ in range(20))
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print(all(found), len(found))
"""
    assert run(code, MLX_CODELLAMA_THREADS="4") == ["True", "60"]
