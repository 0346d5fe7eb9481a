"""After the fact: does a written checkpoint hold the weights of its source, and does it predict what the source does?

One pass reads source and output side by side, blocks of rows at a time, and does three things with each pair of blocks:
measures the error, holds every weight to the bound that its quantisation promises, and multiplies both with the
activations of a short text. So the logits of both models come out without either being in memory.

The bound (a theorem, not a guess; `b` bits, n = 2^b - 1, R = max - min of a weight's group in the source):

- MLX's grid has the step scale = edge / rint(edge / (R / n)), |edge| >= R / 2, so |scale| <= (R / n) · n / (n - 1), and
  |scale| >= (R / n) · n / (n + 1). Rounding moves a weight inside the grid by at most |scale| / 2; the far end of the
  group can lie beyond the last code and is cut by at most R - n · |scale| <= R / (n + 1). Both are below R / n.
- The edge is a weight, so it is stored exactly; the scale is rounded to the stored dtype (unit roundoff u: 2^-9
  bfloat16, 2^-12 float16, or 2^-25 absolute where float16 is subnormal), which a code up to n multiplies: at most
  n · |scale| · u <= 1.5 R u.
- Groups narrower than 1e-7 · n keep the step 1e-7.
- mxfp4: with shared scale s, a weight is off by at most max|w| / 5: between 4 s and 5 s it becomes 4 s, between 5 s and
  6 s it becomes 6 s, all others are off by s / 2 or less and max|w| > 3 s. 2^-7 more for the rounding of max|w| / 6.
- What is not quantised is equal. A source that is quantised already is copied, so it is equal too.

The logits: errors of weights add up differently in every model (how deep, how much of a layer's output is the residual,
how alike the tokens are), so the limit is measured in this one. Four twins of the source run beside it, with random
errors of the size that the weights of each row were found to have (never more than the bound above allows); three times
what the worst of them does to the logits is the limit. Over models of 1 to 24 layers and all recipes a good output is
off by 0.7 to 1.1 of what one twin is; three, because a single heavy row can decide what all of them are off by. Where
the limit exceeds their spread (uncorrelated logits: few bits, many layers) the logits decide nothing, and the limit is
None; the weights still do. Unquantised: identical logits.

What this proves: that OUT holds what convert.open reads in the source. Both sides go through that reader.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_codellama import inputs
from mlx_codellama.config import ModelArgs
from mlx_codellama.convert.side_by_side import SideBySide, Streams, TensorCheck
from mlx_codellama.errors import CheckpointError, TokenizerError
from mlx_codellama.rotary import RopeScaling
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights import Checkpoint, Progress, update_run

TEXT = 'def add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b\n'
MAX_IDS = 16
HASH_BYTES = 4 << 20
LIMIT = 3.0  # times what random errors of the same size do to the logits; see above


@dataclass(frozen=True)
class LogitsCheck:
    """Both models on the same ids. relative_error is against the spread (standard deviation) of the source's logits.

    limit  None: errors of this size may move the logits anywhere, so they decide nothing
    """

    ids: list[int]
    relative_error: float
    limit: float | None
    max_abs: float
    mean_kl: float
    top1_agreement: float

    @property
    def ok(self) -> bool:
        return math.isfinite(self.relative_error) and (self.limit is None or self.relative_error <= self.limit)


@dataclass
class VerifyReport:
    """What `verify` found. `problems` are sentences; without any the output is good."""

    tensors: list[TensorCheck]
    logits: LogitsCheck | None
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
            "logits": asdict(self.logits) if self.logits else None,
            "tensors": tensors,
        }

    def summary(self) -> list[tuple[str, str, str, str, str, str]]:
        """Rows to print, one per kind of tensor: name with layers as *, how it is stored, bits per weight, the largest
        relative error and error of its tensors, and how many weights are wrong."""
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
    ids: Sequence[int] | None = None,
    logits: bool = True,
    every: int = 1,
    scaling: RopeScaling | None = None,
    record: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Compare a written checkpoint with its source, as `convert.open` reads it (with the same dtype, if any).

    ids       tokens for the logits; default: a line of Python by the output's tokenizer, or random ids without one
    logits    False leaves them out
    every     compare only every n-th block of each tensor (faster without logits: the others are not read)
    scaling   predict with both models' positions stretched so, on top of a config without a scaling of its own
    record    put the report into the output's run.json, good or bad
    progress  gets bytes done and total: the weights as float32, then the files of the output, which are hashed
    Memory is a few blocks and the activations, whatever the model's size. The report says what is wrong; only a folder
    that cannot be compared at all (damaged headers, another model) raises CheckpointError or ConfigError.
    """
    started = time.monotonic()
    out = Path(out)
    written = Checkpoint.open(out)
    _same_model(source.args, written.args)
    chosen = _ids(out, written.args, ids) if logits else []
    weights = sorted(out.glob("*.safetensors"))
    to_hash = sum(path.stat().st_size for path in weights)

    def told(at: Progress) -> None:  # the bytes to be hashed afterwards belong to the work as well
        if progress:
            progress(replace(at, total_bytes=at.total_bytes + to_hash))

    with closing(SideBySide(source, written, every, logits, told, scaling)) as pass_, np.errstate(invalid="ignore"):
        both = pass_.forward(chosen)
    checks = list(pass_.checks.values())
    tensor_bits = 8 * sum(spec.nbytes for spec in written.specs) / written.args.n_parameters
    compared = pass_.total_bytes

    def hashed(done: int, name: str) -> None:
        if progress:
            progress(Progress(compared + done, compared + to_hash, name, time.monotonic() - started))

    report = VerifyReport(checks, None, _hashes(weights, hashed), tensor_bits, 0.0)
    for check in checks:
        if not check.ok:
            report.problems.append(
                f"{check.name} differs from the source: {check.n_beyond} weights are further off than "
                f"{check.stored} can put them (relative error {check.relative_rms:.3g})"
            )
    if both is not None:
        with np.errstate(invalid="ignore"):
            report.logits = _compare(chosen, both)
        if not math.isfinite(report.logits.relative_error):
            report.problems.append("the logits are not finite: a weight of the output or the source is NaN or infinite")
        elif not report.logits.ok:
            report.problems.append(
                f"the logits are off by {report.logits.relative_error:.3g} of their spread, "
                f"more than the {report.logits.limit:.3g} that the weights' errors explain"
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


def _ids(out: Path, args: ModelArgs, ids: Sequence[int] | None) -> list[int]:
    if ids is None:
        try:
            ids = Tokenizer.load(out).encode(TEXT, bos=True)[:MAX_IDS]
        except TokenizerError:
            ids = np.random.default_rng(0).integers(0, args.vocab_size, MAX_IDS).tolist()
    if not ids or not all(0 <= i < args.vocab_size for i in ids):
        raise CheckpointError(f"token ids must lie between 0 and {args.vocab_size - 1}")
    return list(ids)


def _hashes(files: Sequence[Path], progress: Callable[[int, str], None]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file; progress gets the bytes done and a file's name."""
    found, done = {}, 0
    for path in files:
        digest = hashlib.sha256()
        for piece in inputs.pieces(path, HASH_BYTES):
            digest.update(piece)
            done += len(piece)
            progress(done, path.name)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def _compare(ids: list[int], logits: Streams) -> LogitsCheck:
    """logits [L, V] of the source, of the output, and of each twin."""
    truth, got, *twins = (x.astype(np.float64) for x in logits)
    p, q = (x - x.max(-1, keepdims=True) for x in (truth, got))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    expected = max((_off(twin, truth) for twin in twins), default=0.0)
    limit = LIMIT * expected
    return LogitsCheck(
        ids,
        _off(got, truth),
        limit if limit < 1 else None,
        float(np.abs(got - truth).max()),
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((truth.argmax(-1) == got.argmax(-1)).mean()),
    )


def _off(got: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> float:
    """Root mean square error of logits [L, V] over the spread of the true ones."""
    error = got - truth
    error -= error.mean(-1, keepdims=True)  # a constant moves no probability
    spread = float(np.sqrt(np.square(truth - truth.mean(-1, keepdims=True)).mean()))
    rms = float(np.sqrt(np.square(error).mean()))
    return rms / spread if spread else (math.inf if rms else 0.0)
