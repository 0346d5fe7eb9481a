"""How fast the quantised product is: decode against the memory's read rate, prefill in operations, both against MLX.

    python benchmarks/quant_matmul.py [--repeat 5] [--quick]

Needs no weights. Decode reads every matrix of a layer of the 7B geometry once; the read rate is measured in the same
run, in turn with it. MLX's `quantized_matmul` is the peer, on one matrix, for it is slow. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
import mlx.core as mx
import numpy as np
from harness import Result, report
from mlx_codellama_cpu import ops

WIDTH, INNER, LAYERS, GROUP = 4096, 11008, 32, 64
MATRICES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]  # one layer: [outputs, inputs]
Packed = tuple[mx.array, mx.array, mx.array]


def packed(n_out: int, n_in: int, bits: int, dtype: mx.Dtype) -> Packed:
    weight, scales, biases = mx.quantize(mx.random.normal((n_out, n_in)), group_size=GROUP, bits=bits)
    parts = weight, scales.astype(dtype), biases.astype(dtype)
    mx.eval(parts)
    return parts


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    mx.eval(f())
    return time.perf_counter() - start


def read_rate(words: np.ndarray, pool: ThreadPoolExecutor, n: int) -> float:
    """Bytes per second at which n threads read an array much larger than the caches."""
    start = time.perf_counter()
    list(pool.map(np.bitwise_or.reduce, np.array_split(words, n)))
    return words.nbytes / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="4 bit and few rows alone")
    args = parser.parse_args()
    result = Result("quant_matmul", "Quantised product of the 7B geometry, groups of 64, bfloat16 scales")
    result.notes.append(f"instruction set {ops.isa()}, {ops.threads()} threads")
    words = np.ones(1 << 26, np.uint64)
    with ThreadPoolExecutor(ops.threads()) as pool:
        for bits in (4,) if args.quick else (4, 8):
            decode(result, bits, args.repeat, lambda: read_rate(words, pool, ops.threads()))
    for bits in (4,) if args.quick else (4, 8):
        for rows in (8, 64) if args.quick else (8, 64, 512):
            prefill(result, bits, rows, args.repeat)
    result.save()


def decode(result: Result, bits: int, repeat: int, read: Callable[[], float]) -> None:
    layer = [packed(*shape, bits, mx.bfloat16) for shape in MATRICES]
    n_bytes = sum(part.nbytes for parts in layer for part in parts)
    inputs = {n: mx.random.normal((1, n)) for n in (WIDTH, INNER)}
    settings = {"group_size": GROUP, "bits": bits}

    def native(terms: int) -> list[mx.array]:
        pairs = zip(MATRICES, layer, strict=True)
        return [ops.quant_matmul(inputs[n], *parts, **settings, terms=terms) for (_, n), parts in pairs]

    first, x = layer[0], inputs[WIDTH]
    peers = {"bfloat16": first, "float32": (first[0], *(a.astype(mx.float32) for a in first[1:]))}
    rates: dict[str, list[float]] = {"read": [], "exact": [], "int8": []}
    peer_rates: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(repeat + 1):  # the first round only warms
        now = {"read": read(), **{n: n_bytes / seconds(lambda t=t: native(t)) for n, t in (("exact", 0), ("int8", 2))}}
        for name, rate in now.items():
            rates[name] += [rate / 1e9] if i else []
    one_bytes = sum(part.nbytes for part in first)
    for name, parts in peers.items():
        for _ in range(2):
            s = seconds(lambda p=parts: mx.quantized_matmul(x, *p, transpose=True, **settings))
            peer_rates[name].append(one_bytes / s / 1e9)
    read_gb = result.add(f"{bits} bit: read rate of the memory, {ops.threads()} threads", "GB/s", rates["read"])
    for name, label in (("exact", "float32 activations"), ("int8", "two int8 terms")):
        label = f"{bits} bit decode, {label}"
        gb = result.add(label, "GB/s", rates[name], bytes=n_bytes, note="target 85 % of the read rate")
        result.add(
            f"{label}: share of the read rate", "", [a / b for a, b in zip(rates[name], rates["read"], strict=True)]
        )
        report(f"    {gb / read_gb:.0%}; layers of 7B alone: {gb * 1e9 / n_bytes / LAYERS:.1f} tok/s")
    for name, values in peer_rates.items():
        result.add(f"{bits} bit decode, mx.quantized_matmul, {name} scales", "GB/s", values, note="peer")


def prefill(result: Result, bits: int, rows: int, repeat: int) -> None:
    parts, x = packed(WIDTH, WIDTH, bits, mx.bfloat16), mx.random.normal((rows, WIDTH))
    settings = {"group_size": GROUP, "bits": bits}
    work = 2 * rows * WIDTH * WIDTH / 1e9
    forms = {"float32 activations": 0, "two int8 terms": 2, "one int8 term": 1}
    values: dict[str, list[float]] = {name: [] for name in [*forms, "peer"]}
    wide = parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)
    for i in range(repeat + 1):
        for name, terms in forms.items():
            rate = work / seconds(lambda t=terms: ops.quant_matmul(x, *parts, **settings, terms=t))
            values[name] += [rate] if i else []
    if rows <= 64:
        for _ in range(2):
            peer_s = seconds(lambda: mx.quantized_matmul(x, *wide, transpose=True, **settings))
            values["peer"].append(work / peer_s)
    for name in forms:
        result.add(f"{bits} bit, {rows} rows, {name}", "GFLOP/s", values[name])
    if values["peer"]:
        result.add(
            f"{bits} bit, {rows} rows, mx.quantized_matmul, float32 scales", "GFLOP/s", values["peer"], note="peer"
        )


if __name__ == "__main__":
    main()
