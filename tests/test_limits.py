"""Control groups and resource limits, from trees as machines have them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_codellama.limits import RESERVE_BYTES, Limit, control_groups
from mlx_codellama.memory import MachineMemory, Readings, machine_memory, this_machine

GB = 10**9
MEMINFO = "MemTotal:       32000000 kB\nMemFree:         100 kB\nMemAvailable:   24000000 kB\n"
WHOLE = MachineMemory(32_000_000 * 1024, 24_000_000 * 1024)
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
STAT = "anon 9\nfile 9\ninactive_file 500000000\nactive_file 400000000\nfile_dirty 70000000\nfile_writeback 30000000\n"


def group(folder: str, limit: int | str, used: int = 0, *, stat: str = "", high: int | str = "max") -> dict[str, str]:
    """The files of a group of version 2."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def old_group(folder: str, limit: int, used: int = 0, *, stat: str = "") -> dict[str, str]:
    """Of version 1, where 9223372036854771712 is no limit."""
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def read(files: dict[str, str], limits: dict[str, int] | None = None, budget: str = "") -> MachineMemory:
    readings = Readings("Linux", lambda argv: None, {"/proc/meminfo": MEMINFO, **files}.get, (limits or {}).get)
    return machine_memory(readings, budget=budget)


# What a process is told of its groups and mounts, the groups, and what it may hold and still take.
TREES: dict[str, tuple[str, str | None, dict[str, str], tuple[int, int] | None]] = {
    "version 2, a container with its own root": (
        "0::/\n",
        V2,
        group("/sys/fs/cgroup", 8 * GB, 5 * GB),
        (8 * GB, 3 * GB),
    ),
    "version 2, nothing limited": ("0::/\n", V2, group("/sys/fs/cgroup", "max", 5 * GB), None),
    "version 2, systemd-run -p MemoryMax=4G": (
        "0::/system.slice/run-u5.service\n",
        V2,
        group("/sys/fs/cgroup/system.slice/run-u5.service", 4 * GB, 1 * GB)
        | group("/sys/fs/cgroup/system.slice", "max"),
        (4 * GB, 3 * GB),
    ),
    "version 2, MemoryHigh of the slice above": (
        "0::/user.slice/app.scope\n",
        V2,
        group("/sys/fs/cgroup/user.slice/app.scope", 9 * GB, 1 * GB)
        | group("/sys/fs/cgroup/user.slice", "max", 5 * GB, high=7 * GB),
        (7 * GB, 2 * GB),
    ),
    "version 2, the group above is the fuller one": (
        "0::/a/b\n",
        V2,
        group("/sys/fs/cgroup/a/b", 2 * GB, 1 * GB) | group("/sys/fs/cgroup/a", 8 * GB, 7_900_000_000),
        (2 * GB, 100_000_000),
    ),
    "version 2, pages of files are free, unless they are to be written": (
        "0::/\n",
        V2,
        group("/sys/fs/cgroup", 8 * GB, 3 * GB, stat=STAT),
        (8 * GB, 5_800_000_000),
    ),
    "version 2, mounted elsewhere, the name escaped": (
        "0::/a\n",
        "31 23 0:28 / /run/my\\040groups rw - cgroup2 none rw\n",
        group("/run/my groups/a", 4 * GB, 1 * GB),
        (4 * GB, 3 * GB),
    ),
    "version 2, paths of another namespace": ("0::/../../job\n", V2, group("/sys/fs/cgroup", 4 * GB), (4 * GB, 4 * GB)),
    "version 1, a container with its own root": (
        "4:memory:/\n",
        V1,
        old_group("/sys/fs/cgroup/memory", 8 * GB, 5 * GB, stat="inactive_file 1\ntotal_inactive_file 2000000000\n"),
        (8 * GB, 5 * GB),
    ),
    "version 1, nothing limited": ("4:memory:/\n", V1, old_group("/sys/fs/cgroup/memory", 9223372036854771712), None),
    "version 1, a container that is told the machine's path": (
        "4:memory:/docker/x/job\n",
        "35 31 0:32 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        old_group("/sys/fs/cgroup/memory/job", 3 * GB, 1 * GB) | old_group("/sys/fs/cgroup/memory", 8 * GB, 1 * GB),
        (3 * GB, 2 * GB),
    ),
    "version 1, Slurm": (
        "11:cpuset:/other\n4:memory:/slurm/uid_7/job_1/step_0/task_0\n0::/\n",
        HYBRID,
        old_group("/sys/fs/cgroup/memory/slurm/uid_7/job_1/step_0/task_0", 9223372036854771712)
        | old_group(
            "/sys/fs/cgroup/memory/slurm/uid_7/job_1",
            4 * GB,
            3 * GB,
            stat="total_active_file 1000000000\ntotal_dirty 200000000\ntotal_writeback 0\n",
        ),
        (4 * GB, 1_800_000_000),
    ),
    "hybrid, version 2 counts nothing": (
        "4:memory:/low\n0::/low\n",
        HYBRID,
        old_group("/sys/fs/cgroup/memory/low", 4 * GB, 1 * GB),
        (4 * GB, 3 * GB),
    ),
    "the list of mounts cannot be read": (
        "0::/a\n4:memory:/b\n",
        None,
        group("/sys/fs/cgroup/a", 6 * GB) | old_group("/sys/fs/cgroup/memory/b", 4 * GB, 1 * GB),
        (4 * GB, 3 * GB),
    ),
    "nonsense": ("nonsense\n0::\n:::\n", "x - y\n" + V2, group("/sys/fs/cgroup", "9" * 400), None),
}


