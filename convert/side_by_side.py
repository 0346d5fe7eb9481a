"""A checkpoint and its source, read once and together: errors of all weights, and the logits of both for a few tokens.

Whatever the model's size, a few blocks of rows and the activations are in memory.

Beside the two run a few twins of the source, which say how far errors of this size move the logits of this very model:
every product of a twin with a quantised matrix is off as if each row of it had random errors of the size that was
measured in that row. Exact in distribution without drawing a number per weight: independent errors of deviation s in a
row move its products with the activations X [L, I] by a Gaussian of covariance s² X Xᵀ [L, L].
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_codellama.config import ModelArgs, QuantArgs
from mlx_codellama.kernels.rope import amplitude, angles
from mlx_codellama.rotary import RopeScaling
from mlx_codellama.weights import Checkpoint, Progress

BLOCK_BYTES = 8 << 20  # of one block as float32
AHEAD = 2  # blocks being prepared while one is used
TWINS = 4  # each costs one more product of a few tokens with every weight
ROUNDOFF = {"bfloat16": (2.0**-9, 0.0), "float16": (2.0**-12, 2.0**-25), "float32": (2.0**-25, 0.0)}

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]  # of the source, of the output
Streams = list[Floats]  # of the source, of the output, then of each twin
Turn = tuple[Floats, Floats]  # cosines, sines


@dataclass
class TensorCheck:
    """One weight. n_beyond counts weights that lie further from the source than quantisation can move them."""

    name: str
    stored: str  # "4-bit/64", "mxfp4", or a dtype
    bits_per_weight: float
    relative_rms: float = 0.0
    max_abs: float = 0.0
    n_beyond: int = 0

    @property
    def ok(self) -> bool:
        return self.n_beyond == 0


class SideBySide:
    """One reading of both checkpoints in the order of the computation, which is the order of the tensors."""

    def __init__(
        self,
        source: Checkpoint,
        written: Checkpoint,
        every: int,
        logits: bool,
        progress: Callable[[Progress], None] | None,
        scaling: RopeScaling | None = None,
    ) -> None:
        self.args = written.args if scaling is None else written.args.with_scaling(scaling)
        self.checks: dict[str, TensorCheck] = {}
        self._source, self._written = source, written
        self._every, self._logits, self._progress = every, logits, progress
        self._specs = {spec.name: spec for spec in written.specs}
        self._copied = source.args.quantization is not None
        self._squares: dict[str, tuple[float, float]] = {}  # of the error, of the weights
        self._rows: dict[str, Floats] = {}  # mean square error of each row of a quantised weight, NaN: not measured
        quantised = written.args.quantization is not None and not self._copied
        self._twins = [np.random.default_rng(seed) for seed in range(TWINS if quantised else 0)]
        self._done, self._started = 0, time.monotonic()
        shapes = self.args.tensor_shapes()
        self.total_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
        self._shapes = shapes
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="verify")

    def close(self) -> None:
        """Stop the readers, also where the pass ended early."""
        self._pool.shutdown(cancel_futures=True)

    # ── the computation ─────────────────────────────────────────────────────────────────────────────────────────────

    def forward(self, ids: list[int]) -> Streams | None:
        """Logits float32 [L, V] of source, output and twins; None (every tensor compared all the same) without ids.

        There are twins where the output is quantised and the source is not.
        """
        args = self.args
        if not ids:
            for name in self._shapes:
                for _ in self._blocks(name):
                    pass
            return None
        x = self._embedding("model.embed_tokens.weight", ids)
        turn = self._turn(len(ids))
        for i in range(args.num_hidden_layers):
            p = f"model.layers.{i}"
            h = self._norm(f"{p}.input_layernorm.weight", x)
            q, k, v = (self._linear(f"{p}.self_attn.{n}_proj.weight", h) for n in "qkv")
            a = [_attend(*three, turn, args) for three in zip(q, k, v, strict=True)]
            x = _add(x, self._linear(f"{p}.self_attn.o_proj.weight", a))
            h = self._norm(f"{p}.post_attention_layernorm.weight", x)
            gate = self._linear(f"{p}.mlp.gate_proj.weight", h)
            up = self._linear(f"{p}.mlp.up_proj.weight", h)
            inner = [g / (1 + np.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            x = _add(x, self._linear(f"{p}.mlp.down_proj.weight", inner))
        x = self._norm("model.norm.weight", x)
        return self._linear("model.embed_tokens.weight" if args.tie_word_embeddings else "lm_head.weight", x)

    def _turn(self, n_tokens: int) -> Turn:
        """Cosines and sines of positions 0 … n_tokens - 1, float32 [n_tokens, 1, D/2], under the model's scaling."""
        args = self.args
        scaling, length = args.scaling_over(n_tokens)
        turn = angles(np.arange(n_tokens), args.head_dim, args.rope_theta, scaling, length)
        cos, sin = (amplitude(scaling) * f(turn)[:, None] for f in (np.cos, np.sin))
        return cos.astype(np.float32), sin.astype(np.float32)

    def _embedding(self, name: str, ids: list[int]) -> Streams:
        wanted, places = np.unique(ids, return_inverse=True)
        rows = [np.empty((len(wanted), self.args.hidden_size), np.float32) for _ in range(2)]
        for start, pair in self._blocks(name):
            here = (wanted >= start) & (wanted < start + len(pair[0]))
            for out, block in zip(rows, pair, strict=True):
                out[here] = block[wanted[here] - start]
        sizes = self._deviations(name)[wanted, None]
        twins = [rows[0] + sizes * rng.standard_normal(rows[0].shape, np.float32) for rng in self._twins]
        return [out[places] for out in (*rows, *twins)]

    def _norm(self, name: str, x: Streams) -> Streams:
        ((_, (truth, got)),) = self._blocks(name)
        eps = np.float32(self.args.rms_norm_eps)
        weights = [truth, got, *[truth] * len(self._twins)]
        return [v / np.sqrt(np.square(v).mean(-1, keepdims=True) + eps) * w for v, w in zip(x, weights, strict=True)]

    def _linear(self, name: str, x: Streams) -> Streams:
        """x [L, I] of all times their weight [O, I], transposed → [L, O]."""
        y = [np.empty((len(v), self._shapes[name][0]), np.float32) for v in x]
        for start, (truth, got) in self._blocks(name):
            for i, (out, v) in enumerate(zip(y, x, strict=True)):
                out[:, start : start + len(truth)] = v @ (got if i == 1 else truth).T
        sizes = self._deviations(name)
        for rng, out, v in zip(self._twins, y[2:], x[2:], strict=True):
            out += _root(v) @ rng.standard_normal(out.shape, np.float32) * sizes
        return y

    def _deviations(self, name: str) -> Floats:
        """Root mean square error of a weight's rows, float32 [O]; of rows that were not measured, that of the others.

        Zero where nothing is quantised.
        """
        rows = self._rows[name]
        known = rows[np.isfinite(rows)]
        typical = known.mean() if known.size else 0.0
        sizes: Floats = np.sqrt(np.where(np.isfinite(rows), rows, typical)).astype(np.float32)
        return sizes

    # ── reading, measuring ──────────────────────────────────────────────────────────────────────────────────────────

    def _blocks(self, name: str) -> Iterator[tuple[int, Pair]]:
        """Rows of one weight of both, as float32, measured on the way; read ahead by two threads."""
        shape = self._shapes[name]
        count = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:]))) if len(shape) > 1 else shape[0]
        first_time = name not in self.checks  # tied embeddings come twice
        quant = self._quant(self.args, name)
        if first_time:
            path = name.removesuffix(".weight")
            stored = [self._specs[n] for n in self._parts(path, quant)]
            bits = 8 * sum(spec.nbytes for spec in stored) / math.prod(shape)
            kind = stored[0].dtype if quant is None else _kind(quant)
            self.checks[name], self._squares[name] = TensorCheck(name, kind, bits), (0.0, 0.0)
            self._rows[name] = np.full(shape[0], 0 if quant is None else np.nan, np.float32)
        waiting: deque[tuple[int, Future[tuple[Pair, Sums | None]]]] = deque()

        def finish() -> tuple[int, Pair]:
            begin, future = waiting.popleft()
            pair, sums = future.result()
            if sums is not None:
                self._count(name, sums)
                if quant is not None:
                    self._rows[name][begin : begin + len(sums.rows)] = sums.rows
            self._done += 4 * pair[0].size * first_time
            if self._progress:
                elapsed = time.monotonic() - self._started
                self._progress(Progress(min(self._done, self.total_bytes), self.total_bytes, name, elapsed))
            return begin, pair

        for number, start in enumerate(range(0, shape[0], count)):
            measured = first_time and number % self._every == 0
            if not (measured or self._logits):
                continue
            stop = min(start + count, shape[0])
            waiting.append((start, self._pool.submit(self._read, name, start, stop, quant, measured)))
            if len(waiting) > AHEAD:
                yield finish()
        while waiting:
            yield finish()

    def _read(
        self, name: str, start: int, stop: int, quant: QuantArgs | None, measured: bool
    ) -> tuple[Pair, Sums | None]:
        if not hasattr(_thread, "stream"):
            _thread.stream = mx.new_stream(mx.cpu)
        with mx.stream(_thread.stream):
            dtype = self._spec_dtype(name)
            truth = self._dense(self._source, name, start, stop, self._quant(self._source.args, name))
            got = self._dense(self._written, name, start, stop, quant)
        return (truth, got), _measure(truth, got, None if self._copied else quant, dtype) if measured else None

    def _dense(self, model: Checkpoint, name: str, start: int, stop: int, quant: QuantArgs | None) -> Floats:
        if quant is None:
            return np.array(model.rows(name, start, stop).astype(mx.float32))
        weight, scales, *rest = (
            model.rows(part, start, stop) for part in self._parts(name.removesuffix(".weight"), quant)
        )
        biases = rest[0].astype(mx.float32) if rest else None
        scales = scales if quant.mode == "mxfp4" else scales.astype(mx.float32)
        return np.array(
            mx.dequantize(
                weight, scales, biases, group_size=quant.group_size, bits=quant.bits, mode=quant.mode, dtype=mx.float32
            )
        )

    def _spec_dtype(self, name: str) -> str:
        """The dtype of a weight's scales, or of the source's weight for mxfp4."""
        spec = self._specs.get(name.removesuffix("weight") + "biases", self._specs[name])
        return spec.dtype if spec.dtype in ROUNDOFF else "bfloat16"

    @staticmethod
    def _parts(path: str, quant: QuantArgs | None) -> list[str]:
        if quant is None:
            return [f"{path}.weight"]
        return [f"{path}.{p}" for p in ("weight", "scales", "biases")[: 2 if quant.mode == "mxfp4" else 3]]

    def _quant(self, args: ModelArgs, name: str) -> QuantArgs | None:
        return args.quant_of(name.removesuffix(".weight")) if len(self._shapes[name]) == 2 else None

    def _count(self, name: str, sums: Sums) -> None:
        check = self.checks[name]
        error, total = self._squares[name]
        self._squares[name] = error, total = error + sums.error, total + sums.total
        check.max_abs = float(np.maximum(check.max_abs, sums.max_abs))  # NaN where one is
        check.n_beyond += sums.n_beyond
        check.relative_rms = math.sqrt(error / total) if total else (math.inf if error else 0.0)


