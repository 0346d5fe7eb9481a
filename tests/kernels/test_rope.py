"""Rotary angles to the last bit of float32, at every position that Code Llama can reach."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels.rope import RopeTable, reference, rope


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_are_the_true_values_rounded_once(theta):
    """131,071 · theta^(-2i/128) against 60-digit arithmetic; MLX's own float32 angle errs by up to 4e-3 here."""
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    cos, sin = RopeTable(128, theta).rows(131_070, 2)
    with mpmath.workdps(60):
        for i in range(64):
            angle = 131_071 * mpmath.power(mpmath.mpf(theta), -mpmath.mpf(2 * i) / 128)
            for got, true in ((cos[1, i].item(), mpmath.cos(angle)), (sin[1, i].item(), mpmath.sin(angle))):
                half_ulp = float(np.spacing(np.float32(abs(float(true))))) / 2
                assert abs(got - float(true)) <= 1.001 * half_ulp


def test_a_float32_angle_would_fail_that_test():
    """The seeded fault: what a kernel without range reduction in float64 computes."""
    inverse = (1e6 ** (-np.arange(0, 128, 2, dtype=np.float32) / 128)).astype(np.float32)
    naive = np.cos(np.float32(131_071) * inverse)
    exact = np.asarray(RopeTable(128, 1e6).rows(131_071, 1)[0])[0]
    assert np.abs(naive - exact).max() > 1e-4


def test_rows_are_the_same_whatever_was_asked_for_before():
    """Inside a block, across borders of blocks, over many of them, and after other blocks took the place."""
    used = RopeTable(10, 1e4)
    for end in (3, 1024, 1025, 99_000, 5000):
        used.rows(end - 1, 1)
    turn = np.arange(5000)[:, None] * 1e4 ** (-np.arange(0, 10, 2) / 10)
    for first, last in ((0, 5000), (255, 257), (511, 1025), (256, 512), (4999, 5000), (0, 1)):
        for got, truth in zip(used.rows(first, last - first), (np.cos(turn), np.sin(turn)), strict=True):
            assert got.shape == (last - first, 5)
            assert np.abs(np.asarray(got) - truth[first:last]).max() < 6.1e-8  # half an ulp below 1, and float64's own


def test_a_long_text_takes_no_more_than_a_few_blocks():
    """51 MB were held at 100,000 positions, and 51 MB more each time the table grew."""
    table = RopeTable(128, 1e6)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for offset in range(90_000, 100_000, 200):
        mx.eval(table.rows(offset, 200))
    assert mx.get_peak_memory() - before < 3e6


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_halves_are_turned_as_complex_numbers(dtype):
    rng = np.random.default_rng(5)
    x = mx.array(rng.standard_normal((2, 3, 5, 14)).astype(np.float32)).astype(dtype)
    cos, sin = RopeTable(14, 1e4).rows(1000, 5)
    wide = np.asarray(x.astype(mx.float32), np.float64)
    angle = np.arange(1000, 1005)[:, None] * 1e4 ** (-np.arange(0, 14, 2) / 14)
    turned = (wide[..., :7] + 1j * wide[..., 7:]) * np.exp(1j * angle)
    truth = np.concatenate([turned.real, turned.imag], -1)
    # one rounding to the result's dtype, and a few of float32, of values below 4
    atol = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    for function in (reference, rope):
        out = function(x, cos, sin)
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out.astype(mx.float32)), truth, atol=atol)


def test_rotation_depends_on_the_distance_only():
    """⟨turn(q, m), turn(k, n)⟩ is a function of m - n: shift both by 100,000 and the product stays."""
    rng = np.random.default_rng(6)
    q, k = (mx.array(rng.standard_normal((1, 1, 1, 128)).astype(np.float32)) for _ in "qk")
    table = RopeTable(128, 1e6)
    near = (reference(q, *table.rows(50, 1)) * reference(k, *table.rows(9, 1))).sum().item()
    far = (reference(q, *table.rows(100_050, 1)) * reference(k, *table.rows(100_009, 1))).sum().item()
    assert near == pytest.approx(far, abs=1e-5)
