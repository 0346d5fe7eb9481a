"""What a step over several sequences costs beside a step of one, and attention over segments beside one piece.

    python benchmarks/sequences.py [--geometry 1.1b] [--layers 8] [--context 512] [--kv-bits 16] [--repeat 15]

Needs no weights. Rows are ratios of medians that were measured in turns: a step of N sequences with one token each to a
step of one (the aim: at most 2 for 4 sequences, 4 for 8), a step of N tokens of one sequence to the same, and attention
over three segments to the same keys in one piece (the aim: at most 1.05).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
import mlx.core as mx
from harness import Result

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.config import GEOMETRIES
from mlx_codellama.kernels.kv_attention_segments import Segment, kv_attention_segments
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.loader import random_model
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.storage import KVStorage


def timed(*tasks: Callable[[], object], repeat: int) -> list[list[float]]:
    """Seconds of each task, taken in turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for i in range(repeat + 1):
        for task, found in zip(tasks, seconds, strict=True):
            start = time.perf_counter()
            task()
            if i:
                found.append(time.perf_counter() - start)
    return seconds


def step(model: Model, sequences: list[Sequence], n_tokens: int) -> None:
    """One pass that is forgotten again."""
    ids = mx.array([[7] * (n_tokens * len(sequences))], mx.int32)
    arrays = [array for sequence in sequences for array in sequence.arrays]
    mx.eval(model.hidden(ids, [(sequence, n_tokens) for sequence in sequences], prompt=False), arrays)
    for sequence in sequences:
        sequence.trim(n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="1.1b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--kv-bits", type=int, choices=(16, 8, 4), default=16)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    geometry = dataclasses.replace(GEOMETRIES[args.geometry], num_hidden_layers=args.layers)
    model = random_model(with_bits(geometry, args.bits))
    storage = KVStorage(args.kv_bits, args.kv_bits)
    result = Result(
        "sequences",
        f"Several sequences at once, {args.geometry} geometry ({args.layers} layers), {args.bits}-bit weights, "
        f"{args.context} tokens each, {args.kv_bits}-bit keys and values",
    )
    sequences = [make_sequence(model.args, storage) for _ in range(8)]
    prompt = mx.array([[i % 1000 for i in range(args.context)]], mx.int32)
    for sequence in sequences:
        mx.eval(model.hidden(prompt, [(sequence, args.context)]), sequence.arrays)

    counts = (1, 2, 4, 8)
    tasks = [lambda n=n: step(model, sequences[:n], 1) for n in counts]
    tasks += [lambda n=n: step(model, sequences[:1], n) for n in counts[1:]]
    one, *others = (statistics.median(seconds) for seconds in timed(*tasks, repeat=args.repeat))
    result.add("a step of one token", "ms", [1000 * one])
    for n, seconds in zip(counts[1:], others, strict=False):
        result.add(f"a step of {n} sequences", "x", [seconds / one], note=f"tokens in all: {n * one / seconds:.2f} x")
    for n, seconds in zip(counts[1:], others[3:], strict=True):
        result.add(f"a step of {n} tokens of one sequence", "x", [seconds / one])

    heads, kv_heads, width, total = geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim, 4096
    fmt = RowFormat(width, 4, 4)
    k, v = (mx.random.normal((1, kv_heads, total, width), key=mx.random.key(i)) for i in (1, 2))
    rows = fmt.pack(k, v)
    ends = (0, 1700, 3001, total)
    pieces = [mx.contiguous(rows[:, :, a:b]) for a, b in itertools.pairwise(ends)]
    q = mx.random.normal((1, heads, 1, width), key=mx.random.key(3))
    mx.eval(rows, pieces, q)
    forms = [[Segment([rows], total)], [Segment([piece], piece.shape[2]) for piece in pieces]]

    def attend(segments: list[Segment]) -> None:
        mx.eval([kv_attention_segments(q, segments, fmt, scale=0.1, prompt=False) for _ in range(20)])

    whole, cut = timed(*(lambda form=form: attend(form) for form in forms), repeat=4 * args.repeat)
    result.add(f"attention over {total} tokens in 3 segments", "x", [statistics.median(cut) / statistics.median(whole)])
    result.save()


if __name__ == "__main__":
    main()