@dataclass(frozen=True)
class Sums:
    error: float
    total: float
    max_abs: float
    n_beyond: int
    rows: Floats  # mean square error of each row, at most what its bounds allow


_thread = threading.local()


def _measure(truth: Floats, got: Floats, quant: QuantArgs | None, dtype: str) -> Sums:
    """Errors of one block of rows, and how many weights lie beyond the bound of verify's docstring."""
    error = got - truth
    flat, weights = error.reshape(-1), truth.reshape(-1)
    rows = np.einsum("oi,oi->o", error, error) / error.shape[-1] if error.ndim == 2 else flat[:0]
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
            bound += 2**-22 * np.maximum(high, -low)  # of code · scale + bias in float32
        beyond = int(np.count_nonzero(~(magnitude.reshape(groups.shape) <= bound[..., None])))
        rows = np.fmin(rows, np.square(bound).mean(-1))
    largest = float(magnitude.max(initial=0.0))
    return Sums(float(np.dot(flat, flat)), float(np.dot(weights, weights)), largest, beyond, rows)


def _kind(quant: QuantArgs) -> str:
    return f"{quant.bits}-bit/{quant.group_size}" if quant.mode == "affine" else quant.mode


def _add(a: Streams, b: Streams) -> Streams:
    return [one + other for one, other in zip(a, b, strict=True)]


