"""What the shim says MSL means: simdgroup functions against numpy, roundings, orders, counts of bytes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import simulated

LANES = 32


@pytest.fixture(autouse=True)
def _simulator(needs_simulator: None) -> None:
    """On a Mac there is nothing to test here."""


def run(
    source: str, a: mx.array, *, outputs: int = LANES, threads: int = LANES, **settings: Any
) -> np.ndarray[Any, Any]:
    """`source` over float32 `a` by one threadgroup → float32 [outputs]."""
    with simulated(**settings):
        kernel = mx.fast.metal_kernel(
            name="language",
            input_names=["a"],
            output_names=["out"],
            source="const uint i = thread_position_in_grid.x;\n" + source,
            atomic_outputs="atomic" in source,
        )
        (out,) = kernel(
            inputs=[a],
            grid=(threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(outputs,)],
            output_dtypes=[mx.float32],
        )
    return np.array(out)


X = np.random.default_rng(3).integers(-9, 9, LANES).astype(np.float32)
I = np.arange(LANES)
QUADS = X.reshape(8, 4)
MEANINGS = {
    "simd_sum(x)": np.full(LANES, X.sum()),
    "simd_product(x < -5 ? 2.0f : 1.0f)": np.full(LANES, 2.0 ** (X < -5).sum()),
    "simd_max(x)": np.full(LANES, X.max()),
    "simd_min(x)": np.full(LANES, X.min()),
    "float(simd_or(uint(i & 5)))": np.full(LANES, 5),
    "float(simd_and(uint(i | 16)))": np.full(LANES, 16),
    "float(simd_xor(uint(1) << i))": np.full(LANES, np.float32(2**32 - 1)),
    "simd_broadcast(x, 7)": np.full(LANES, X[7]),
    "simd_broadcast_first(x)": np.full(LANES, X[0]),
    "simd_shuffle(x, ushort((i * 5) % 32))": X[I * 5 % 32],
    "simd_shuffle_xor(x, 6)": X[I ^ 6],
    "simd_shuffle_down(x, 3)": np.where(I + 3 < 32, X[(I + 3) % 32], X),
    "simd_shuffle_up(x, 3)": np.where(I >= 3, X[(I - 3) % 32], X),
    "simd_shuffle_rotate_down(x, 3)": np.roll(X, -3),
    "simd_shuffle_rotate_up(x, 3)": np.roll(X, 3),
    "simd_shuffle_and_fill_up(x, -x, 2)": np.where(I >= 2, X[(I - 2) % 32], -X[(I + 30) % 32]),
    "simd_shuffle_and_fill_down(x, -x, 2)": np.where(I < 30, X[(I + 2) % 32], -X[(I + 2) % 32]),
    "simd_prefix_inclusive_sum(x)": np.cumsum(X),
    "simd_prefix_exclusive_sum(x)": np.cumsum(X) - X,
    "float(ulong(simd_ballot(x > 0)) & 0xffffu)": np.full(LANES, (X[:16] > 0) @ 2.0 ** np.arange(16)),
    "simd_any(x > 8) ? 1.0f : 0.0f": np.full(LANES, (X > 8).any()),
    "simd_all(x > -10) ? 1.0f : 0.0f": np.ones(LANES),
    "simd_is_first() ? 1.0f : 0.0f": I == 0,
    "quad_sum(x)": QUADS.sum(1).repeat(4),
    "quad_max(x)": QUADS.max(1).repeat(4),
    "quad_broadcast(x, 2)": QUADS[:, 2].repeat(4),
    "quad_shuffle_xor(x, 1)": X[I ^ 1],
}


def test_simdgroup_functions_are_what_msl_says() -> None:
    """All in one kernel, lanes in a random order."""
    lines = "".join(f"out[{k * LANES} + i] = {text};\n" for k, text in enumerate(MEANINGS))
    got = run("const float x = a[i];\n" + lines, mx.array(X), outputs=LANES * len(MEANINGS), order="random", seed=4)
    for text, row in zip(MEANINGS, got.reshape(-1, LANES), strict=True):
        np.testing.assert_array_equal(row, MEANINGS[text], err_msg=text)


def test_simdgroup_matrices_multiply_as_matrices_and_a_number_makes_a_diagonal() -> None:
    """5 × left @ right + 2 × identity, stored with a stride; both loaded from one buffer, the right one transposed."""
    left, right = np.random.default_rng(8).integers(-4, 5, (2, 8, 8)).astype(np.float32)
    source = """
    simdgroup_float8x8 x, y, z(2.0f), five(5.0f);
    simdgroup_load(x, a, 8);
    simdgroup_load(y, a + 64, 8, ulong2(0, 0), true);
    simdgroup_multiply(x, five, x);
    simdgroup_multiply_accumulate(z, x, y, z);
    for (uint j = i; j < 80; j += 32) out[j] = 0;
    threadgroup_barrier(mem_flags::mem_device);
    simdgroup_store(z, out, 10);
    """
    given = mx.array(np.concatenate([left.reshape(-1), right.T.reshape(-1)]))
    got = run(source, given, outputs=80).reshape(8, 10)
    np.testing.assert_array_equal(got[:, :8], 5 * left @ right + 2 * np.eye(8))
    assert (got[:, 8:] == 0).all()


@pytest.mark.parametrize("checked", [False, True])
def test_half_and_bfloat_round_after_every_operation(checked: bool) -> None:
    """1 + 2^-11 is 1 in half, so the difference is lost; in float, or fused, it would be there."""
    source = """
    const half h = half(a[1]), tiny = half(a[2]);
    const bfloat b = bfloat(a[1]), small = bfloat(a[3]);
    const float values[6] = {
      float((h + tiny) - h), float(fma(h, h, tiny) - h), float((b + small) - b),
      1.0 / 3, float(bfloat(a[4])), float(half(a[4]))
    };
    if (i < 6) out[i] = values[i];
    """
    value = np.float32(1.00390625 + 0.001)  # between two bfloats, above the middle
    a = mx.array([0, 1, 2.0**-11, 2.0**-8, float(value), 0, 0, 0, 0])
    expected = [0, 0, 0, np.float32(1) / np.float32(3), 1.0078125, float(np.float16(value))]
    np.testing.assert_array_equal(run(source, a, outputs=6, checked=checked), np.array(expected, np.float32))


def test_threads_run_in_the_order_that_is_asked_for() -> None:
    """Each thread draws a number and leaves its own index there."""
    source = """
    threadgroup atomic_uint next;
    if (i == 0) atomic_store_explicit(&next, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint ticket = atomic_fetch_add_explicit(&next, 1u, memory_order_relaxed);
    atomic_store_explicit(&out[ticket], float(i), memory_order_relaxed);
    """
    n = 70
    drawn = {
        name: run(source, mx.zeros((9,)), outputs=n, threads=n, **settings).tolist()
        for name, settings in {
            "forward": {},
            "reverse": {"order": "reverse"},
            "random": {"order": "random", "seed": 1},
            "again": {"order": "random", "seed": 1},
            "other": {"order": "random", "seed": 2},
        }.items()
    }
    assert drawn["forward"] == list(range(n))
    assert drawn["reverse"] == list(range(n))[::-1]
    assert drawn["random"] == drawn["again"] != drawn["other"]
    assert sorted(drawn["random"]) == sorted(drawn["other"]) == list(range(n))


def test_bytes_are_counted_for_each_byte_and_each_threadgroup() -> None:
    """Three threadgroups of 8: each thread reads its own float and the first half of a[0]; a[30] is read by nobody."""
    with simulated() as sim:
        kernel = mx.fast.metal_kernel(
            name="counted",
            input_names=["a"],
            output_names=["out"],
            source="const uint i = thread_position_in_grid.x;\nout[i] = a[i] + float(*(const device half*)a);",
        )
        kernel(
            inputs=[mx.zeros((31,))],
            grid=(24, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(24,)],
            output_dtypes=[mx.float32],
        )
    traffic = sim.last.traffic["a"]
    assert (traffic.read, traffic.written) == (24 * 6, 0)
    assert sim.last.traffic["out"].written == 24 * 4
    assert traffic.reads is not None
    assert traffic.groups is not None
    assert traffic.reads.tolist() == [25, 25, 1, 1] + [1] * 92 + [0] * 28
    assert traffic.groups.tolist() == [3, 3, 1, 1] + [1] * 92 + [0] * 28
