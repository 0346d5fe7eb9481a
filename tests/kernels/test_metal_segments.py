"""Decode attention over rows in several segments by the Metal kernels, in the simulator (on a Mac: on its GPU).

The bits are those of one piece, wherever segments end: every token takes the same steps in the same order, only from
another address. That the pass is not luck: a border off by one, or a token taken from a neighbour, errs by hundreds of
times the rounding, and what lies behind the tokens that count is NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, on_metal

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.kv_attention_segments import Segment, kv_attention_segments, reference

from .test_metal_attention import LAYOUTS, SCALE, Case

# Three segments, six, two with a border at a block's, and a tail of the queries' own tokens alone.
CASES = [
    (Case(mx.float16, 4, 4, LAYOUTS["MHA"], 1, 301), (100, 270)),
    (Case(mx.bfloat16, 8, 4, LAYOUTS["GQA-4"], 1, 301), (1, 2, 161, 299, 300)),
    (Case(mx.float32, 16, 8, LAYOUTS["MHA"], 3, 133), (130,)),
    (Case(mx.float16, 4, 4, LAYOUTS["GQA-8"], 1, 301), (100, 271)),
    (Case(mx.float32, 8, 16, LAYOUTS["odd"], 5, 70), (33, 34, 65)),
    (Case(mx.float16, 8, 8, LAYOUTS["GQA-8"], 2, 37), (7, 20, 30, 33, 35)),
    (Case(mx.float16, 4, 8, (10, 2), 1, 45, head_dim=32), (16, 32)),
]


def cut(rows: mx.array, ends: Sequence[int], n_tokens: int) -> list[Segment]:
    """Segments that end at `ends`, each in storage of another capacity whose unused rows are NaN."""
    segments = []
    for spare, (start, end) in enumerate(itertools.pairwise((0, *ends, n_tokens)), 3):
        unused = mx.full((rows.shape[0], rows.shape[1], spare, rows.shape[3]), 0xFFFFFFFF, mx.uint32)
        segments.append(Segment([mx.concatenate([rows[:, :, start:end], unused], axis=2)], end - start))
    return segments


def attend(case: Case, plan: gpu.Plan, segments: Sequence[Segment], blocks: int | None = 2) -> np.ndarray:
    """By a plan in `blocks` blocks, or in as many as the plan makes where that is None."""
    q, _ = case.arrays()
    firsts = itertools.accumulate(segment.n_tokens for segment in segments[:-1])
    later = [(segment.arrays[0], first) for segment, first in zip(segments[1:], firsts, strict=True)]
    offset = case.n_tokens - case.length
    plan = plan._replace(segments=bool(later))
    return np.array(
        gpu.attend(plan, q, segments[0].arrays[0], scale=SCALE, offset=offset, later=later, blocks=blocks).astype(
            mx.float32
        )
    )


@pytest.mark.parametrize("order", ORDERS)
def test_segments_have_the_bits_of_one_piece(order: str) -> None:
    for case, ends in CASES[ORDERS.index(order) :: len(ORDERS)]:
        _, rows = case.arrays()
        with on_metal(order=order, seed=case.n_tokens):
            whole = attend(case, case.plan, [Segment([rows], case.n_tokens)])
            assert np.isfinite(whole).all()
            assert np.abs(whole).max() > 0.1
            assert (attend(case, case.plan, cut(rows, ends, case.n_tokens)) == whole).all(), case


@pytest.mark.parametrize("length", [1, 2])
def test_cuda_products_over_segments_have_the_bits_of_one_piece(length: int) -> None:
    """The text that CUDA's kernel is translated from."""
    case, ends = Case(mx.float16, 4, 8, LAYOUTS["GQA-8"], length, 61), (9, 10, 40)
    plan = gpu.plan("cuda", case.dtype, case.fmt, 8 * length)
    assert plan is not None
    plan = plan._replace(language="metal")
    _, rows = case.arrays()
    with on_metal(order="random", seed=length):
        whole = attend(case, plan, [Segment([rows], case.n_tokens)])
        assert (attend(case, plan, cut(rows, ends, case.n_tokens)) == whole).all()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(255,), (256,), (257,), (1, 255, 511), (256, 512), (100, 200, 300, 400, 500)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_borders_around_those_of_blocks_change_no_bit(layout: str, ends: tuple[int, ...]) -> None:
    case = Case(mx.float16, 8, 4, LAYOUTS[layout], 1, 601)
    _, rows = case.arrays()
    with on_metal(order="random", seed=len(ends)):
        whole = attend(case, case.plan, [Segment([rows], 601)], blocks=None)
        assert (attend(case, case.plan, cut(rows, ends, 601), blocks=None) == whole).all()


