"""Check that a written checkpoint holds the weights of its source.

One pass reads source and output together, in blocks of rows, and checks every weight against the error bound of its
quantisation. The bound is proved here (`b` bits, n = 2^b - 1, R = max - min of a weight's group in the source):

- MLX's grid has the step scale = edge / rint(edge / (R / n)), |edge| >= R / 2, so |scale| <= (R / n) · n / (n - 1), and
  |scale| >= (R / n) · n / (n + 1). Rounding moves a weight inside the grid by at most |scale| / 2; the far end of the
  group can be beyond the last code and is clipped by at most R - n · |scale| <= R / (n + 1). Both are below R / n.
- The edge is a weight, so it is stored exactly; the scale is rounded to the stored dtype (unit roundoff u: 2^-9
  bfloat16, 2^-12 float16, or 2^-25 absolute where float16 is subnormal), which a code up to n multiplies: at most
  n · |scale| · u <= 1.5 R u.
- Groups narrower than 1e-7 · n keep the step 1e-7.
- mxfp4: with shared scale s, a weight is off by at most max|w| / 5: between 4 s and 5 s it becomes 4 s, between 5 s and
  6 s it becomes 6 s, all others are off by s / 2 or less and max|w| > 3 s. 2^-7 more for the rounding of max|w| / 6.
- Unquantised tensors are equal. A source that is already quantised is copied, so it is equal too.

This proves that OUT holds what convert.open reads from the source, as precisely as its bits allow. Both sides use that
reader, so an error of the reader would not show. `quantize --report` measures the quality of a quantised model on a
text.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_codellama import inputs
from mlx_codellama.config import ModelArgs, QuantArgs
from mlx_codellama.errors import CheckpointError
from mlx_codellama.weights import Checkpoint, Progress, update_run

BLOCK_BYTES = 8 << 20  # size of one block as float32
AHEAD = 2  # blocks to read while one is checked
HASH_BYTES = 4 << 20
ROUNDOFF = {"bfloat16": (2.0**-9, 0.0), "float16": (2.0**-12, 2.0**-25), "float32": (2.0**-25, 0.0)}

Floats = npt.NDArray[np.float32]


@dataclass
class TensorCheck:
    """The result for one tensor. n_beyond counts weights that differ from the source by more than the bound."""

    name: str
    stored: str  # "4-bit/64", "mxfp4", or a dtype
    bits_per_weight: float
    relative_rms: float = 0.0
    max_abs: float = 0.0
    n_beyond: int = 0

    @property
    def ok(self) -> bool:
        return self.n_beyond == 0


@dataclass
class VerifyReport:
    """What `verify` found. `problems` are sentences; if there are none, the output is good."""

    tensors: list[TensorCheck]
    files: dict[str, dict[str, Any]]
    bits_per_weight: float
    elapsed_s: float
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        tensors = {t.name: {k: v for k, v in asdict(t).items() if k != "name"} for t in self.tensors}
        return {
            "ok": self.ok,
            "problems": self.problems,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "elapsed_s": round(self.elapsed_s, 3),
            "files": self.files,
            "tensors": tensors,
        }

    def summary(self) -> list[tuple[str, str, str, str, str, str]]:
        """Rows to print, one per kind of tensor: name with * for the layer, storage, bits per weight, the largest
        relative and absolute error, and the number of wrong weights."""
        kinds: dict[tuple[str, str], list[TensorCheck]] = {}
        for t in self.tensors:
            kinds.setdefault((re.sub(r"layers\.\d+\.", "layers.*.", t.name), t.stored), []).append(t)
        return [
            (
                f"{name} × {len(found)}",
                stored,
                f"{found[0].bits_per_weight:.2f}",
                f"{max(t.relative_rms for t in found):.2e}",
                f"{max(t.max_abs for t in found):.2e}",
                str(sum(t.n_beyond for t in found)),
            )
            for (name, stored), found in kinds.items()
        ]

    def raise_if_wrong(self) -> None:
        """Raise CheckpointError with the first problem."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise CheckpointError(
                self.problems[0] + more, hint="convert again; if it happens twice, the disk or the source is damaged"
            )


