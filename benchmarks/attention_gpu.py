"""Decode attention on a GPU: right first, then how fast, beside MLX's 16-bit kernel and mlx-lm's quantised path.

    python benchmarks/attention_gpu.py [--contexts 4096,16384,65536,131072] [--rounds 15]

Needs a Mac, or Linux with an NVIDIA GPU and `make CUDA=1`; mlx-lm (the `peers` extra) for its rows. Ends with status 1
before anything is timed where a kernel differs from its reference. It has not been run yet: no GPU was at hand when it
was written, so benchmarks/results holds no file of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import catalogue
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.gpu.selftest import attention_truth, float64
from mlx_codellama.kernels.packed_kv import RowFormat

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Result, report

HEADS = {"7B": (32, 32), "34B and 70B": (64, 8)}  # query heads, kv heads of one layer; heads of 128 values
WIDTHS = ((4, 4), (8, 8))
SCALE = 128**-0.5
CHAIN = 20  # attentions in a row, each with the last one's result as its query
Attend = Callable[[mx.array], mx.array]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--contexts", default="4096,16384,65536,131072")
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    language = dispatch.backend()
    if language == "cpu":
        sys.exit("error: MLX computes on the CPU here; this benchmark needs a GPU")
    right(language)
    result = Result(f"attention_{language}", f"Decode attention of one layer on {language}, one query per head")
    bandwidth = copy_bytes_per_s()
    result.add("copy of 1 GiB, read and written", "GB/s", [bandwidth / 1e9])
    for name, heads in HEADS.items():
        for n_tokens in map(int, given.contexts.split(",")):
            compare(result, language, name, heads, n_tokens, given.rounds, bandwidth)
    result.notes.append("share: bytes of the cache per second, over what a copy reaches on this device in the same run")
    result.save()


def right(language: str) -> None:
    """Every kernel on its self-test, then whole layers of odd lengths; ends the process at the first that is wrong."""
    failed = [found for found in catalogue.table(language) if not found.passed]
    for found in failed:
        report(f"{found.kernel}: {found.error}")
    for heads in HEADS.values():
        for n_tokens in (1, 77, 4099):
            for bits in (*WIDTHS, (8, 4), (16, 16)):
                for length in (1, 2, 5, 8):
                    if length <= n_tokens and not agrees(language, heads, n_tokens, length, RowFormat(128, *bits)):
                        failed.append(None)
                        report(f"{heads} heads, {n_tokens} tokens, {length} queries, {bits} bits: wrong")
    if failed:
        sys.exit(f"error: {len(failed)} checks failed")


def agrees(language: str, heads: tuple[int, int], n_tokens: int, length: int, fmt: RowFormat) -> bool:
    """Within two roundings to float16 of float64, relative to the largest value.

    In numpy: MLX's float32 products on CUDA are rounded to 11 bits (TF32), which is as much as is allowed here.
    """
    q, k, v = inputs(heads, n_tokens, length)
    rows = fmt.pack(k, v)
    plan = gpu.plan(language, q.dtype, fmt, heads[0] // heads[1] * length)
    assert plan is not None
    got = float64(gpu.attend(plan, q, rows, scale=SCALE, offset=n_tokens - length))
    want = attention_truth(q, *fmt.unpack(rows), scale=SCALE, offset=n_tokens - length)
    return bool(np.abs(got - want).max() <= 2 * 2**-11 * np.abs(want).max())


def inputs(heads: tuple[int, int], n_tokens: int, length: int) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(n_tokens)
    shapes = [(1, heads[0], length, 128), (1, heads[1], n_tokens, 128), (1, heads[1], n_tokens, 128)]
    q, k, v = (mx.random.normal(shape, dtype=mx.float16) for shape in shapes)
    mx.eval(q, k, v)
    return q, k, v


def compare(
    result: Result, language: str, name: str, heads: tuple[int, int], n_tokens: int, rounds: int, bandwidth: float
) -> None:
    """All ways at one shape, interleaved."""
    q, k, v = inputs(heads, n_tokens, 1)
    ways: dict[str, tuple[Attend, int]] = {
        "16 bit, mx.fast": (lambda x: mx.fast.scaled_dot_product_attention(x, k, v, scale=SCALE), k.nbytes + v.nbytes)
    }
    for k_bits, v_bits in WIDTHS:
        fmt = RowFormat(128, k_bits, v_bits)
        ways[f"K{k_bits} V{v_bits}, ours"] = ours(language, heads, n_tokens, fmt, fmt.pack(k, v))
        if k_bits == v_bits and (peer := mlx_lm(k, v, k_bits)):
            ways[f"{k_bits} bit, mlx-lm"] = peer
    times: dict[str, list[float]] = {way: [] for way in ways}
    for attend, _ in ways.values():
        chain_s(attend, q)
    for _ in range(rounds):
        for way, (attend, _) in ways.items():
            times[way].append(chain_s(attend, q) * 1e6)
    for way, (_, n_bytes) in ways.items():
        share = n_bytes / (sorted(times[way])[rounds // 2] * 1e-6) / bandwidth
        result.add(f"{name}, {n_tokens} tokens: {way}", "µs", times[way], note=f"share {share:.0%}", bytes=n_bytes)


def ours(language: str, heads: tuple[int, int], n_tokens: int, fmt: RowFormat, rows: mx.array) -> tuple[Attend, int]:
    plan = gpu.plan(language, mx.float16, fmt, heads[0] // heads[1])
    assert plan is not None
    mx.eval(rows)
    return lambda x: gpu.attend(plan, x, rows, scale=SCALE, offset=n_tokens - 1), rows.nbytes


def mlx_lm(k: mx.array, v: mx.array, bits: int) -> tuple[Attend, int] | None:
    """mlx-lm's own function over its own layout, or None where it is not installed."""
    try:
        from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention
    except ImportError:
        return None
    keys, values = (mx.quantize(part, group_size=64, bits=bits) for part in (k, v))
    mx.eval(keys, values)
    n_bytes = sum(part.nbytes for part in (*keys, *values))
    # `+ 0`: that function scales its queries in place
    return lambda x: attention(x + 0, keys, values, scale=SCALE, mask=None, group_size=64, bits=bits), n_bytes


def chain_s(attend: Attend, q: mx.array) -> float:
    """Seconds per attention in a chain of CHAIN, which keeps the device busy and its order fixed.

    The chain is there before the clock starts: Python takes longer for some of these ways than a GPU does.
    """
    for _ in range(CHAIN):
        q = attend(q)
    mx.synchronize()
    start = time.perf_counter()
    mx.eval(q)
    return (time.perf_counter() - start) / CHAIN


def copy_bytes_per_s() -> float:
    """What the device moves when it copies: 1 GiB read and 1 GiB written, best of ten."""
    x = mx.zeros(2**28, mx.float32)
    mx.eval(x)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(x + 1)
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


if __name__ == "__main__":
    main()
