"""The Metal kernel of rope_append, in the simulator (on a Mac: on its GPU): turned queries, and rows word by word."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, on_metal

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import rope_append as gpu
from mlx_codellama.kernels.gpu.selftest import float64, rotation_truth
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.rope import angles
from mlx_codellama.kernels.rope_append import reference, rope_append

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (16, 8, 4)
Arrays = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]


def arrays(dtype: mx.Dtype, head_dim: int, heads: tuple[int, int], length: int) -> Arrays:
    """q, k, v and the cosines and sines of positions at the far end of the context."""
    random = np.random.default_rng(head_dim + length)
    shapes = [(2, n, length, head_dim) for n in (heads[0], heads[1], heads[1])]
    q, k, v = (mx.array(random.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes)
    turn = angles(np.arange(131_060, 131_060 + length), head_dim, 1e6)
    cos, sin = (mx.array(f(turn).astype(np.float32)) for f in (np.cos, np.sin))
    return q, k, v, cos, sin


def agree(dtype: mx.Dtype, fmt: RowFormat, heads: tuple[int, int], length: int) -> None:
    q, k, v, cos, sin = arrays(dtype, fmt.head_dim, heads, length)
    plan = gpu.plan("metal", dtype, fmt)
    assert plan is not None
    turned, rows = gpu.append(plan, q, k, v, cos, sin)
    plain, expected = reference(q, k, v, cos, sin, fmt)
    truth = rotation_truth(q, cos, sin)
    error, allowed = (np.abs(float64(x) - truth).max() for x in (turned, plain))
    assert turned.dtype == dtype
    assert error <= 2 * allowed
    # kernels/packed_kv.py: scale and bias to the bit, and so the words, but for codes within 2^-20 of a tie
    got, want = np.array(rows), np.array(expected)
    assert got.shape == want.shape
    v_part = slice(fmt.v_start, fmt.k_scale_start)
    assert (got[..., fmt.v_scale_start :] == want[..., fmt.v_scale_start :]).all()
    assert (got[..., v_part] != want[..., v_part]).mean() <= 0.01
    # Keys may be turned with one rounding less, so theirs are compared as values: a code apart, and rarely.
    for ours, theirs, bits in zip(fmt.unpack(rows), fmt.unpack(expected), (fmt.k_bits, fmt.v_bits), strict=True):
        apart = np.abs(float64(ours) - float64(theirs))
        assert (apart > 2e-3).mean() <= 0.01, bits
        assert apart.max() <= 1.1 * np.ptp(float64(theirs)) / (2**bits - 1) + 2e-3, bits


FEW = [
    (mx.float16, RowFormat(128, 4, 4), (5, 3), 1),
    (mx.bfloat16, RowFormat(128, 8, 4), (4, 1), 3),
    (mx.float32, RowFormat(64, 16, 8), (2, 2), 2),
    (mx.float16, RowFormat(32, 4, 8), (3, 1), 5),
    (mx.float32, RowFormat(256, 8, 16), (3, 1), 2),
    (mx.bfloat16, RowFormat(128, 16, 16), (3, 2), 4),
]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_those_of_the_reference_word_for_word(order: str) -> None:
    for case in FEW[ORDERS.index(order) :: len(ORDERS)]:
        with on_metal(order=order, seed=5):
            agree(*case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "k_bits", "v_bits", "head_dim"), list(itertools.product(DTYPES, BITS, BITS, (32, 64, 128)))
)
def test_every_dtype_and_width_agrees_in_three_lane_orders(
    dtype: mx.Dtype, k_bits: int, v_bits: int, head_dim: int
) -> None:
    for order in ORDERS:
        with on_metal(order=order, seed=2):
            agree(dtype, RowFormat(head_dim, k_bits, v_bits), (5, 2), 3)


def extremes() -> tuple[RowFormat, Arrays]:
    """One row of V each: constant; more than float16 holds; partly so; of one sign; so small that its scale rounds
    to few bits, and the largest codes would be 17 of 15."""
    fmt = RowFormat(64, 8, 4)
    q, k, v, cos, sin = arrays(mx.float32, 64, (1, 1), 5)
    v = mx.stack([mx.full(64, -3.25), mx.full(64, 1e6), v[0, 0, 0] * 1e5, mx.abs(v[0, 0, 1]) + 7, v[0, 0, 2] * 7e-7])[
        None, None
    ]
    return fmt, (q[:1], k[:1] * 1e6, v, cos, sin)


def test_extremes_are_packed_as_the_definition_says() -> None:
    """A constant group has scale 0 and code 0; what float16 cannot hold is limited, and so are the codes."""
    fmt, given = extremes()
    plan = gpu.plan("metal", mx.float32, fmt)
    assert plan is not None
    with on_metal():
        _, rows = gpu.append(plan, *given)
    expected = reference(*given, fmt)[1]
    v_words = slice(fmt.v_start, None)
    assert (np.array(rows)[..., v_words] == np.array(expected)[..., v_words]).all()
    values = float64(fmt.unpack(rows)[1])[0, 0]
    assert (values[0] == -3.25).all()
    assert (values[1] == 65504).all()


def test_the_op_takes_the_metal_path_after_a_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    fmt = RowFormat(128, 4, 4)
    given = arrays(mx.float16, 128, (4, 2), 1)
    with on_metal(checked=False):
        turned, rows = rope_append(*given, fmt)
        assert dispatch.paths()["rope_append"] == "metal"
    assert "rope_append<float16, D128, K4 V4>" in (tmp_path / "kernels.json").read_text()
    assert turned.shape == given[0].shape
    assert rows.shape == (2, 2, 1, 36)
