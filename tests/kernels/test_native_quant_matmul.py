"""The native quantised product, held to codes · scale + bias multiplied in float64.

Passing is not luck: the bounds are a few float32 roundings of the result, or the stated rounding of the activations,
and a wrong code, group, row or scale is wrong by the size of a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from kernels.instruction_sets import run_again

from mlx_codellama.kernels import dispatch, rms_norm, swiglu
from mlx_codellama.kernels.quant_matmul import quant_linear, quant_matmul, reference

ops = pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

Array = npt.NDArray[Any]
STEPS = {1: 127, 2: 16256}  # int8 terms → steps from 0 to the largest |x| of a group


class Packed(NamedTuple):
    weight: mx.array
    scales: mx.array
    biases: mx.array
    dense: Array  # float64 [O, I]
    settings: dict[str, int]

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.weight, self.scales, self.biases


def packed(n_out: int, n_in: int, bits: int, group: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> Packed:
    dense = mx.random.normal((n_out, n_in), key=mx.random.key(seed))
    weight, scales, biases = mx.quantize(dense, group_size=group, bits=bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    codes = np.array(weight).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n_out, n_in)
    s, b = (np.repeat(np.array(a.astype(mx.float32), np.float64), group, axis=1) for a in (scales, biases))
    return Packed(weight, scales, biases, codes * s + b, {"group_size": group, "bits": bits})


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def float32_bound(x: mx.array, dense: Array, plain: mx.array) -> float:
    """Twice the error of a plain float32 product, and some roundings of the typical sum where that is by luck small."""
    error = np.abs(np.array(plain) - np.array(x, np.float64) @ dense.T).max()
    typical = np.sqrt(np.square(np.array(x, np.float64)) @ np.square(dense).T).max()
    return float(2 * error + 8 * 2.0**-24 * typical)


# Outputs and inputs below, at and beyond a panel and a block of every vector width; rows of every form.
SHAPES = [(1, 37, 384), (2, 70, 1152), (3, 5, 128), (4, 33, 4352), (5, 64, 256), (9, 97, 640), (70, 41, 4224)]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_every_form_multiplies_by_the_stored_weights(bits: int, group: int, dtype: mx.Dtype) -> None:
    for rows, n_out, n_in in SHAPES:
        w, x = packed(n_out, n_in, bits, group, dtype, seed=rows), normal(7, rows, n_in)
        truth = np.array(x, np.float64) @ w.dense.T
        bound = float32_bound(x, w.dense, reference(x, *w.arrays, mode="affine", **w.settings))
        exact = np.abs(np.array(ops.quant_matmul(x, *w.arrays, **w.settings)) - truth).max()
        assert exact <= bound, (rows, n_out, n_in)
        largest = np.abs(np.array(x, np.float64).reshape(rows, -1, group)).max(-1)
        reach = largest @ np.abs(w.dense).reshape(n_out, -1, group).sum(-1).T  # [rows, n_out]
        for terms, steps in STEPS.items():
            error = np.abs(np.array(ops.quant_matmul(x, *w.arrays, **w.settings, terms=terms)) - truth)
            assert (error <= 1.01 * reach / (2 * steps) + bound).all(), (rows, n_out, n_in, terms)
            assert error.max() > 3e-5 / terms**4  # the integers were used


def test_scales_from_subnormal_to_infinite_are_read_as_they_are() -> None:
    w = packed(20, 128, 4, 32)
    for dtype in (mx.float16, mx.bfloat16):
        for scale in (6e-8, 3e-5, 60000.0, float("inf"), float("nan")):
            scales, zero = mx.full(w.scales.shape, scale, dtype), mx.zeros(w.scales.shape, dtype)
            for rows in (1, 6):
                x = mx.ones((rows, 128))
                got = ops.quant_matmul(x, w.weight, scales, zero, **w.settings)
                want = reference(x, w.weight, scales, zero, mode="affine", **w.settings)
                finite = np.isfinite(np.array(want))
                assert np.allclose(np.array(got)[finite], np.array(want)[finite], rtol=1e-5)
                assert not np.isfinite(np.array(got)[~finite]).any()


@pytest.mark.parametrize("rows", [1, 6])
def test_scales_from_the_smallest_to_the_largest_power_of_two_are_read_as_they_are(rows: int) -> None:
    weight, scales = mx.quantize(normal(1, 20, 128), group_size=32, bits=4, mode="mxfp4")[:2]
    for code in (0, 1, 127, 230, 255):  # 2^-127, a subnormal; 2^-126; 1; 2^103; NaN
        args = (mx.full((rows, 128), 1024.0), weight, mx.full(scales.shape, code, mx.uint8), None)
        got = np.array(ops.quant_matmul(*args, group_size=32, bits=4))
        if code == 255:
            assert np.isnan(got).all()
            continue
        one = mx.dequantize(weight, mx.full(scales.shape, 127, mx.uint8), group_size=32, bits=4, mode="mxfp4")
        want = 1024 * np.array(one.astype(mx.float32), np.float64).sum(-1) * 2.0 ** (code - 127)
        assert np.allclose(got, want, rtol=1e-5, atol=2.0**-130)
        assert (got[:, want != 0] != 0).all()


@pytest.mark.parametrize("rows", [1, 3, 21])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bit_activations_are_rounded_once_at_the_end(dtype: mx.Dtype, rows: int) -> None:
    w, x = packed(45, 256, 4, 64, mx.bfloat16), normal(3, rows, 256).astype(dtype)
    got = ops.quant_matmul(x, *w.arrays, **w.settings)
    assert got.dtype == dtype
    wide = ops.quant_matmul(x.astype(mx.float32), *w.arrays, **w.settings)
    assert mx.array_equal(got, wide.astype(dtype))


@pytest.mark.parametrize("terms", [0, 2])
def test_views_and_any_leading_shape_are_read_right(terms: int) -> None:
    w, x = packed(19, 128, 8, 64), normal(4, 128, 5, 3)
    after = packed(7, 64, 4, 32)
    want = ops.quant_matmul(mx.contiguous(x.T), *w.arrays, **w.settings, terms=terms)
    assert want.shape == (3, 5, 19)
    assert mx.array_equal(ops.quant_matmul(x.T, *w.arrays, **w.settings, terms=terms), want)
    assert mx.allclose(ops.quant_matmul(x.T[1, 2], *w.arrays, **w.settings, terms=terms), want[1, 2], atol=1e-5)
    every_second = mx.repeat(w.weight, 2, axis=0)[::2]
    for _ in range(2):  # as part of the graph, then as a computed view
        got = ops.quant_matmul(x.T, every_second, w.scales, w.biases, **w.settings, terms=terms)
        assert mx.array_equal(got, want)
        mx.eval(every_second)
    wide = ops.quant_matmul(x.T, *packed(64, 128, 8, 64).arrays, **w.settings, terms=terms)
    for view in (wide[1:, ::2], wide.swapaxes(0, 1)):  # of a result that is not yet computed
        got = ops.quant_matmul(view, *after.arrays, **after.settings, terms=terms)
        assert mx.array_equal(got, ops.quant_matmul(mx.contiguous(view), *after.arrays, **after.settings, terms=terms))


@pytest.mark.parametrize("terms", [0, 2])
def test_no_rows_and_no_outputs_give_empty_results(terms: int) -> None:
    w = packed(6, 64, 4, 32)
    assert ops.quant_matmul(mx.zeros((0, 64)), *w.arrays, **w.settings, terms=terms).shape == (0, 6)
    none = [a[:0] for a in w.arrays]
    assert ops.quant_matmul(mx.zeros((2, 64)), *none, **w.settings, terms=terms).shape == (2, 0)


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 4, 11])
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_nan_and_infinity_pass_as_in_a_matrix_product(value: float, rows: int, terms: int) -> None:
    w, x = packed(34, 192, 4, 64), np.array(normal(5, rows, 192))
    x[rows - 1, 77] = value
    got = np.array(ops.quant_matmul(mx.array(x), *w.arrays, **w.settings, terms=terms))
    want = np.array(reference(mx.array(x), *w.arrays, mode="affine", **w.settings))
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (got[np.isinf(want)] == want[np.isinf(want)]).all()
    assert np.isfinite(got[: rows - 1]).all()


def test_mxfp4_is_native_too() -> None:
    weight, scales = mx.quantize(normal(1, 50, 320), group_size=32, bits=4, mode="mxfp4")[:2]
    settings = {"group_size": 32, "bits": 4}
    # Weights of 4 significant bits times a power of two: float32 holds them as they are.
    dense = np.array(mx.dequantize(weight, scales, mode="mxfp4", dtype=mx.float32, **settings), np.float64)
    for rows in (1, 2, 17):
        x = normal(2, rows, 320)
        bound = float32_bound(x, dense, reference(x, weight, scales, None, mode="mxfp4", **settings))
        got = quant_matmul(x, weight, scales, None, mode="mxfp4", **settings)
        assert np.abs(np.array(got) - np.array(x, np.float64) @ dense.T).max() <= bound
        assert dispatch.paths()["quant_matmul"] == "native"


def test_the_gradient_for_x_is_that_of_the_dequantised_product() -> None:
    w, x, out = packed(30, 128, 4, 64, mx.bfloat16), normal(1, 2, 3, 128), normal(2, 2, 3, 30)
    grad = mx.grad(lambda x: (ops.quant_matmul(x, *w.arrays, **w.settings, terms=2) * out).sum())(x)
    assert np.allclose(np.array(grad), np.array(out, np.float64) @ w.dense, atol=1e-4)
    with pytest.raises(ValueError, match="only x has a gradient"):
        mx.grad(lambda s: ops.quant_matmul(x, w.weight, s, w.biases, **w.settings).sum())(w.scales)


def composed(x, parts, settings, norm, residual, gated):
    """What `quant_linear` is defined to be."""
    if norm is not None:
        x = rms_norm.reference(x, *norm)
    ys = [reference(x, *w.arrays, mode="affine", **settings) for w in parts]
    if gated:
        ys = [swiglu.reference(*ys)]
    return ys if residual is None else [residual + ys[0]]


FUSED = {  # outputs of each weight, norm, residual, gated
    "q, k and v": ((37, 20, 9), True, False, False),
    "gate and up": ((50, 50), True, False, True),
    "o or down": ((41,), False, True, False),
    "all at once": ((33, 33), True, True, True),
}


@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("rows", [1, 3, 6, 75])
def test_one_launch_gives_what_one_op_after_the_other_does(kind: str, rows: int, terms: int) -> None:
    outs, normed, added, gated = FUSED[kind]
    x = normal(rows, rows, 192)
    parts = [packed(n, 192, 4, 64, mx.float16, seed=i) for i, n in enumerate(outs)]
    norm = (1 + 0.1 * normal(8, 192), 1e-5) if normed else None
    residual = normal(9, rows, outs[0]) if added else None
    fused = ops.quant_linear(
        x, [w.arrays for w in parts], **parts[0].settings, terms=terms, norm=norm, residual=residual, gated=gated
    )
    if norm is not None:
        x = ops.rms_norm(x, *norm)
    want = [ops.quant_matmul(x, *w.arrays, **w.settings, terms=terms) for w in parts]
    if gated:
        want = [ops.swiglu(*want)]
    if residual is not None:
        want = [residual + want[0]]
    assert len(fused) == len(want)
    for a, b in zip(fused, want, strict=True):  # the same operations on the same numbers: to the bit
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("kind", FUSED)
def test_gradients_of_one_launch_are_those_of_the_single_operations(kind: str) -> None:
    outs, normed, added, gated = FUSED[kind]
    parts = [packed(n, 128, 8, 32, mx.bfloat16, seed=i) for i, n in enumerate(outs)]
    x, weight, residual = normal(1, 2, 3, 128), 1 + 0.1 * normal(2, 128), normal(3, 2, 3, outs[0])
    out = [normal(4 + i, 2, 3, n) for i, n in enumerate(outs)]
    arrays, settings = [w.arrays for w in parts], parts[0].settings

    def through(f):
        def loss(x, weight, residual):
            ys = f(x, (weight, 1e-5) if normed else None, residual if added else None)
            return sum((y * o).sum() for y, o in zip(ys, out, strict=False))

        return mx.grad(loss, argnums=(0, *([1] if normed else []), *([2] if added else [])))(x, weight, residual)

    got = through(lambda x, n, r: ops.quant_linear(x, arrays, **settings, norm=n, residual=r, gated=gated))
    want = through(lambda x, n, r: composed(x, parts, settings, n, r, gated))
    for a, b in zip(got, want, strict=True):
        assert mx.abs(a - b).max() <= 2e-5 * mx.abs(b).max()


def test_infinity_goes_through_a_fused_launch_as_through_single_ones() -> None:
    x, parts = np.array(normal(5, 6, 192)), [packed(34, 192, 4, 64, seed=i) for i in range(2)]
    x[2, 77] = np.inf
    norm = (mx.ones(192), 1e-5)
    for terms in (0, 2):
        got = ops.quant_linear(mx.array(x), [w.arrays for w in parts], **parts[0].settings, terms=terms, norm=norm)
        for y in map(np.array, got):
            assert np.isnan(y[2]).all()
            assert np.isfinite(np.delete(y, 2, axis=0)).all()


def test_what_does_not_fit_is_refused() -> None:
    w, x = packed(8, 64, 4, 32), normal(1, 2, 64)
    with pytest.raises(ValueError, match="does not fit"):
        ops.quant_matmul(normal(1, 2, 128), *w.arrays, **w.settings)
    with pytest.raises(ValueError, match="scales must be"):
        ops.quant_matmul(x, *w.arrays, group_size=64, bits=4)
    with pytest.raises(ValueError, match="bits must be"):
        ops.quant_matmul(x, *w.arrays, group_size=32, bits=3)
    with pytest.raises(ValueError, match="biases must be like scales"):
        ops.quant_matmul(x, w.weight, w.scales, w.biases.astype(mx.float16), **w.settings)
    with pytest.raises(ValueError, match="x must be"):
        ops.quant_matmul(x.astype(mx.int32), *w.arrays, **w.settings)
    with pytest.raises(ValueError, match="two weights of one shape"):
        ops.quant_linear(x, [w.arrays], **w.settings, gated=True)
    with pytest.raises(ValueError, match="residual must be"):
        ops.quant_linear(x, [w.arrays], **w.settings, residual=mx.zeros((2, 9)))
    with pytest.raises(ValueError, match="norm's weight"):
        ops.quant_linear(x, [w.arrays], **w.settings, norm=(mx.ones(63), 1e-5))
    other = w.weight, w.scales.astype(mx.float16), w.biases.astype(mx.float16)
    with pytest.raises(ValueError, match="one dtype"):
        ops.quant_linear(x, [w.arrays, other], **w.settings)


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off")
def test_dispatch_takes_the_native_path_and_exact_keeps_float32() -> None:
    w, x = packed(24, 256, 4, 64), normal(9, 7, 256)
    exact = quant_matmul(x, *w.arrays, **w.settings, mode="affine")
    assert dispatch.paths()["quant_matmul"] == "native"
    assert mx.array_equal(exact, ops.quant_matmul(x, *w.arrays, **w.settings))
    dispatch.forget_paths()
    rounded = quant_matmul(x, *w.arrays, **w.settings, mode="affine", exact=False)
    if ops.isa() != "portable":
        assert dispatch.paths()["quant_matmul"] == "native int8"
        assert 0 < mx.abs(rounded - exact).max() < 1e-2


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off")
@pytest.mark.parametrize("native", ["1", "0"])
def test_dispatch_fuses_natively_and_composes_elsewhere(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_NATIVE", native)
    dispatch.native.cache_clear()
    parts = [packed(24, 128, 4, 64, mx.float16, seed=i) for i in range(2)]
    x, norm = normal(9, 7, 128), (mx.ones(128), 1e-5)
    settings = {**parts[0].settings, "mode": "affine"}
    got = quant_linear(x, [w.arrays for w in parts], **settings, norm=norm, gated=True)
    assert mx.allclose(got[0], composed(x, parts, parts[0].settings, norm, None, True)[0], atol=1e-3)
    fused = {"quant_matmul": "native", "rms_norm": "native in quant_matmul", "swiglu": "native in quant_matmul"}
    paths = {op: dispatch.paths()[op] for op in fused}
    assert (paths == fused) == (native == "1"), paths
    dispatch.native.cache_clear()


@pytest.mark.parametrize(("isa", "threads"), [("avx512", "1"), ("avx2", "3"), ("portable", "2")])
def test_every_instruction_set_and_number_of_threads_agrees(isa: str, threads: str) -> None:
    names = "every_form or scales_from or views or nan_and or mxfp4 or one_launch"
    run_again(__file__, f"({names}) and not instruction", isa, threads)
