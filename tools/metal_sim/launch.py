"""Run a translated kernel over buffers: the engine's structures, and what came of it."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metal_sim.lines import line_of
from metal_sim.toolchain import MetalError, build_engine, build_kernel
from metal_sim.translate import KERNEL_FILE, Kernel

MAX_BUFFERS, MAX_THREADS, MAX_FINDINGS = 31, 1024, 64
ORDERS = ("forward", "reverse", "random")
_one_at_a_time = threading.Lock()


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        *((word, ctypes.c_uint32) for word in ("present", "writable", "initialised", "unused")),
        ("reads", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
    ]


class _Finding(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char * 256),
        ("code", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("group", ctypes.c_uint32 * 3),
        *((word, ctypes.c_uint32) for word in ("thread", "located", "count")),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("n_buffers", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        *((word, ctypes.c_uint32) for word in ("order", "seed", "checked", "cpu_ms")),
        ("findings", ctypes.POINTER(_Finding)),
        *((word, ctypes.c_uint32) for word in ("n_findings", "threadgroup_bytes")),
        ("meetings", ctypes.c_uint64),
    ]


@dataclass
class Memory:
    """A buffer of a launch. `data` is any contiguous array; outputs are written in place."""

    data: np.ndarray[Any, Any]
    writable: bool = False
    initialised: bool = False  # an output that starts with values


@dataclass
class Traffic:
    """Checked mode: bytes that a kernel's threads asked for. `reads` and `groups` (inputs) are uint32 [bytes]."""

    read: int
    written: int
    reads: np.ndarray[Any, Any] | None = None  # how often each byte was read
    groups: np.ndarray[Any, Any] | None = None  # how many threadgroups read it


@dataclass
class Report:
    """What one launch did. `findings` are sentences with line, threadgroup and thread."""

    kernel: str
    findings: list[str] = field(default_factory=list)
    threadgroup_bytes: int = 0
    meetings: int = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)


@functools.cache
def _engine() -> Any:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build_engine()), mode=ctypes.RTLD_GLOBAL)
    library.gpu_launch.restype = None
    return library


@functools.lru_cache(maxsize=512)
def _entry(text: str, checked: bool) -> tuple[int, Path]:
    _engine()
    path = build_kernel(text, checked=checked)
    address = ctypes.cast(ctypes.CDLL(str(path)).gpu_entry, ctypes.c_void_p).value
    assert address is not None
    return address, path


def _sentence(kernel: Kernel, library: Path, finding: _Finding) -> str:
    text = finding.text.decode(errors="replace")
    file, line = line_of(library, finding.code)
    other_file, other_line = line_of(library, finding.other)
    if not file:
        file, line = other_file, other_line
    elif other_file and text.startswith("race"):
        text += f" (at {other_file}:{other_line})"
    if finding.count > 1:
        text += f", {finding.count} times"
    if finding.located:
        x, y, z = finding.group
        text += f"; first seen in threadgroup ({x}, {y}, {z}), thread {finding.thread}"
    place = f"{kernel.name}, {file}:{line}" if file else kernel.name
    quoted = kernel.lines[line - 1].strip() if file == KERNEL_FILE and 0 < line <= len(kernel.lines) else ""
    return f"{place}: {text}" + (f"\n    {quoted}" if quoted else "")


def launch(
    kernel: Kernel,
    buffers: Mapping[int, Memory],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    order: str = "forward",
    seed: int = 0,
    checked: bool = True,
    cpu_s: float = 60.0,
) -> Report:
    """Run `kernel` over a grid of threads. Raises MetalError where it does not compile or cannot be launched.

    order   of lanes, simdgroups and threadgroups: forward, reverse or random (by seed)
    cpu_s   a kernel that takes longer is stopped, which is a finding
    → a report whose findings the caller judges
    """
    names = kernel.buffer_names()
    slots = max([*names, *buffers], default=-1) + 1
    threads = math.prod(threadgroup)
    if slots > MAX_BUFFERS:
        raise MetalError(f"{kernel.name}: {slots} buffers; Metal has {MAX_BUFFERS}")
    if not 0 < threads <= MAX_THREADS:
        raise MetalError(f"{kernel.name}: a threadgroup of {threads} threads; Metal allows 1 to {MAX_THREADS}")
    if min(grid) < 1:
        raise MetalError(f"{kernel.name}: a grid of {tuple(grid)} threads")
    address, library = _entry(kernel.text, checked)
    table, kept = (_Buffer * max(slots, 1))(), []
    traffic: dict[str, Traffic] = {}
    for slot, memory in buffers.items():
        data, row = memory.data, table[slot]
        if not data.flags.c_contiguous:
            raise ValueError(f"buffer {slot} of {kernel.name} is not contiguous")
        name = names.get(slot, f"buffer {slot}")
        row.name = name.encode()
        row.data, row.bytes, row.present = data.ctypes.data, data.nbytes, 1
        row.writable, row.initialised = memory.writable, memory.initialised
        traffic[name] = Traffic(0, 0)
        if checked and not memory.writable:
            traffic[name].reads, traffic[name].groups = (np.zeros(data.nbytes, np.uint32) for _ in range(2))
            row.reads, row.groups = traffic[name].reads.ctypes.data, traffic[name].groups.ctypes.data
        kept.append(row)
    findings = (_Finding * MAX_FINDINGS)()
    whole = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))  # as MLX dispatches
    job = _Launch(
        entry=address,
        buffers=table,
        n_buffers=slots,
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*whole),
        order=ORDERS.index(order),
        seed=seed,
        checked=checked,
        cpu_ms=int(cpu_s * 1000),
        findings=findings,
    )
    with _one_at_a_time:
        _engine().gpu_launch(ctypes.byref(job))
    for slot, memory in buffers.items():
        del memory
        row = table[slot]
        traffic[row.name.decode()].read, traffic[row.name.decode()].written = row.read, row.written
    sentences = [_sentence(kernel, library, findings[i]) for i in range(job.n_findings)]
    return Report(kernel.name, sentences, job.threadgroup_bytes, job.meetings, traffic if checked else {})