def verify(
    source: Checkpoint,
    out: str | Path,
    *,
    record: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Compare a written checkpoint with its source, as `convert.open` reads it (with the same dtype, if any).

    record    put the report into the output's run.json, good or bad
    progress  is called with bytes done and in total: the weights as float32, then the output's files, for their hashes
    Memory is a few blocks, whatever the size of the model. Wrong weights go into the report. Only folders that cannot
    be compared (damaged headers, another model) raise CheckpointError or ConfigError.
    """
    started = time.monotonic()
    out = Path(out)
    written = Checkpoint.open(out)
    _same_model(source.args, written.args)
    weights = sorted(out.glob("*.safetensors"))
    shapes = written.args.tensor_shapes()
    compared = sum(4 * math.prod(shape) for shape in shapes.values())
    total = compared + sum(path.stat().st_size for path in weights)

    def tell(done: int, name: str) -> None:
        if progress:
            progress(Progress(done, total, name, time.monotonic() - started))

    checks: list[TensorCheck] = []
    done = 0
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="verify") as pool, np.errstate(invalid="ignore"):
        for name in shapes:
            comparison = _Comparison(source, written, name)
            for n_weights in comparison.blocks(pool):
                done += 4 * n_weights
                tell(done, name)
            checks.append(comparison.check)
    bits = 8 * sum(spec.nbytes for spec in written.specs) / written.args.n_parameters
    report = VerifyReport(checks, _hashes(weights, lambda n, name: tell(compared + n, name)), bits, 0.0)
    for check in checks:
        if not check.ok:
            report.problems.append(
                f"{check.name} differs from the source: {check.n_beyond} weights are further off than "
                f"{check.stored} can put them (relative error {check.relative_rms:.3g})"
            )
    report.elapsed_s = time.monotonic() - started
    if record:
        update_run(out, {"verify": report.to_dict()})
    return report


def _same_model(source: ModelArgs, written: ModelArgs) -> None:
    a, b = (replace(args, quantization=None, dtype="float32").to_dict() for args in (source, written))
    different = [key for key in a if a[key] != b[key]]
    if different:
        key = different[0]
        raise CheckpointError(f"the output is another model: {key} is {b[key]}, the source says {a[key]}")


def _hashes(files: Sequence[Path], progress: Callable[[int, str], None]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file. progress is called with the bytes done and the file's name."""
    found, done = {}, 0
    for path in files:
        digest = hashlib.sha256()
        for piece in inputs.pieces(path, HASH_BYTES):
            digest.update(piece)
            done += len(piece)
            progress(done, path.name)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


# ── one weight ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Comparison:
    """One weight of both checkpoints, block by block. `check` is complete once `blocks` is exhausted."""

    def __init__(self, source: Checkpoint, written: Checkpoint, name: str) -> None:
        self._source, self._written, self._name = source, written, name
        self._shape = written.args.tensor_shapes()[name]
        self._quant = _quant(written.args, name, self._shape)
        specs = {spec.name: spec for spec in written.specs}
        stored = [specs[part] for part in _parts(name, self._quant)]
        kind = stored[0].dtype if self._quant is None else _kind(self._quant)
        self.check = TensorCheck(name, kind, 8 * sum(spec.nbytes for spec in stored) / math.prod(self._shape))
        # A quantised source is copied, so its weights must be equal.
        self._promised = self._quant if source.args.quantization is None else None
        self._dtype = stored[-1].dtype if stored[-1].dtype in ROUNDOFF else "bfloat16"  # dtype of the scales
        self._error = self._total = 0.0  # sums of squares

    def blocks(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Compare all rows; yields the number of weights of each block. Reads ahead in the pool's threads."""
        count = max(1, BLOCK_BYTES // (4 * math.prod(self._shape[1:]))) if len(self._shape) > 1 else self._shape[0]
        waiting: deque[Future[_Sums]] = deque()
        try:
            for start in range(0, self._shape[0], count):
                waiting.append(pool.submit(self._measured, start, min(start + count, self._shape[0])))
                if len(waiting) > AHEAD:
                    yield self._count(waiting.popleft().result())
            while waiting:
                yield self._count(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()

    def _measured(self, start: int, stop: int) -> _Sums:
        if not hasattr(_thread, "stream"):
            _thread.stream = mx.new_stream(mx.cpu)
        with mx.stream(_thread.stream), np.errstate(invalid="ignore"):
            truth = _dense(self._source, self._name, self._shape, start, stop)
            got = _dense(self._written, self._name, self._shape, start, stop)
        return _measure(truth, got, self._promised, self._dtype)

    def _count(self, sums: _Sums) -> int:
        self._error, self._total = self._error + sums.error, self._total + sums.total
        check = self.check
        check.max_abs = float(np.maximum(check.max_abs, sums.max_abs))  # keeps NaN
        check.n_beyond += sums.n_beyond
        check.relative_rms = math.sqrt(self._error / self._total) if self._total else math.inf if self._error else 0.0
        return sums.n_weights


@dataclass(frozen=True)
class _Sums:
    n_weights: int
    error: float
    total: float
    max_abs: float
    n_beyond: int


_thread = threading.local()


def _quant(args: ModelArgs, name: str, shape: tuple[int, ...]) -> QuantArgs | None:
    return args.quant_of(name.removesuffix(".weight")) if len(shape) == 2 else None


def _parts(name: str, quant: QuantArgs | None) -> list[str]:
    if quant is None:
        return [name]
    path = name.removesuffix(".weight")
    return [f"{path}.{part}" for part in quant.part_names]


def _kind(quant: QuantArgs) -> str:
    return f"{quant.bits}-bit/{quant.group_size}" if quant.mode == "affine" else quant.mode


def _dense(model: Checkpoint, name: str, shape: tuple[int, ...], start: int, stop: int) -> Floats:
    """Rows start .. stop of one weight as float32."""
    quant = _quant(model.args, name, shape)
    if quant is None:
        return np.array(model.rows(name, start, stop).astype(mx.float32))
    weight, scales, *rest = (model.rows(part, start, stop) for part in _parts(name, quant))
    biases = rest[0].astype(mx.float32) if rest else None
    scales = scales if quant.mode == "mxfp4" else scales.astype(mx.float32)
    return np.array(mx.dequantize(weight, scales, biases, quant.group_size, quant.bits, quant.mode, dtype=mx.float32))


def _measure(truth: Floats, got: Floats, quant: QuantArgs | None, dtype: str) -> _Sums:
    """Errors of one block of rows, and the number of weights beyond the bound (see the module docstring)."""
    error = got - truth
    flat, weights = error.reshape(-1), truth.reshape(-1)
    squares = float(np.dot(flat, flat)), float(np.dot(weights, weights))
    magnitude = np.abs(error, out=error)
    if quant is None:
        beyond = int(np.count_nonzero(~(magnitude == 0)))  # NaN is beyond too
    else:
        groups = truth.reshape(len(truth), -1, quant.group_size)
        high, low = groups.max(-1), groups.min(-1)
        if quant.mode == "mxfp4":
            bound = np.maximum(high, -low) * ((1 + 2**-7) / 5) + 2.0**-126
        else:
            n = 2**quant.bits - 1
            relative, absolute = ROUNDOFF[dtype]
            width = high - low
            bound = np.maximum(width / n, 1e-7) + (1.5 * relative + 2**-21) * width + n * absolute
            bound += 2**-22 * np.maximum(high, -low)  # rounding of code · scale + bias in float32
        beyond = int(np.count_nonzero(~(magnitude.reshape(groups.shape) <= bound[..., None])))
    return _Sums(truth.size, *squares, float(magnitude.max(initial=0.0)), beyond)