def _root(x: Floats) -> Floats:
    """R [L, L] with R Rᵀ = x xᵀ, of activations x [L, I]."""
    gram = np.nan_to_num(x.astype(np.float64) @ x.T.astype(np.float64), posinf=0.0, neginf=0.0)
    values, vectors = np.linalg.eigh(gram)
    root: Floats = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    return root


def _attend(q: Floats, k: Floats, v: Floats, turn: Turn, args: ModelArgs) -> Floats:
    """Causal attention of one model: q [L, H·D], k, v [L, K·D], cosines and sines [L, 1, D/2] → [L, H·D]."""
    length, d = len(q), args.head_dim
    cos, sin = turn

    def heads(x: Floats, rotated: bool) -> Floats:  # → [heads, L, D]
        x = x.reshape(length, -1, d)
        if rotated:
            a, b = x[..., : d // 2], x[..., d // 2 :]
            x = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        by_head: Floats = x.swapaxes(0, 1)
        return by_head

    shared = args.num_attention_heads // args.num_key_value_heads
    q3, k3, v3 = heads(q, True), heads(k, True).repeat(shared, 0), heads(v, False).repeat(shared, 0)
    scores = q3 @ k3.swapaxes(1, 2) / np.float32(math.sqrt(d))
    scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed: Floats = (scores @ v3).swapaxes(0, 1).reshape(length, -1)
    return mixed
