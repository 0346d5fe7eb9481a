"""How fast tokens are written, against llama.cpp, mlx-lm and the memory's read rate.

    python benchmarks/decode.py --geometry 1.1b [--models FOLDER] [--peer-python PYTHON] [--mlx-lm] [--bits 8]

Random weights, 4 bit, groups of 64 (llama.cpp: Q4_0, also 4.5 bits per weight). Every runtime has a process of its own
and is asked in turn. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
from harness import Result
from runtimes import Runtime

from mlx_codellama.config import GEOMETRIES

PROMPT = 16


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--geometry", default="1.1b", choices=list(GEOMETRIES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", type=Path, default=Path("/tmp"), help="folder of GGUF files, written where absent")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has the peers")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def llama_cpp(args: argparse.Namespace, *, context: int = 4096, **options: Any) -> Runtime:
    g = GEOMETRIES[args.geometry]
    file = gguf_models.write(args.models / f"{args.geometry}.gguf", g)
    options |= {"model": str(file), "threads": args.threads, "vocab_size": g.vocab_size, "context": context}
    return Runtime("llama.cpp", args.peer_python, **options)


READER = """
#include <stdint.h>
typedef uint64_t words __attribute__((vector_size(64), aligned(8), may_alias));
uint64_t all_of(const char *p, int64_t n) {  // two streams, as far apart as they can be
  words a = {0}, b = {0};
  for (int64_t i = 0; i + 256 <= n / 2; i += 256)
    for (int j = 0; j < 256; j += 64) a |= *(const words *)(p + i + j), b |= *(const words *)(p + n / 2 + i + j);
  a |= b;
  return a[0] | a[1] | a[2] | a[3] | a[4] | a[5] | a[6] | a[7];
}
"""


def reader(threads: int) -> Callable[[], float]:
    """Bytes per second at which a loop in C does nothing but read an array much larger than the caches. numpy's
    reductions read at 0.85 of its rate where memory is fast."""
    size, pool = 1 << 29, ThreadPoolExecutor(threads)
    words = np.ones(size // 8, np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder) / "reader.so", Path(folder) / "reader.c"
        source.write_text(READER, encoding="utf-8")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
        read = ctypes.CDLL(str(library)).all_of
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    part, first = size // threads, words.ctypes.data

    def rate() -> float:
        start = time.perf_counter()
        list(pool.map(lambda i: read(first + i * part, part), range(threads)))
        return part * threads / (time.perf_counter() - start) + 0 * len(words)

    return rate


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--exact", action="store_true", help="float32 activations as well: a second model in memory")
    parser.add_argument("--mlx-lm", action="store_true", help="measure it too, a few tokens: it is slow")
    args = parser.parse_args()
    name = f"decode-{args.geometry}" + ("" if args.bits == 4 else f"-{args.bits}bit")
    result = Result(name, f"Writing tokens: {args.geometry} geometry, {args.bits} bit, {args.threads} threads")
    read = reader(args.threads)
    runtimes = {"int8": Runtime("ours", geometry=args.geometry, bits=args.bits, threads=args.threads)}
    if args.exact:
        runtimes["exact"] = Runtime("ours", geometry=args.geometry, bits=args.bits, exact=True, threads=args.threads)
    if args.bits == 4:
        runtimes["llama.cpp"] = llama_cpp(args)
    n_bytes = runtimes["int8"].about["bytes"]
    rates: dict[str, list[float]] = {"read": [], **{n: [] for n in runtimes}}
    for i in range(args.repeat + 1):  # the first round only warms
        time.sleep(0.5)  # llama.cpp's threads go on spinning for a while
        now = {"read": (read() + read()) / 2e9}
        for n, runtime in runtimes.items():
            now[n] = args.tokens / runtime.run(PROMPT, args.tokens)[1]
        for n, rate in now.items():
            rates[n] += [rate] if i else []
    for runtime in runtimes.values():
        runtime.close()
    result.add("read rate of the memory", "GB/s", rates["read"])
    result.add("mlx-codellama", "tok/s", rates["int8"], bytes=n_bytes)
    if args.exact:
        result.add("mlx-codellama, exact", "tok/s", rates["exact"], bytes=n_bytes)
    share = ratios([r * n_bytes / 1e9 for r in rates["int8"]], rates["read"])
    result.add("mlx-codellama: bytes per second over the read rate", "", share, note="target 0.85")
    if args.bits == 4:
        result.add("llama.cpp, Q4_0", "tok/s", rates["llama.cpp"], note="peer")
        result.add("mlx-codellama over llama.cpp", "×", ratios(rates["int8"], rates["llama.cpp"]), note="target 1.2")
    if args.mlx_lm:
        for dtype, tokens in (("float32", 3), ("bfloat16", 1)):
            stock = {"MLX_CODELLAMA_BLAS": "0"}
            peer = Runtime("mlx-lm", args.peer_python, stock, geometry=args.geometry, dtype=dtype, bits=args.bits)
            values = [tokens / peer.run(1, tokens)[1] for _ in range(2)]
            peer.close()
            result.add(f"mlx-lm, {dtype}", "tok/s", values, note="peer")
            by = sorted(rates["int8"])[len(rates["int8"]) // 2]
            result.add(f"mlx-codellama over mlx-lm, {dtype}", "×", [by / v for v in values], note="target 40")
    result.save()


if __name__ == "__main__":
    main()
