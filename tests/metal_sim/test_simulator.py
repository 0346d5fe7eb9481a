"""The simulator runs what MLX generates: strides, edges, templates, scalars, and the same answer in every order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, on_metal

from mlx_codellama.kernels import dispatch

ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}

SOFTSIGN = """
  const uint row = thread_position_in_grid.y, col = thread_position_in_grid.x;
  const float v = float(a[row * a_strides[0] + col * a_strides[1]]);
  out[row * a_shape[1] + col] = T(v / (1.0f + metal::abs(v)));
"""


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_a_kernel_over_a_strided_view_whose_grid_the_threadgroup_does_not_divide(dtype: mx.Dtype) -> None:
    view = mx.random.normal((46, 19)).astype(dtype)[::2]  # 23 rows, every other one of the memory
    for order in ORDERS:
        with on_metal(order=order) as sim:
            kernel = mx.fast.metal_kernel(
                name="softsign",
                input_names=["a"],
                output_names=["out"],
                source=SOFTSIGN,
                ensure_row_contiguous=False,
            )
            (got,) = kernel(
                inputs=[view],
                template=[("T", dtype)],
                grid=(19, 23, 1),
                threadgroup=(8, 8, 1),
                output_shapes=[view.shape],
                output_dtypes=[dtype],
            )
        x = np.array(view.astype(mx.float32)).astype(np.float64)
        error = np.abs(np.array(got.astype(mx.float32)) - x / (1 + np.abs(x))).max()
        assert error <= ROUNDOFF[dtype] + 2.0**-23  # all values below 1: one rounding, and float32 arithmetic
        if sim.reports:
            assert sim.last.traffic["a"].read == sim.last.traffic["out"].written == 19 * 23 * dtype.size


def test_inside_ops_take_the_metal_path_and_after_it_mlx_is_as_before() -> None:
    before = mx.fast.metal_kernel, dispatch.backend()
    with on_metal():
        assert dispatch.backend() == "metal"
    assert (mx.fast.metal_kernel, dispatch.backend()) == before