@pytest.mark.parametrize("kind", TREES)
def test_the_memory_of_a_process_is_that_of_its_control_groups(kind: str) -> None:
    groups, mounts, files, wanted = TREES[kind]
    files = {"/proc/self/cgroup": groups, **({} if mounts is None else {"/proc/self/mountinfo": mounts}), **files}
    memory = read(files)
    if wanted is None:
        assert memory == WHOLE
    else:
        assert (memory.total_bytes, memory.available_bytes) == wanted
        assert memory.name == "control group memory"
        assert "control group" in memory.limit_text(1)


def test_no_budget_lifts_the_limit_of_a_control_group() -> None:
    files = {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2, **group("/sys/fs/cgroup", 4 * GB, 1 * GB)}
    assert read(files, budget="32GB").allowed_bytes(0) == 4 * GB
    assert read(files, budget="3GB").allowed_bytes(0) == 3 * GB
    assert read({}, budget="900GB").allowed_bytes(0) == 900 * GB  # swap is the owner's business


STATUS = "Name:\tpython\nVmPeak:\t 4000000 kB\nVmSize:\t 2000000 kB\nVmData:\t  500000 kB\n"


def test_ulimit_counts_what_the_process_has_mapped_already() -> None:
    size, data = 2_000_000 * 1024 + RESERVE_BYTES, 500_000 * 1024 + RESERVE_BYTES
    memory = read({"/proc/self/status": STATUS}, {"RLIMIT_AS": 8 * GB})
    assert (memory.total_bytes, memory.available_bytes) == (8 * GB, 8 * GB - size)
    assert memory.limit_text(GB) == "only 1.00 GB are free within its ulimit -v"
    memory = read({"/proc/self/status": STATUS}, {"RLIMIT_AS": 8 * GB, "RLIMIT_DATA": 2 * GB})
    assert (memory.total_bytes, memory.available_bytes) == (2 * GB, 2 * GB - data)
    assert "ulimit -d" in memory.limit_text(GB)
    memory = read({"/proc/self/status": STATUS}, {"RLIMIT_AS": 8 * GB}, budget="12GB")
    assert memory.allowed_bytes(GB) == 9 * GB - size  # whatever the budget
    assert "ulimit -v" in memory.limit_text(GB)
    assert read({"/proc/self/status": STATUS}, {"RLIMIT_AS": GB}).available_bytes == 0


def test_the_limits_of_this_process_are_read() -> None:
    code = """
import resource
from mlx_codellama.memory import machine_memory
resource.setrlimit(resource.RLIMIT_AS, (10**9, resource.RLIM_INFINITY))
memory = machine_memory(budget="")
print(memory.total_bytes <= 10**9, 0 < memory.process_free_bytes < 10**9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert this_machine().limit("RLIMIT_CORE") in (None, resource.getrlimit(resource.RLIMIT_CORE)[0])


def test_a_group_made_by_hand_limits_who_is_in_it() -> None:
    """On a machine that lets us make one; elsewhere the trees above have to do."""
    parent = next(
        (f for f in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if (f / "cgroup.procs").exists()), None
    )
    if parent is None:
        pytest.skip("no control groups are mounted")
    folder = parent / "mlx-codellama-test"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        name = next((n for n in ("memory.max", "memory.limit_in_bytes") if (folder / n).exists()), None)
        if name is None:
            pytest.skip("the memory controller is not handed on")
        (folder / name).write_text("2000003072")
        code = f"""
import os, pathlib
pathlib.Path({str(folder / "cgroup.procs")!r}).write_text(str(os.getpid()))
from mlx_codellama.memory import machine_memory
memory = machine_memory(budget="")
print(memory.total_bytes, memory.name)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        if "PermissionError" in done.stderr:
            pytest.skip("no process can be moved into a control group")
        total, name = done.stdout.split(maxsplit=1)
        assert (2_000_003_072 - 4096 < int(total) <= 2_000_003_072, name) == (True, "control group memory\n"), (
            done.stderr
        )
    finally:
        folder.rmdir()


def test_a_group_without_files_limits_nothing() -> None:
    assert control_groups(lambda path: None) == []
    assert Limit("control group", 1, 0) not in control_groups({"/proc/self/cgroup": "4:memory:relative\n"}.get)
