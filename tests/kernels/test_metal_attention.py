"""The Metal kernels of decode attention over packed rows, in the simulator (on a Mac: on its GPU).

Truth is float64 over the values that the rows stand for. Allowed: twice the error of the reference in the same dtype,
and the rounding of float32 sums. Checked mode finds races, bounds, uninitialised reads and unwritten outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, Simulation, on_metal

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.gpu.selftest import attention_truth, float64
from mlx_codellama.kernels.kv_attention_rows import kv_attention_rows, reference
from mlx_codellama.kernels.packed_kv import RowFormat

SCALE = 0.13
FLOAT32_SUMS = 1e-6  # of the largest value
BITS = (16, 8, 4)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
LAYOUTS = {"MHA": (3, 3), "GQA-4": (8, 2), "GQA-8": (16, 2), "odd": (7, 1)}  # query heads, kv heads


class Case(NamedTuple):
    """Sizes of one attention. Extents differ pairwise wherever an axis could be taken for another."""

    dtype: mx.Dtype
    k_bits: int
    v_bits: int
    heads: tuple[int, int]
    length: int
    n_tokens: int
    head_dim: int = 128
    batch: int = 1
    blocks: int = 2

    @property
    def fmt(self) -> RowFormat:
        return RowFormat(self.head_dim, self.k_bits, self.v_bits)

    @property
    def plan(self) -> gpu.Plan:
        found = gpu.plan("metal", self.dtype, self.fmt, self.heads[0] // self.heads[1] * self.length)
        assert found is not None
        return found

    def arrays(self) -> tuple[mx.array, mx.array]:
        """q, and rows of which those after n_tokens are NaN in every part."""
        random = np.random.default_rng(self.n_tokens * 100 + self.length)
        h, n_kv = self.heads

        def normal(*shape: int) -> mx.array:
            return mx.array(random.standard_normal(shape).astype(np.float32))

        q = normal(self.batch, h, self.length, self.head_dim).astype(self.dtype)
        k, v = (normal(self.batch, n_kv, self.n_tokens, self.head_dim) for _ in range(2))
        unused = mx.full((self.batch, n_kv, 5, self.fmt.words), 0xFFFFFFFF, mx.uint32)
        return q, mx.concatenate([self.fmt.pack(k, v + 0.5), unused], axis=2)


def error(case: Case) -> float:
    """The kernel's error as a multiple of what is allowed."""
    q, rows = case.arrays()
    offset = case.n_tokens - case.length
    truth = attention_truth(q, *case.fmt.unpack(rows[:, :, : case.n_tokens]), scale=SCALE, offset=offset)
    plain = np.abs(float64(reference(q, rows, case.fmt, scale=SCALE, offset=offset)) - truth).max()
    got = gpu.attend(case.plan, q, rows, scale=SCALE, offset=offset, blocks=case.blocks)
    assert got.dtype == case.dtype
    assert got.shape == q.shape
    found = float(np.abs(float64(got) - truth).max() / (2 * plain + FLOAT32_SUMS * np.abs(truth).max()))
    return found if found == found else float("inf")


# Every dtype, width, layout, form and head size stands at least once; the slow test below has all their combinations.
FEW = [
    Case(mx.float16, 4, 4, LAYOUTS["MHA"], 1, 261, batch=2, blocks=3),
    Case(mx.bfloat16, 8, 4, LAYOUTS["GQA-4"], 1, 37, blocks=2),
    Case(mx.float32, 16, 8, LAYOUTS["MHA"], 2, 133),
    Case(mx.float16, 4, 16, LAYOUTS["MHA"], 3, 3, blocks=1),
    Case(mx.float16, 4, 4, LAYOUTS["GQA-8"], 1, 261, blocks=3),
    Case(mx.bfloat16, 16, 4, LAYOUTS["odd"], 1, 70, batch=2),
    Case(mx.float32, 8, 8, LAYOUTS["GQA-8"], 2, 99),
    Case(mx.float16, 4, 8, LAYOUTS["odd"], 5, 37),
    Case(mx.float16, 8, 8, LAYOUTS["MHA"], 8, 21, head_dim=64),
    Case(mx.float32, 4, 16, (10, 2), 1, 45, head_dim=32, blocks=4),
    Case(mx.bfloat16, 4, 4, (3, 1), 1, 67, head_dim=256),
]


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_agree_with_float64_and_checked_mode_finds_nothing(order: str) -> None:
    for case in FEW[ORDERS.index(order) :: len(ORDERS)]:
        with on_metal(order=order, seed=case.n_tokens):
            assert error(case) <= 1, case


def sizes() -> Iterator[Case]:
    lengths = itertools.cycle([(1, 1), (1, 7), (1, 263), (2, 34), (3, 129), (8, 65)])
    for dtype, k_bits, v_bits, heads in itertools.product(DTYPES, BITS, BITS, LAYOUTS.values()):
        for _ in range(2):
            length, n_tokens = next(lengths)
            yield Case(dtype, k_bits, v_bits, heads, length, n_tokens)


ALL = [*sizes(), *FEW]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_dtype_width_and_layout_agrees_in_three_lane_orders(case: Case) -> None:
    for order in ORDERS:
        with on_metal(order=order, seed=case.length):
            assert error(case) <= 1, order


