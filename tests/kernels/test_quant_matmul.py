"""quant_matmul against dequantised weights in float64, on every path of the CPU backend."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.config import NATIVE_BITS
from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.quant_matmul import quant_matmul, reference

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def packed(bits, group, mode="affine"):
    weight = mx.array(np.random.default_rng(bits).standard_normal((24, 256)).astype(np.float32))
    parts = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    return parts[0], parts[1], parts[2] if len(parts) > 2 else None


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("rows", [1, 3, 19])
@pytest.mark.parametrize(("bits", "group", "mode"), [(*a, "affine") for a in AFFINE] + [(4, 32, "mxfp4")])
def test_every_path_multiplies_by_the_dequantised_weight(bits, group, mode, rows, native, monkeypatch):
    monkeypatch.setenv("MLX_CODELLAMA_NATIVE", native)
    dispatch.native.cache_clear()
    settings = {"group_size": group, "bits": bits, "mode": mode}
    weight, scales, biases = packed(bits, group, mode)
    x = mx.array(np.random.default_rng(100 + rows).standard_normal((rows, 256)).astype(np.float32))
    dense = np.asarray(mx.dequantize(weight, scales, biases, **settings).astype(mx.float32), np.float64)
    truth = np.asarray(x, np.float64) @ dense.T
    plain = np.abs(np.asarray(reference(x, weight, scales, biases, **settings)) - truth).max()
    got = quant_matmul(x, weight, scales, biases, **settings)
    # 256 products of size ~1 in float32: rounding of order 1e-5; a wrong group or nibble errs by order 1
    assert np.abs(np.asarray(got) - truth).max() <= 2 * plain + 2e-5
    if dispatch.backend() == "cpu" and rows == 19:
        other = native == "1" and dispatch.native() is not None and bits not in NATIVE_BITS
        assert dispatch.paths()[f"quant_matmul, {bits}-bit" if other else "quant_matmul"] != "mlx"
    # Where exactness is not asked for, x may be rounded to steps of max |x| of its group / 16256.
    got = quant_matmul(x, weight, scales, biases, **settings, exact=False)
    largest = np.abs(np.asarray(x, np.float64).reshape(rows, -1, group)).max(-1)
    reach = largest @ np.abs(dense).reshape(24, -1, group).sum(-1).T
    assert (np.abs(np.asarray(got) - truth) <= reach / 32000 + 2 * plain + 2e-5).all()
    dispatch.native.cache_clear()
