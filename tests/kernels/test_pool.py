"""The thread pool under the native kernels, from processes of their own: its size, a fork, two callers at once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_codellama import blas

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


@pytest.mark.parametrize("wrong", ["0", "-2", "2x", "1.5", "many", "1025", "99999999999999999999"])
def test_a_number_of_threads_that_is_none_is_said_in_one_sentence_and_left_aside(wrong: str) -> None:
    environment = {**os.environ, "MLX_CODELLAMA_THREADS": wrong}
    code = "import mlx_codellama\nfrom mlx_codellama_cpu import ops\nprint(ops.threads(), ops.threads())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    threads = done.stdout.split()
    assert all(1 <= int(n) <= (os.cpu_count() or 1) for n in threads)
    said = f"MLX_CODELLAMA_THREADS is '{wrong}', not a number from 1 to 1024; using {threads[0]}\n"
    assert done.stderr == f"mlx_codellama_cpu: {said}"


def test_fewer_threads_run_where_fewer_cores_may_be_used() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{allowed[0]}}})\n"
    code += "import mlx_codellama\nfrom mlx_codellama_cpu import ops\nprint(ops.threads())"
    environment = {k: v for k, v in os.environ.items() if k != "MLX_CODELLAMA_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1"], done.stderr


# Of a process's control groups: /proc/self/cgroup, the files that limit, and how many cores they leave (0: no limit).
LIMITS = {
    "version 2, in a container": ("0::/\n", {"cpu.max": "150000 100000"}, 2),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000"}, 0),
    "version 2, of a service": ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "100000 100000"}, 1),
    "version 2, of the slice above": (
        "0::/a.slice/b.service\n",
        {"a.slice/b.service/cpu.max": "800000 100000", "a.slice/cpu.max": "300000 100000"},
        3,
    ),
    "version 1, in a container that sees the machine's paths": (
        "5:cpuset:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
        2,
    ),
    "version 1, its own mount": (
        "4:cpu,cpuacct:/low\n",
        {"cpu,cpuacct/low/cpu.cfs_quota_us": "400000", "cpu,cpuacct/low/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, no limit": (
        "1:cpu:/low\n",
        {"cpu/low/cpu.cfs_quota_us": "-1", "cpu/low/cpu.cfs_period_us": "100000"},
        0,
    ),
    "of another controller": (
        "2:cpuacct:/low\n",
        {"cpuacct/low/cpu.cfs_quota_us": "1", "cpuacct/low/cpu.cfs_period_us": "1"},
        0,
    ),
    "no such files": ("0::/../elsewhere\nnonsense\n3:cpu:nowhere\n", {}, 0),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_control_group_limits_the_threads(kind: str, tmp_path: Path) -> None:
    groups, files, cores = LIMITS[kind]
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    library = ctypes.CDLL(blas._find("mlx_codellama_cpu", blas.FORWARDER))
    assert library.mcl_cpu_limit(str(tmp_path / "groups").encode(), str(tmp_path / "fs").encode()) == cores
    assert library.mcl_cpu_limit(str(tmp_path / "absent").encode(), str(tmp_path / "fs").encode()) == 0


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
