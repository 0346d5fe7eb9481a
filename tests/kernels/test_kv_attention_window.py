"""Attention over a window: which keys a query sees is found here from positions, in float64, one key at a time.

Passing is not luck: of 40 to 500 keys each weighs about as much as the next, so one key too many or too few errs by
more than a hundred times what is allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import ORDERS, on_metal

from mlx_codellama.kernels import dispatch, kv_attention_window
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.gpu import selftest
from mlx_codellama.kernels.kv_attention_window import Window, kv_attention_window_rows, reference, reference_rows
from mlx_codellama.kernels.packed_kv import RowFormat

SCALE = 0.17


class Case(NamedTuple):
    """Sizes, pairwise different within a case. `newest` is the position of the last query."""

    heads: tuple[int, int]
    length: int
    newest: int
    sinks: int
    size: int
    ring: int | None = None
    head_dim: int = 64
    batch: int = 2

    @property
    def n_places(self) -> int:
        return self.newest + 1 if self.ring is None else min(self.newest + 1, self.sinks + self.ring)

    @property
    def positions(self) -> list[int]:
        """Of the key that lies at each place: written one after the other, as they come."""
        at: dict[int, int] = {}
        for p in range(self.newest + 1):
            at[p if p < self.sinks or self.ring is None else self.sinks + (p - self.sinks) % self.ring] = p
        return [at[place] for place in range(self.n_places)]

    @property
    def window(self) -> Window:
        return Window(self.sinks, self.size, self.positions.index(self.newest - self.length + 1), self.ring)

    @property
    def hidden(self) -> np.ndarray:
        rows = []
        for own in range(self.newest - self.length + 1, self.newest + 1):
            rows.append([not (p <= own and (p < self.sinks or p > own - self.size)) for p in self.positions])
        return np.array(rows)

    def arrays(self, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
        random = np.random.default_rng(self.newest + self.length)
        shape = [(self.heads[0], self.length), *[(self.heads[1], self.n_places)] * 2]
        q, k, v = (mx.array(random.standard_normal((self.batch, *s, self.head_dim)).astype(np.float32)) for s in shape)
        return q.astype(dtype), k.astype(dtype), (v + 0.5).astype(dtype)


CASES = [
    Case((6, 3), 1, 40, 2, 31),
    Case((4, 2), 7, 6, 3, 4),  # from the beginning, sinks among the queries' own keys
    Case((3, 3), 45, 130, 4, 60),  # a chunk behind others
    Case((8, 1), 150, 399, 5, 70),
    Case((2, 1), 9, 300, 0, 140),
    Case((6, 3), 1, 40, 2, 31, 38),  # a ring that is full
    Case((6, 3), 1, 37, 2, 31, 38),  # and one that is not
    Case((8, 1), 3, 500, 3, 150, 160),
    Case((3, 3), 5, 4 + 2 * 41, 4, 30, 41),  # the queries' keys lie at both ends
    Case((2, 1), 16, 1500, 1, 640, 660),  # split over threads, with whole blocks hidden
    Case((16, 2), 2, 777, 4, 200, 240),
    Case((8, 1), 20, 899, 3, 130, 162),  # two tiles of queries, older keys behind the newest
    Case((1, 1), 90, 1715, 4, 300),  # a block of keys that only the first queries see
    Case((5, 5), 8, 90, 0, 12, 44),
]
BITS = [(4, 4), (8, 4), (4, 16)]


def check(out: mx.array, plain: mx.array, truth: np.ndarray) -> None:
    allowed = 2 * np.abs(selftest.float64(plain) - truth).max() + 16 * 2.0**-24 * np.abs(truth).max()
    assert np.abs(selftest.float64(out) - truth).max() <= allowed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_query_sees_the_sinks_and_the_window_by_position(case: Case) -> None:
    q, k, v = case.arrays()
    truth = selftest.attention_truth(q, k, v, scale=SCALE, hidden=case.hidden)
    found = reference(q, k, v, case.window, scale=SCALE)
    assert np.abs(selftest.float64(found) - truth).max() < 3e-6  # float32 sums of at most 640 terms


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fast_path_over_floats_errs_at_most_twice_as_much(case: Case, dtype: mx.Dtype) -> None:
    q, k, v = case.arrays(dtype)
    truth = selftest.attention_truth(q, k, v, scale=SCALE, hidden=case.hidden)
    out = kv_attention_window.kv_attention_window(q, k, v, case.window, scale=SCALE)
    assert out.dtype == dtype
    check(out, reference(q, k, v, case.window, scale=SCALE), truth)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fast_path_over_packed_rows_errs_at_most_twice_as_much(case: Case, bits: tuple) -> None:
    """With rows of noise behind the last."""
    fmt = RowFormat(case.head_dim, *bits)
    q, k, v = case.arrays()
    rows = fmt.pack(k, v)
    noise = mx.random.randint(0, 2**31, (case.batch, k.shape[1], 5, fmt.words), key=mx.random.key(4)).astype(mx.uint32)
    truth = selftest.attention_truth(q, *fmt.unpack(rows), scale=SCALE, hidden=case.hidden)
    stored = mx.concatenate([rows, noise], axis=2)
    out = kv_attention_window_rows(q, stored, fmt, case.window, total=case.n_places, scale=SCALE)
    check(out, reference_rows(q, rows, fmt, case.window, scale=SCALE), truth)


def test_the_native_kernels_take_it_where_there_are_any() -> None:
    if dispatch.native() is None:
        pytest.skip("no native kernels")
    for case in (CASES[2], CASES[7]):
        q, k, v = case.arrays()
        kv_attention_window.kv_attention_window(q, k, v, case.window, scale=SCALE)
        assert dispatch.paths().pop("kv_attention_window") == "native"


def test_without_native_kernels_scores_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_attention_window, "SCORES_BYTES", 4 * 2 * 8 * 400 * 11)  # eleven queries of CASES[3]
    monkeypatch.setattr(kv_attention_window.floats, "native_heads", lambda width: None)
    for case in CASES:
        q, k, v = case.arrays()
        truth = selftest.attention_truth(q, k, v, scale=SCALE, hidden=case.hidden)
        out = kv_attention_window.kv_attention_window(q, k, v, case.window, scale=SCALE)
        check(out, reference(q, k, v, case.window, scale=SCALE), truth)
        fmt = RowFormat(64, 8, 8)
        rows = fmt.pack(k, v)
        out = kv_attention_window_rows(q, rows, fmt, case.window, total=case.n_places, scale=SCALE)
        check(out, *[reference_rows(q, rows, fmt, case.window, scale=SCALE)] * 1, selftest.attention_truth(
            q, *fmt.unpack(rows), scale=SCALE, hidden=case.hidden))  # fmt: skip


@pytest.mark.parametrize(
    ("length", "total", "window"),
    [
        (1, 10, Window(2, 5, 10)),  # its own key behind the end
        (4, 12, Window(2, 9, 11, 10)),  # the ring too small for the pass
        (3, 11, Window(2, 5, 9, 10)),  # keys at both ends of a ring that is not full
        (1, 12, Window(2, 5, 12, 10)),
    ],
    ids=str,
)
def test_places_that_do_not_hold_the_queries_are_refused(length: int, total: int, window: Window) -> None:
    q, k = mx.zeros((1, 2, length, 32)), mx.zeros((1, 1, total, 32))
    with pytest.raises(ValueError, match=r"do not (fit|hold)"):
        kv_attention_window.kv_attention_window(q, k, k, window, scale=SCALE)


# ── Metal, in the simulator ─────────────────────────────────────────────────────────────────────────────────────────

FEW = [
    (Case((3, 3), 1, 700, 4, 250, 261, 128, 1), (4, 4), mx.float16),
    (Case((8, 2), 1, 200, 3, 61, 70, 128, 1), (8, 4), mx.bfloat16),
    (Case((3, 3), 2, 132, 2, 90, 131, 128, 1), (16, 8), mx.float32),
    (Case((16, 2), 1, 1000, 4, 230, 257, 128, 1), (4, 4), mx.float16),
    (Case((16, 2), 2, 4 + 3 * 95, 4, 70, 95, 128, 1), (8, 8), mx.float32),  # tiles, keys at both ends
    (Case((7, 1), 5, 60, 0, 20, 37, 128, 1), (4, 8), mx.float16),
    (Case((3, 3), 8, 77, 5, 16, 23, 64, 1), (8, 8), mx.float16),
]


@pytest.mark.parametrize("order", ORDERS)
def test_metal_kernels_agree_and_checked_mode_finds_nothing(order: str) -> None:
    for case, bits, dtype in FEW[ORDERS.index(order) :: len(ORDERS)]:
        fmt = RowFormat(case.head_dim, *bits)
        q, k, v = case.arrays(dtype)
        rows = fmt.pack(k.astype(mx.float32), v.astype(mx.float32))
        truth = selftest.attention_truth(q, *fmt.unpack(rows), scale=SCALE, hidden=case.hidden)
        plain = reference_rows(q, rows, fmt, case.window, scale=SCALE)
        chosen = gpu.plan("metal", dtype, fmt, case.heads[0] // case.heads[1] * case.length, window=True)
        assert chosen is not None
        offset, window = case.n_places - case.length, case.window.numbers()
        with on_metal(order=order, seed=case.newest):
            out = gpu.attend(chosen, q, rows, scale=SCALE, offset=offset, window=window, blocks=2)
            check(out, plain, truth)


def test_the_op_takes_the_metal_path_after_a_selftest(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    case, bits, dtype = FEW[0]
    fmt = RowFormat(case.head_dim, *bits)
    q, k, v = case.arrays(dtype)
    rows = fmt.pack(k.astype(mx.float32), v.astype(mx.float32))
    with on_metal(checked=False):
        got = kv_attention_window_rows(q, rows, fmt, case.window, total=case.n_places, scale=SCALE)
        assert dispatch.paths()["kv_attention_window"] == "metal"
    assert "4 V4, 1 rows, window>" in (tmp_path / "kernels.json").read_text()
    assert mx.abs(got - reference_rows(q, rows, fmt, case.window, scale=SCALE)).max().item() < 1e-3


@pytest.mark.parametrize("head_dim", [64, 96], ids=["fused", "scores"])
def test_a_chunk_on_a_gpu_goes_by_pieces_under_the_mask(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PIECE_BYTES", 9000)
    case = CASES[2]._replace(head_dim=head_dim)
    fmt = RowFormat(head_dim, 8, 4)
    q, k, v = case.arrays()
    rows = fmt.pack(k, v)
    with dispatch.simulate("metal"):
        got = kv_attention_window_rows(q, rows, fmt, case.window, total=case.n_places, scale=SCALE)
    assert mx.abs(got - reference_rows(q, rows, fmt, case.window, scale=SCALE)).max().item() < 3e-6
