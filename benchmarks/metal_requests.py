"""Bytes of the K/V cache that the Metal decode kernels ask for, counted thread by thread in tools/metal_sim.

    python benchmarks/metal_requests.py

1.0 means that each byte of the cache's rows is requested once for all query heads and queries that share it. A count
of requests, exact and the same on every machine; it says nothing about time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.packed_kv import RowFormat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
from harness import Result  # noqa: E402
from metal_sim import simulated  # noqa: E402

N_TOKENS, HEAD_DIM, N_KV = 1021, 128, 2
CASES = [  # name, query heads per kv head, queries
    ("MHA, 1 query", 1, 1),
    ("MHA, 8 queries", 1, 8),
    ("GQA-4, 1 query", 4, 1),
    ("GQA-8, 1 query", 8, 1),
    ("GQA-8, 2 queries", 8, 2),
    ("GQA-8, 8 queries", 8, 8),
]
BITS = ((4, 4), (8, 4), (8, 8), (16, 16))


def main() -> None:
    result = Result(
        "metal_requests", "Bytes of K and V that the Metal decode kernels request, as multiples of the cache"
    )
    random = np.random.default_rng(7)
    for name, n_rep, length in CASES:
        for k_bits, v_bits in BITS:
            fmt = RowFormat(HEAD_DIM, k_bits, v_bits)
            k, v = (
                mx.array(random.standard_normal((1, N_KV, N_TOKENS, HEAD_DIM)).astype(np.float32)) for _ in range(2)
            )
            q = mx.array(random.standard_normal((1, N_KV * n_rep, length, HEAD_DIM))).astype(mx.float16)
            rows = fmt.pack(k, v)
            plan = gpu.plan("metal", q.dtype, fmt, n_rep * length)
            assert plan is not None
            with simulated() as simulation:
                gpu.attend(plan, q, rows, scale=0.1, offset=N_TOKENS - length)
            report = next(report for report in simulation.reports if "rows" in report.traffic)
            traffic = report.traffic["rows"]
            words = traffic.reads.reshape(-1, fmt.words, 4)[:, :, 0].sum(axis=0)
            codes = words[: fmt.k_scale_start].sum() / (N_KV * N_TOKENS * fmt.k_scale_start)
            result.add(
                f"{name}, K{k_bits} V{v_bits}",
                "× the cache",
                [traffic.read / (N_KV * N_TOKENS * fmt.bytes)],
                note=f"codes alone {codes:.3f} ×; {plan.kernel.name}",
                bytes=int(traffic.read),
            )
    result.notes.append(
        f"{N_TOKENS} tokens, {N_KV} kv heads of {HEAD_DIM}; simulated, never run on Apple hardware. A tile holds up to "
        "16 query rows (heads × queries) of a kv head; more rows read the cache once per tile."
    )
    result.save()


if __name__ == "__main__":
    main()
