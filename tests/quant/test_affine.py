from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.config import BITS, GROUP_SIZES, QuantArgs
from mlx_codellama.quant import mxfp4
from mlx_codellama.quant.affine import dequantize, quantize, reference, unpack

DTYPES = ("bfloat16", "float16", "float32")


def rows(dtype: str, shape: tuple[int, int] = (37, 384)) -> mx.array:
    """Groups of every kind: normal, one-sided, constant, zero, tiny, with one outlier."""
    rng = np.random.default_rng(3)
    w = 0.02 * rng.standard_normal(shape)
    w[1], w[2], w[3] = np.abs(w[1]), -np.abs(w[2]), 0.25
    w[4], w[5] = 0.0, w[5] * 1e-7
    w[6, ::64] *= 100
    return mx.array(w.astype(np.float32)).astype(getattr(mx, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition_and_mlx_agree_to_the_bit(bits: int, group_size: int, dtype: str) -> None:
    w, quant = rows(dtype), QuantArgs(bits, group_size)
    codes, scales, biases = reference(np.array(w.astype(mx.float32)), quant)
    packed, mlx_scales, mlx_biases = quantize(w, quant)
    np.testing.assert_array_equal(codes, unpack(np.array(packed), bits))
    for ours, theirs in ((scales, mlx_scales), (biases, mlx_biases)):
        assert theirs.dtype == w.dtype  # the source's dtype, as mlx-lm writes it
        assert mx.array_equal(mx.array(ours).astype(w.dtype), theirs)


@pytest.mark.parametrize("bits", BITS)
def test_no_weight_moves_by_more_than_half_a_step(bits: int) -> None:
    # Zero is put on the grid by shrinking the step, which can cut the far end of a group by another half step.
    w, quant = rows("float32"), QuantArgs(bits, 64)
    back = np.array(dequantize(quantize(w, quant), quant)).reshape(37, 6, 64)
    w_np = np.array(w).reshape(37, 6, 64)
    step = np.maximum((w_np.max(-1) - w_np.min(-1)) / (2**bits - 1), 1e-7)
    error = np.abs(back - w_np).max(-1)
    assert (error <= 1.02 * step + 1e-7).all()
    assert (error > 0.3 * step)[0].all()  # the bound is not idle: ordinary groups come near half a step


def test_dequantize_rounds_only_once() -> None:
    w, quant = rows("bfloat16"), QuantArgs(4, 32)
    packed, scales, biases = quantize(w, quant)
    codes = unpack(np.array(packed), 4).reshape(37, 12, 32).astype(np.float64)
    wide = [np.array(a.astype(mx.float32)).astype(np.float64)[..., None] for a in (scales, biases)]
    exact = (codes * wide[0] + wide[1]).reshape(37, 384)
    got = np.array(dequantize((packed, scales, biases), quant))
    np.testing.assert_allclose(got, exact, rtol=0, atol=2**-23 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-5, 0.02, 1.0, 100.0])
def test_fast_mxfp4_is_mlx_to_the_bit(dtype: str, magnitude: float) -> None:
    w = (rows(dtype).astype(mx.float32) * (50 * magnitude)).astype(getattr(mx, dtype))
    with mx.stream(mx.cpu):
        for ours, theirs in zip(mxfp4.quantize(w), mx.quantize(w, mode="mxfp4"), strict=True):
            assert ours.dtype == theirs.dtype
            assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_mxfp4_breaks_ties_like_mlx(dtype: str) -> None:
    # Every border between two codes, and its neighbours in float32, in groups whose largest is exactly 6 (scale 1).
    borders = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    near = np.concatenate([borders, np.nextafter(borders, np.float32(9)), np.nextafter(borders, np.float32(0))])
    signed = np.concatenate([near, -near])
    groups = np.zeros((3, 32), np.float32)
    groups[:, 0] = 6
    groups[0, 1:] = signed[:31]
    groups[1, 1 : 1 + len(signed) - 31] = signed[31:]
    groups[2, 1:4] = [-0.0, -0.1, 0.1]
    w = mx.array(groups).astype(getattr(mx, dtype))
    with mx.stream(mx.cpu):
        for ours, theirs in zip(mxfp4.quantize(w), mx.quantize(w, mode="mxfp4"), strict=True):
            assert mx.array_equal(ours, theirs)


def test_fast_mxfp4_chooses_mlx_exponent_for_every_normal_bfloat16() -> None:
    patterns = np.arange(0x0200, 0x7F80, dtype=np.uint16)  # from 2e-36, where MLX's own exponent begins to wrap, up
    largest = mx.array(patterns).view(mx.bfloat16)
    w = mx.concatenate([largest[:, None], mx.zeros((len(patterns), 31), mx.bfloat16)], axis=1)
    with mx.stream(mx.cpu):
        assert mx.array_equal(mxfp4.quantize(w)[1], mx.quantize(w, mode="mxfp4")[1])
