"""rope_append: the two ops that it stands for, one after the other, at a position where angles are large."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.rope import RopeTable
from mlx_codellama.kernels.rope_append import reference, rope_append

B, H, K, L = 2, 6, 3, 5


def arrays(d, dtype):
    rng = np.random.default_rng(d)
    return [mx.array(rng.standard_normal((B, n, L, d)).astype(np.float32)).astype(dtype) for n in (H, K, K)]


def steps_of(rows, fmt):
    """The scale of each element of K and of V: what one code is worth."""
    words = mx.contiguous(rows[..., fmt.k_scale_start :])[..., None].view(mx.float16)[..., 0].astype(mx.float32)
    wide = np.repeat(np.asarray(words), fmt.group_size, axis=-1)
    return wide[..., : fmt.head_dim], wide[..., fmt.head_dim :]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "bits"), [(32, (4, 4)), (96, (8, 4)), (128, (8, 8)), (64, (16, 16))])
def test_queries_are_turned_and_keys_are_turned_and_packed(d, bits, dtype):
    """Position 131,067 and on, against complex numbers in float64."""
    fmt = RowFormat(d, *bits)
    q, k, v = arrays(d, dtype)
    angle = np.arange(131_067, 131_067 + L)[:, None] * 1e6 ** (-np.arange(0, d, 2) / d)

    def turned(x):
        wide = np.asarray(x.astype(mx.float32), np.float64)
        z = (wide[..., : d // 2] + 1j * wide[..., d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    out, rows = reference(q, k, v, *RopeTable(d, 1e6).rows(131_067, L), fmt)
    assert (out.dtype, rows.dtype, rows.shape) == (dtype, mx.uint32, (B, K, L, fmt.words))
    atol = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    np.testing.assert_allclose(np.asarray(out.astype(mx.float32)), turned(q), atol=atol)
    keys, values = fmt.unpack(rows)
    k_step, v_step = steps_of(rows, fmt) if bits != (16, 16) else (0, 0)
    # half a step, the float16 roundings of scale and bias, and those of float16 itself for values below 8
    assert (np.abs(np.asarray(keys) - turned(k)) <= 0.63 * k_step + 4e-3).all()
    assert (np.abs(np.asarray(values) - np.asarray(v.astype(mx.float32))) <= 0.63 * v_step + 4e-3).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (8, 8), (16, 16)], ids=str)
def test_fast_path_gives_the_rows_of_the_reference(bits, dtype):
    """Values to the bit. Keys: a code may be off by one where a last bit of the rotation decides: 1 in 100 at most."""
    fmt = RowFormat(64, *bits)
    q, k, v = arrays(64, dtype)
    table = RopeTable(64, 1e6).rows(77, L)
    (out, rows), (true_out, true) = rope_append(q, k, v, *table, fmt), reference(q, k, v, *table, fmt)
    ulp = {mx.float32: 2**-22, mx.float16: 2**-9, mx.bfloat16: 2**-6}[dtype]
    np.testing.assert_allclose(
        np.asarray(out.astype(mx.float32)), np.asarray(true_out.astype(mx.float32)), atol=4 * ulp
    )
    assert mx.array_equal(rows[..., fmt.v_start : fmt.k_scale_start], true[..., fmt.v_start : fmt.k_scale_start])
    assert mx.array_equal(rows[..., fmt.v_scale_start :], true[..., fmt.v_scale_start :])
    keys, true_keys = (np.asarray(fmt.unpack(r)[0]) for r in (rows, true))
    step = 2**-9 if bits[0] == 16 else steps_of(true, fmt)[0]
    assert (np.abs(keys - true_keys) <= 1.02 * step).all()
    assert (keys != true_keys).mean() <= 0.01
    assert "rope_append" in dispatch.paths()