def requested(sim: Simulation, case: Case) -> tuple[float, float]:
    """Bytes of rows and of codes that threads asked for, as multiples of those that n_tokens rows hold."""
    (report,) = [report for report in sim.reports if "rows" in report.traffic]
    traffic, fmt = report.traffic["rows"], case.fmt
    n_rows = case.heads[1] * case.batch * case.n_tokens
    per_word = traffic.reads.reshape(-1, fmt.words, 4)[:, :, 0].sum(axis=0)
    codes = per_word[: fmt.k_scale_start].sum() / (n_rows * fmt.k_scale_start)
    return traffic.read / (n_rows * fmt.bytes), float(codes)


@pytest.mark.parametrize("n_tokens", [1, 301])
@pytest.mark.parametrize(
    ("layout", "bits"), [("MHA", (4, 4)), ("GQA-8", (4, 4)), ("GQA-4", (8, 4)), ("GQA-8", (16, 8))]
)
def test_each_byte_of_the_cache_is_read_once(layout: str, bits: tuple[int, int], n_tokens: int) -> None:
    """Not once per query head; group words travel between lanes, so they count once as well."""
    case = Case(mx.float16, *bits, LAYOUTS[layout], 1, n_tokens)
    with on_metal() as sim:
        assert error(case) <= 1
        if sim.reports:
            assert requested(sim, case) == (1.0, 1.0)


def test_the_op_takes_the_metal_path_after_a_selftest(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    case = Case(mx.float16, 4, 4, LAYOUTS["MHA"], 1, 261)
    q, rows = case.arrays()
    with on_metal(checked=False):
        got = kv_attention_rows(q, rows, case.fmt, scale=SCALE, offset=260)
        assert dispatch.paths()["kv_attention_rows"] == "metal"
    assert "kv_attention_lanes<float16, D128, K4 V4, 1 rows>" in (tmp_path / "kernels.json").read_text()
    want = reference(q, rows, case.fmt, scale=SCALE, offset=260)
    assert mx.abs(got - want).max().item() < 1e-3


def test_a_row_of_lanes_has_the_same_bits_beside_others() -> None:
    """Three tokens at once, and each alone: the last two begin a block that the first does not see."""
    case = Case(mx.float32, 8, 4, LAYOUTS["MHA"], 3, 258)
    q, rows = case.arrays()

    def attend(first: int, end: int) -> mx.array:
        plan = gpu.plan("metal", case.dtype, case.fmt, end - first)
        assert plan is not None
        return gpu.attend(plan, q[:, :, first:end], rows, scale=SCALE, offset=255 + first)

    with on_metal():
        together = attend(0, 3)
        for row in range(3):
            assert mx.array_equal(together[:, :, row : row + 1], attend(row, row + 1)), row


@pytest.mark.parametrize("piece_bytes", [2**28, 9000], ids=["whole", "pieces"])
@pytest.mark.parametrize("head_dim", [64, 96], ids=["fused", "scores"])
def test_a_prefill_goes_by_pieces_of_bounded_size(
    head_dim: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 has no fused kernel in MLX: there the queries go by blocks as well."""
    sizes = []
    attention = mx.fast.scaled_dot_product_attention

    def spy(q: mx.array, k: mx.array, v: mx.array, **rest: object) -> mx.array:
        sizes.append((k.nbytes + v.nbytes, 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]))
        return attention(q, k, v, **rest)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(gpu, "PIECE_BYTES", piece_bytes)
    case = Case(mx.float32, 4, 8, (12, 4), 11, 29, head_dim=head_dim, batch=2)
    q, rows = case.arrays()
    with dispatch.simulate("metal"):
        got = kv_attention_rows(q, rows, case.fmt, scale=SCALE, offset=18)
    want = reference(q, rows, case.fmt, scale=SCALE, offset=18)
    assert mx.abs(got - want).max().item() < 2e-6
    one_head = 2 * 2 * 29 * head_dim * 4
    assert max(unpacked for unpacked, _ in sizes) <= max(piece_bytes, one_head)
    if head_dim == 96:
        assert max(scores for _, scores in sizes) <= piece_bytes
    assert (len(sizes) == 1) == (piece_bytes > 9000 and head_dim == 64)


@pytest.mark.parametrize(
    ("language", "heads", "n_tokens", "blocks"),
    [("metal", 32, 100_000, 16), ("metal", 1, 100_000, 56), ("metal", 8, 700, 3), ("cuda", 4096, 9, 1)],
)
def test_blocks_fill_the_device_and_begin_at_multiples_of_256_tokens(
    language: str, heads: int, n_tokens: int, blocks: int
) -> None:
    chunk = gpu.block_tokens(language, heads, n_tokens)
    assert chunk % 256 == 0
    assert -(-n_tokens // chunk) == blocks <= gpu.MOST_BLOCKS


def test_a_head_size_without_a_kernel_falls_back_or_is_an_error_where_metal_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(mx.float32, 8, 8, (2, 1), 1, 19, head_dim=96)
    q, rows = case.arrays()
    with dispatch.simulate("metal"):
        got = kv_attention_rows(q, rows, case.fmt, scale=SCALE, offset=18)
        assert dispatch.paths()["kv_attention_rows"] == "mlx"
        assert mx.abs(got - reference(q, rows, case.fmt, scale=SCALE, offset=18)).max().item() < 2e-6
        monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
        with pytest.raises(Exception, match="heads of 96"):
            kv_attention_rows(q, rows, case.fmt, scale=SCALE, offset=18)
