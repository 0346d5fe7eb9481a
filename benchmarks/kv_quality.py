"""What fewer bits for keys and values cost the bundled demo model: KL divergence and loss by position.

    python benchmarks/kv_quality.py        writes results/kv_quality.json; nothing is timed

Text: Python files of the standard library, one window of the model's context from each. The reference is the same model
with float32 keys and values; both are teacher-forced on the text, in the same chunks.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
import harness
import mlx.core as mx
import numpy as np

from mlx_codellama import load
from mlx_codellama.api import CodeLlama
from mlx_codellama.cache import Floats, KVCache, make_sequence
from mlx_codellama.cache import Sequence as CachedSequence
from mlx_codellama.storage import KVStorage

STORAGES = [("16 bits", 16), ("8 bits", 8), ("K 8, V 4 bits", (8, 4)), ("K 4, V 8 bits", (4, 8)), ("4 bits", 4)]
BUCKETS = 4  # parts of the context


@dataclass(frozen=True)
class MlxQuantised(Floats):
    """Keys and values through mx.quantize and back, in float32 with float16 scales and biases: what peers store."""

    bits: int = 8
    group_size: int = 64

    def encode(self, k: mx.array, v: mx.array) -> list[mx.array]:
        return [self._there_and_back(k), self._there_and_back(v)]

    def _there_and_back(self, x: mx.array) -> mx.array:
        codes, scales, biases = mx.quantize(x, self.group_size, self.bits)
        pair = (part.astype(mx.float16).astype(mx.float32) for part in (scales, biases))
        return mx.dequantize(codes, *pair, self.group_size, self.bits)


@dataclass
class Reading:
    """One storage over all windows: per token the loss (nats) and the KL divergence from the reference (nats)."""

    loss: np.ndarray  # float64 [windows, L - 1]
    kl: np.ndarray  # [windows, L]


def windows(model: CodeLlama, count: int) -> list[list[int]]:
    """The first ids of `count` files that are long enough, in order of their names."""
    length, found = model.args.max_position_embeddings, []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        ids = model.tokenizer.encode(text[: 12 * length], bos=True)
        if len(ids) >= length:
            found.append(ids[:length])
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)]


def log_probs(model: CodeLlama, cache: CachedSequence, ids: Sequence[int], chunk: int) -> np.ndarray:
    """float64 [L, V]"""
    parts = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        logits = model.model(mx.array([part]), [(cache, len(part))])[0]
        mx.eval(logits, cache.arrays)
        parts.append(np.array(logits).astype(np.float64))
    logits = np.concatenate(parts)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def loss_of(logs: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    return -logs[np.arange(len(ids) - 1), ids[1:]]


def by_position(what: str, values: list[float]) -> str:
    return f"{what} by quarter of the context {', '.join(f'{value:.2g}' for value in values)}".lstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; default: the bundled demo model")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--chunk", type=int, default=64, help="tokens read at once")
    chosen = parser.parse_args()
    model = load(chosen.model, dtype="float32")
    args, texts = model.args, windows(model, chosen.windows)
    length, group = args.max_position_embeddings, 64 if args.head_dim % 64 == 0 else 32

    def caches(name: str) -> CachedSequence:
        if name.endswith("mx.quantize"):
            bits = int(name.split()[0])
            return CachedSequence(
                [KVCache(MlxQuantised(bits=bits, group_size=group)) for _ in range(args.num_hidden_layers)]
            )
        return make_sequence(args, KVStorage.of(dict(STORAGES)[name]))

    names = [*(name for name, _ in STORAGES), "8 bits by mx.quantize", "4 bits by mx.quantize"]
    reference: list[np.ndarray] = []
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for ids in texts:
        truth = log_probs(model, make_sequence(args), ids, chosen.chunk)
        reference.append(loss_of(truth, ids))
        for name in names:
            logs = log_probs(model, caches(name), ids, chosen.chunk)
            readings[name].append(Reading(loss_of(logs, ids), (np.exp(truth) * (truth - logs)).sum(-1)))
        harness.report(f"{len(reference)} of {len(texts)} windows")

    base = np.stack(reference)  # [windows, L - 1]
    edges = [length * i // BUCKETS for i in range(BUCKETS + 1)]
    result = harness.Result("kv_quality", f"Quality of keys and values in fewer bits, demo model, {length} tokens")
    parts = [slice(first, last) for first, last in itertools.pairwise(edges)]
    result.add("float32: loss", "nats", [base.mean()], note=by_position("loss", [base[:, p].mean() for p in parts]))
    for name in names:
        kl = np.stack([r.kl for r in readings[name]])
        more = np.stack([r.loss for r in readings[name]]) - base
        note = f"{by_position('KL', [kl[:, p].mean() for p in parts])}; loss {more.mean():+.2g}, "
        note += by_position("", [more[:, p].mean() for p in parts])
        result.add(
            f"{name}: KL",
            "nats",
            [kl.mean()],
            note=note + ("; target for this model: under 1e-4" if name == "8 bits" else ""),
        )
    result.notes.append(
        f"{len(texts)} windows of {length} tokens from files of Python's standard library, read {chosen.chunk} at a "
        "time. KL: of the next token's distribution from the one with float32 keys and values, mean over tokens. "
        "`mx.quantize` stores what peers do."
    )
    result.save()


if __name__ == "__main__":
    main()