def test_each_byte_of_each_segment_is_read_once() -> None:
    case, ends = CASES[0]
    _, rows = case.arrays()
    segments = cut(rows, ends, case.n_tokens)
    with on_metal() as sim:
        attend(case, case.plan, segments)
        if not sim.reports:
            pytest.skip("a GPU counts nothing")
        (report,) = [report for report in sim.reports if "rows" in report.traffic]
    for name, segment in zip(("rows", "rows_1", "rows_2"), segments, strict=True):
        assert report.traffic[name].read == case.heads[1] * segment.n_tokens * case.fmt.bytes
    assert all(report.traffic[f"rows_{i}"].read == 0 for i in (3, 4, 5))


def test_the_op_takes_the_metal_path_after_a_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    case, ends = CASES[0]
    q, rows = case.arrays()
    segments = cut(rows, ends, case.n_tokens)
    with on_metal(checked=False):
        got = kv_attention_segments(q, segments, case.fmt, scale=SCALE, prompt=False)
        assert dispatch.paths()["kv_attention_segments"] == "metal"
        empty = Segment([rows], 0)
        again = kv_attention_segments(q, [empty, *segments, empty], case.fmt, scale=SCALE, prompt=False)
    assert mx.array_equal(got, again)
    assert "kv_attention_lanes_segments<float16, D128, K4 V4, 1 rows>" in (tmp_path / "kernels.json").read_text()
    want = reference(q, segments, case.fmt, scale=SCALE)
    assert mx.abs(got - want).max().item() < 1e-3


def test_more_segments_than_a_kernel_reads_are_joined_where_they_are_shortest() -> None:
    rows = mx.zeros((1, 2, 4096, 36), mx.uint32)
    sizes = [1000, 3, 2, 900, 50, 40, 2000, 9]
    pieces = gpu.few([(rows, n) for n in sizes])
    assert [n for _, n in pieces] == [1000, 5, 900, 90, 2000, 9]
    assert [array.shape[2] for array, _ in pieces] == [4096, 5, 4096, 90, 4096, 4096]  # the rest is not copied


def test_nine_segments_have_the_bits_of_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    case = Case(mx.float16, 4, 4, LAYOUTS["MHA"], 2, 40)
    q, rows = case.arrays()
    segments = cut(rows, (3, 7, 8, 15, 20, 26, 30, 33), 40)
    with on_metal(checked=False):
        got = kv_attention_segments(q, segments, case.fmt, scale=SCALE, prompt=False)
        assert dispatch.paths()["kv_attention_segments"] == "metal"
        one = kv_attention_segments(q, [Segment([rows], 40)], case.fmt, scale=SCALE, prompt=False)
    assert mx.array_equal(got, one)


@pytest.mark.parametrize("piece_bytes", [2**28, 9000], ids=["whole", "pieces"])
def test_a_prompt_goes_by_pieces_over_all_segments(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PIECE_BYTES", piece_bytes)
    case = Case(mx.float32, 4, 8, (12, 4), 11, 29, head_dim=64)
    q, rows = case.arrays()
    with dispatch.simulate("metal"):
        got = kv_attention_segments(q, cut(rows, (5, 17), 29), case.fmt, scale=SCALE, prompt=True)
        whole = kv_attention_segments(q, [Segment([rows], 29)], case.fmt, scale=SCALE, prompt=True)
    assert mx.array_equal(got, whole)
    assert mx.abs(got - reference(q, cut(rows, (5, 17), 29), case.fmt, scale=SCALE)).max().item() < 2e-6
