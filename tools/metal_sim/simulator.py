"""`mx.fast.metal_kernel` on a Linux CPU: MLX writes the source, as it would for a Mac, and the simulator runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_sim.launch import Memory, Report, launch
from metal_sim.lint import lint
from metal_sim.toolchain import MetalError, Unavailable
from metal_sim.translate import translate
from mlx_codellama.kernels import dispatch

PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'  # what MLX puts before every custom kernel
_build_real = mx.fast.metal_kernel


def mlx_headers() -> Path:
    """The folder of MLX's Metal headers, which its wheel brings. Raises Unavailable."""
    folder = Path(mx.__file__).parent / "include"
    if not (folder / "mlx/backend/metal/kernels/utils.h").exists():
        raise Unavailable("the installed mlx brings no Metal headers")
    return folder


def to_numpy(a: mx.array) -> np.ndarray[Any, Any]:
    """The array's memory with its strides, or a copy; bfloat16 as uint16."""
    mx.eval(a)
    return np.asarray(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def from_numpy(a: np.ndarray[Any, Any], dtype: mx.Dtype) -> mx.array:
    made = mx.array(a)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


@dataclass
class Traced:
    """What MLX would launch: the text, which of its inputs want shape, strides and ndim, and the grid."""

    name: str
    source: str
    template: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    wants: list[tuple[bool, bool, bool]]
    row_contiguous: bool


def trace(call: Callable[..., Any], inputs: Sequence[mx.array]) -> Traced:
    """Ask MLX for the kernel that `call(*inputs)` launches."""
    seen: list[dict[str, Any]] = []
    mx.export_function(seen.append, call, *inputs)
    found = [step["arguments"] for step in seen if step["type"] == "primitive" and step["name"] == "CustomKernel"]
    if len(found) != 1:
        raise MetalError(f"{len(found)} kernels in one call")
    name, source, *rest = found[0]
    instantiated = source.rpartition(f"decltype({name}<")[2]
    template = f"<{instantiated.partition('>)')[0]}>" if instantiated != source else ""
    return Traced(name, source, template, tuple(rest[:3]), tuple(rest[3:6]), rest[6], rest[7])


@dataclass
class Simulation:
    """How kernels run inside `simulated`, and what came of it. The settings may be changed between launches."""

    order: str = "forward"
    seed: int = 0
    checked: bool = True
    lint: bool = True
    strict: bool = True
    cpu_s: float = 60.0
    dry: bool = False
    reports: list[Report] = field(default_factory=list)
    traced: dict[str, Traced] = field(default_factory=dict)

    @property
    def last(self) -> Report:
        return self.reports[-1]

    @property
    def findings(self) -> list[str]:
        return [finding for report in self.reports for finding in report.findings]


class SimulatedKernel:
    """What `mx.fast.metal_kernel` returns inside `simulated`; called with the same keywords."""

    def __init__(self, simulation: Simulation, *args: Any, **kwargs: Any) -> None:
        self.simulation = simulation
        self.real = _build_real(*args, **kwargs)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        **launching: Any,
    ) -> list[mx.array]:
        del verbose, stream
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]

        def call(*traced: mx.array) -> Any:
            return self.real(inputs=list(traced), output_shapes=output_shapes, output_dtypes=output_dtypes, **launching)

        plan = trace(call, arrays)
        self.simulation.traced[plan.name] = plan
        if self.simulation.dry:
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        outputs = [_output(shape, dtype, init_value) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        memory = _inputs(arrays, plan)
        memory += [Memory(data, writable=True, initialised=init_value is not None) for data in outputs]
        self._run(plan, memory)
        return [from_numpy(data, dtype) for data, dtype in zip(outputs, output_dtypes, strict=True)]

    def _run(self, plan: Traced, memory: list[Memory]) -> None:
        settings = self.simulation
        kernel = translate(plan.source, plan.name, template=plan.template, folders=[mlx_headers()], prelude=PRELUDE)
        report = launch(
            kernel,
            dict(enumerate(memory)),
            plan.grid,
            plan.threadgroup,
            order=settings.order,
            seed=settings.seed,
            checked=settings.checked,
            cpu_s=settings.cpu_s,
        )
        if settings.lint:
            report.findings[:0] = lint(kernel)
        settings.reports.append(report)
        if settings.strict and report.findings:
            raise MetalError("\n".join(report.findings))


def _inputs(arrays: Sequence[mx.array], plan: Traced) -> list[Memory]:
    """Buffers in MLX's order: each input, then those of its shape, strides and ndim that the text names."""
    out = []
    for a, (shape, strides, ndim) in zip(arrays, plan.wants, strict=True):
        data = to_numpy(a)
        if plan.row_contiguous or data.flags.c_contiguous:
            data = np.ascontiguousarray(data)
            steps = [s // data.itemsize for s in data.strides]
        else:  # the kernel sees the memory as it lies
            steps = [s // data.itemsize for s in data.strides]
            span = 1 + sum((n - 1) * step for n, step in zip(data.shape, steps, strict=True))
            data = np.lib.stride_tricks.as_strided(data, (span,), (data.itemsize,))
        out.append(Memory(data))
        if a.ndim:
            out += [Memory(np.array(a.shape, np.int32))] if shape else []
            out += [Memory(np.array(steps, np.int64))] if strides else []
            out += [Memory(np.array([a.ndim], np.int32))] if ndim else []
    return out


def _output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray[Any, Any]:
    """Fresh memory: `init_value`, or every bit set, which is a NaN."""
    if init_value is not None:
        return np.array(to_numpy(mx.full(shape, init_value, dtype)), copy=True)
    size = to_numpy(mx.zeros((1,), dtype)).dtype
    return np.frombuffer(bytearray(b"\xff" * (int(np.prod(shape)) * size.itemsize)), size).reshape(shape)


@contextlib.contextmanager
def simulated(**settings: Any) -> Iterator[Simulation]:
    """Inside, `mx.fast.metal_kernel` builds kernels that run here, and `dispatch.backend()` is metal.

    order    lanes, simdgroups and threadgroups: forward, reverse or random (by `seed`)
    checked  look for races, bounds, alignment, uninitialised reads, unwritten outputs, writes to inputs; count bytes
    lint     look for what clang lets pass and MSL does not
    strict   raise MetalError at the first launch that has findings; else they gather in `.findings`
    cpu_s    seconds of CPU time after which a kernel is stopped
    """
    with _in_place_of_mlx(Simulation(**settings)) as simulation:
        yield simulation


@contextlib.contextmanager
def recorded() -> Iterator[Simulation]:
    """Inside, kernels are traced into `.traced` and not run: they return zeros. Works on any machine."""
    with _in_place_of_mlx(Simulation(dry=True)) as simulation:
        yield simulation


@contextlib.contextmanager
def _in_place_of_mlx(simulation: Simulation) -> Iterator[Simulation]:
    def build(*args: Any, **kwargs: Any) -> SimulatedKernel:
        return SimulatedKernel(simulation, *args, **kwargs)

    mx.fast.metal_kernel = build
    try:
        with dispatch.simulate("metal"):
            yield simulation
    finally:
        mx.fast.metal_kernel = _build_real
