"""CUDA's decode attention by matrix products: run in the Metal simulator, from the text that it is translated from.

There the one instruction that Metal lacks is the same sum by shuffles, in the layout that the PTX manual gives for
mma.m16n8k8 with tf32 (metal/matrix.metal). What a GPU does with it has not been seen. Truth and bound as in
test_metal_attention.py; a lane, token or value in another's place errs by hundreds of times as much.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, on_metal

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.gpu import selftest, trust
from mlx_codellama.kernels.kv_attention_rows import kv_attention_rows, reference
from mlx_codellama.kernels.kv_attention_window import reference_rows

from .test_kv_attention_window import Case as WindowCase
from .test_metal_attention import FLOAT32_SUMS, SCALE, Case, requested

CASES = [
    Case(mx.float16, 4, 4, (16, 2), 1, 261, blocks=3),
    Case(mx.bfloat16, 8, 4, (7, 1), 5, 37),
    Case(mx.float16, 16, 8, (24, 3), 2, 99, batch=2),
    Case(mx.float16, 8, 16, (3, 3), 8, 21, head_dim=64, blocks=1),
    Case(mx.bfloat16, 16, 16, (8, 1), 1, 9),
    Case(mx.float16, 4, 8, (5, 1), 1, 1, head_dim=64),
]
WINDOWS = [
    (WindowCase((16, 2), 2, 4 + 3 * 95, 4, 70, 95, 128, 1), (8, 8)),  # keys at both ends
    (WindowCase((8, 1), 3, 60, 2, 20, 37, 64, 1), (4, 4)),
]


def plan(dtype: mx.Dtype, fmt: gpu.RowFormat, n_rows: int, window: bool = False) -> gpu.Plan:
    found = gpu.plan("cuda", dtype, fmt, n_rows, window)
    assert found is not None
    assert found.kernel is gpu.MMA
    return found._replace(language="metal")


@pytest.mark.parametrize("order", ORDERS)
def test_products_agree_with_float64_and_checked_mode_finds_nothing(order: str) -> None:
    for case in CASES:
        q, rows = case.arrays()
        offset, fmt = case.n_tokens - case.length, case.fmt
        truth = selftest.attention_truth(q, *fmt.unpack(rows[:, :, : case.n_tokens]), scale=SCALE, offset=offset)
        plain = np.abs(selftest.float64(reference(q, rows, fmt, scale=SCALE, offset=offset)) - truth).max()
        with on_metal(order=order, seed=case.n_tokens) as sim:
            chosen = plan(case.dtype, fmt, case.heads[0] // case.heads[1] * case.length)
            got = gpu.attend(chosen, q, rows, scale=SCALE, offset=offset, blocks=case.blocks)
        assert np.abs(selftest.float64(got) - truth).max() <= 2 * plain + FLOAT32_SUMS * np.abs(truth).max(), case
        if sim.reports and case.heads[0] // case.heads[1] * case.length <= 16:
            assert requested(sim, case) == (1.0, 1.0)  # each byte of the cache once


def test_products_in_a_window_agree_with_float64() -> None:
    for case, bits in WINDOWS:
        fmt = gpu.RowFormat(case.head_dim, *bits)
        q, k, v = case.arrays(mx.float16)
        rows = fmt.pack(k.astype(mx.float32), v.astype(mx.float32))
        truth = selftest.attention_truth(q, *fmt.unpack(rows), scale=SCALE, hidden=case.hidden)
        plain = np.abs(selftest.float64(reference_rows(q, rows, fmt, case.window, scale=SCALE)) - truth).max()
        chosen = plan(mx.float16, fmt, case.heads[0] // case.heads[1] * case.length, window=True)
        offset, window = case.n_places - case.length, case.window.numbers()
        with on_metal(order="random", seed=case.newest):
            got = gpu.attend(chosen, q, rows, scale=SCALE, offset=offset, window=window, blocks=2)
        assert np.abs(selftest.float64(got) - truth).max() <= 2 * plain + FLOAT32_SUMS * np.abs(truth).max()


def test_float32_and_few_rows_go_without_products() -> None:
    for dtype, n_rows in ((mx.float32, 8), (mx.float16, 4)):
        found = gpu.plan("cuda", dtype, gpu.RowFormat(128, 4, 4), n_rows)
        assert found is not None
        assert found.kernel is gpu.LANES


def test_where_products_do_not_run_lanes_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older GPU refuses the instruction: nothing is said of that, for another kernel stands in."""
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    case, tried = CASES[0], []
    q, rows = case.arrays()

    def build(language: str, kernel: gpu.Kernel) -> object:
        tried.append(kernel.name)
        raise RuntimeError("no GPU")

    monkeypatch.setattr("mlx_codellama.kernels.gpu.kernel._built", build)
    with dispatch.simulate("cuda"), pytest.warns(trust.KernelWarning, match="kv_attention_lanes") as caught:
        got = kv_attention_rows(q, rows, case.fmt, scale=SCALE, offset=260)
    assert len(caught) == 1
    assert tried == ["kv_attention_mma", "kv_attention_lanes"]
    assert mx.abs(got - reference(q, rows, case.fmt, scale=SCALE, offset=260)).max().item() < 1e-3
