"""MLX's own Metal kernels, from the headers in its wheel: they are right, so the simulator must agree with MLX's CPU
and find nothing. Sharp checks that cried wolf here would be worthless on our kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, Memory, Report
from metal_sim.launch import launch
from metal_sim.lint import lint
from metal_sim.simulator import PRELUDE, from_numpy, mlx_headers, to_numpy
from metal_sim.translate import translate

TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
FOLDER = "mlx/backend/metal/kernels/"


@pytest.fixture(autouse=True)
def _simulator(needs_simulator: None) -> None:
    """On a Mac there is nothing to test here."""


def run(
    header: str,
    name: str,
    template: str,
    inputs: dict[int, np.ndarray[Any, Any]],
    outputs: dict[int, np.ndarray[Any, Any]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    constants: dict[int, int] | None = None,
    order: str = "forward",
) -> Report:
    """One launch of a kernel in a header of MLX. It must be clean, and so must its text."""
    kernel = translate(
        f'#include "{FOLDER}{header}"\n',
        name,
        template=template,
        constants=constants,
        folders=[mlx_headers()],
        prelude=PRELUDE,
    )
    buffers = {slot: Memory(data) for slot, data in inputs.items()}
    buffers |= {slot: Memory(data, writable=True) for slot, data in outputs.items()}
    report = launch(kernel, buffers, grid, threadgroup, order=order, seed=11)
    assert report.findings == []
    assert lint(kernel, header.rpartition("/")[2]) == ()
    return report


def one(value: float, dtype: str) -> np.ndarray[Any, Any]:
    return np.array([value], dtype)


def fresh(n: int, dtype: mx.Dtype) -> np.ndarray[Any, Any]:
    return np.zeros(n, to_numpy(mx.zeros((1,), dtype)).dtype)


def assert_close(got: np.ndarray[Any, Any], dtype: mx.Dtype, want: mx.array, roundings: int) -> None:
    """`roundings` to the dtype, and float32 arithmetic, relative to the largest value."""
    values = np.array(from_numpy(got, dtype).astype(mx.float32)).astype(np.float64)
    expected = np.array(want.astype(mx.float32)).astype(np.float64).reshape(-1)
    allowed = np.abs(expected).max() * (roundings * ROUNDOFF[dtype] + 4e-6)
    assert np.abs(values - expected).max() <= allowed


def qkv(dtype: mx.Dtype, heads: int, kv_heads: int, n: int, d: int, queries: int = 1) -> list[mx.array]:
    mx.random.seed(n)
    shapes = ((1, heads, queries, d), (1, kv_heads, n, d), (1, kv_heads, n, d))
    return [mx.random.normal(shape).astype(dtype) for shape in shapes]


def attention(q: mx.array, k: mx.array, v: mx.array, mask: str | None = None) -> mx.array:
    """MLX's CPU, in float32."""
    wide = (a.astype(mx.float32) for a in (q, k, v))
    return mx.fast.scaled_dot_product_attention(*wide, scale=q.shape[-1] ** -0.5, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_sdpa_vector(dtype: mx.Dtype, order: str) -> None:
    heads, kv_heads, n, d = 2, 1, 75, 64
    q, k, v = qkv(dtype, heads, kv_heads, n, d)
    out = fresh(heads * d, dtype)
    strides = (one(x, "uint64") for x in (n * d, d, n * d, d))
    inputs = dict(enumerate([to_numpy(a) for a in (q, k, v)]))
    inputs |= {4: one(heads // kv_heads, "int32"), 5: one(n, "int32"), 10: one(d**-0.5, "float32")}
    inputs |= dict(zip((6, 7, 8, 9), strides, strict=True))
    template = f"<{TYPES[dtype]}, {d}, {d}>"
    report = run(
        "sdpa_vector.h", "sdpa_vector", template, inputs, {3: out}, (heads * 1024, 1, 1), (1024, 1, 1), order=order
    )
    assert_close(out, dtype, attention(q, k, v), 1)
    assert report.threadgroup_bytes == (32 * 32 + 32 + 32) * 4
    assert report.traffic["keys"].read == heads * n * d * dtype.size  # this kernel reads the cache once per query head


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("gqa", [False, True])
def test_sdpa_vector_in_two_passes(dtype: mx.Dtype, gqa: bool) -> None:
    kv_heads, n, d, blocks = 1, 77, 64, 32
    heads = 8 if gqa else 3
    q, k, v = qkv(dtype, heads, kv_heads, n, d)
    parts, out = fresh(heads * blocks * d, dtype), fresh(heads * d, dtype)
    sums, tops = (np.zeros(heads * blocks, np.float32) for _ in range(2))
    inputs = dict(enumerate([to_numpy(a) for a in (q, k, v)])) | {7: one(n, "int32"), 12: one(d**-0.5, "float32")}
    inputs |= {slot: one(x, "uint64") for slot, x in zip((8, 9, 10, 11), (n * d, d, n * d, d), strict=True)}
    name = "sdpa_vector_2pass_1" + ("_gqa" if gqa else "")
    template = f"<{TYPES[dtype]}, {d}, {d}" + (", 8, 4>" if gqa else ">")
    grid = (kv_heads * 32, heads // kv_heads, blocks)
    outputs = {3: parts, 4: sums, 5: tops}
    first = run("sdpa_vector.h", name, template, inputs, outputs, grid, (32, heads // kv_heads, 1), {26: blocks})
    assert first.traffic["keys"].read == (2 if gqa else heads) * n * d * dtype.size
    inputs = {0: parts, 1: sums, 2: tops, 4: one(blocks, "int32")}
    template = f"<{TYPES[dtype]}, {d}>"
    run("sdpa_vector.h", "sdpa_vector_2pass_2", template, inputs, {3: out}, (heads * 1024, 1, 1), (1024, 1, 1))
    assert_close(out, dtype, attention(q, k, v), 2)  # the parts are kept in the dtype


@pytest.mark.parametrize(
    ("dtype", "order", "d", "causal"),
    [
        (mx.float32, "forward", 64, True),
        (mx.float16, "random", 128, True),
        (mx.bfloat16, "reverse", 64, True),
        (mx.float16, "forward", 64, False),
    ],
)
def test_steel_attention(dtype: mx.Dtype, order: str, d: int, causal: bool) -> None:
    """simdgroup_matrix products, four simdgroups, ragged edges; a threadgroup's tile of q, k and v."""
    heads, kv_heads, n_q, n_k = 2, 1, 37, 45
    q, k, v = qkv(dtype, heads, kv_heads, n_k, d, n_q)
    b_q, b_k = 32, 16 if d >= 128 else 32
    out = fresh(heads * n_q * d, dtype)
    numbers = (
        np.array([1, heads, d, n_q, n_k, heads // kv_heads], np.int32).tobytes() + one(d**-0.5, "float32").tobytes()
    )
    tiles = (-(-n_q // b_q), -(-n_k // b_k), n_q // b_q, n_k // b_k, n_q % b_q, n_k % b_k, n_k - n_q)
    numbers += np.array(tiles, np.int32).tobytes()
    numbers += b"\0" * (-len(numbers) % 8)
    extents = ((heads, n_q), (kv_heads, n_k), (kv_heads, n_k), (heads, n_q))
    numbers += np.array([s for h, n in extents for s in (h * n * d, n * d, d)], np.int64).tobytes()
    inputs = dict(enumerate([to_numpy(a) for a in (q, k, v)])) | {4: np.frombuffer(numbers, np.uint8).copy()}
    constants = {200: int(n_q % b_q == 0), 201: int(n_k % b_k == 0), 301: int(causal)}
    template = f"<{TYPES[dtype]}, {b_q}, {b_k}, {d}, {d}, 4, 1, {TYPES[dtype]}, float>"
    grid = (32 * tiles[0], 4 * heads, 1)
    file = "steel/attn/kernels/steel_attention.h"
    run(file, "attention", template, inputs, {3: out}, grid, (32, 4, 1), constants, order)
    assert_close(out, dtype, attention(q, k, v, "causal" if causal else None), 2)  # q is scaled in the dtype


@pytest.mark.parametrize("dtype", TYPES)
def test_softmax(dtype: mx.Dtype) -> None:
    rows, n = 3, 130
    x = mx.random.normal((rows, n)).astype(dtype)
    out = fresh(rows * n, dtype)
    threads = 64  # four values each, whole simdgroups
    inputs = {0: to_numpy(x), 2: one(n, "int32")}
    template = f"<{TYPES[dtype]}, float>"
    run("softmax.h", "softmax_single_row", template, inputs, {1: out}, (rows * threads, 1, 1), (threads, 1, 1))
    assert_close(out, dtype, mx.softmax(x.astype(mx.float32), axis=-1), 1)
