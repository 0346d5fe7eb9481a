"""Attention over packed rows: the reference against float64 on the unpacked values, and every path against both."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels import dispatch, kv_attention_rows
from mlx_codellama.kernels.packed_kv import RowFormat

# H, K, L, T, D pairwise different within a case. L = 1 decodes, L = 7 is speculation, L = 40 is a prompt's chunk.
CASES = [(4, 2, 3, 7, 32), (6, 6, 7, 50, 64), (8, 1, 1, 9, 128), (3, 3, 1, 1, 96), (2, 1, 40, 75, 64)]
WIDTHS = [(4, 4), (8, 4), (8, 8), (16, 4)]
SCALE = 0.19


def arrays(h, k, l, t, d, fmt, dtype=mx.float32):
    """q, rows with 5 rows of noise past T, and what float64 attention over the unpacked values gives."""
    rng = np.random.default_rng(h * 1000 + t)
    draw = lambda heads, n: mx.array(rng.standard_normal((2, heads, n, d)).astype(np.float32))  # noqa: E731
    q, rows = draw(h, l).astype(dtype), fmt.pack(draw(k, t), draw(k, t))
    spare = mx.array(rng.integers(0, 2**32, (2, k, 5, fmt.words), dtype=np.uint32))
    keys, values = (np.asarray(a, np.float64) for a in fmt.unpack(rows))
    wide, truth = np.asarray(q.astype(mx.float32), np.float64), np.zeros((2, h, l, d))
    for b, head, i in np.ndindex(2, h, l):
        seen = t - l + i + 1
        scores = SCALE * keys[b, head // (h // k), :seen] @ wide[b, head, i]
        weights = np.exp(scores - scores.max())
        truth[b, head, i] = weights / weights.sum() @ values[b, head // (h // k), :seen]
    return q, mx.concatenate([rows, spare], axis=2), truth


def error(out, truth):
    return np.abs(np.asarray(out.astype(mx.float32), np.float64) - truth).max()


@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_attention_over_the_first_rows(case, bits):
    fmt = RowFormat(case[4], *bits)
    q, rows, truth = arrays(*case, fmt)
    # float32 accumulation over at most 128 products of size ~1
    assert error(kv_attention_rows.reference(q, rows, fmt, scale=SCALE, offset=case[3] - case[2]), truth) < 3e-6


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_path_errs_at_most_twice_as_much_as_the_reference(case, bits, dtype):
    fmt = RowFormat(case[4], *bits)
    q, rows, truth = arrays(*case, fmt, dtype)
    offset = case[3] - case[2]
    out = kv_attention_rows.kv_attention_rows(q, rows, fmt, scale=SCALE, offset=offset)
    assert out.dtype == dtype
    allowed = 2 * error(kv_attention_rows.reference(q, rows, fmt, scale=SCALE, offset=offset), truth) + 1e-6
    assert error(out, truth) <= allowed
    assert "kv_attention_rows" in dispatch.paths()


@pytest.mark.parametrize("block", [1, 3, 40])
def test_blocks_of_queries_change_nothing(monkeypatch, block):
    """40 queries over 75 keys, in 40, 14 and 1 blocks."""
    case = (2, 1, 40, 75, 64)
    fmt = RowFormat(64, 8, 4)
    q, rows, truth = arrays(*case, fmt)
    monkeypatch.setattr(kv_attention_rows, "SCORES_BYTES", block * 4 * 2 * 2 * 75)
    assert error(kv_attention_rows.unpacked(q, rows, fmt, scale=SCALE, offset=35), truth) < 3e-6


def test_a_long_prompt_never_makes_the_whole_matrix_of_scores(monkeypatch):
    """8 heads, 512 queries, 4096 keys: 64 MiB of scores, of which blocks may make 4."""
    monkeypatch.setattr(kv_attention_rows, "SCORES_BYTES", 4 * 2**20)
    fmt = RowFormat(32, 4, 4)
    q, rows = mx.ones((1, 8, 512, 32)), fmt.pack(mx.ones((1, 1, 4096, 32)), mx.ones((1, 1, 4096, 32)))
    mx.eval(q, rows)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(kv_attention_rows.unpacked(q, rows, fmt, scale=SCALE, offset=4096 - 512))
    assert mx.get_peak_memory() - before < 40 * 2**20  # MLX allocates ahead: several blocks are alive at once


@pytest.mark.parametrize(
    ("shape", "match"),
    [((2, 3, 8, 36), "rows"), ((2, 2, 6, 36), "among 7"), ((2, 2, 8, 35), "rows"), ((1, 2, 8, 36), "rows")],
)
def test_rows_that_do_not_fit_the_queries_are_refused(shape, match):
    fmt = RowFormat(128, 4, 4)
    with pytest.raises(ValueError, match=match):
        kv_attention_rows.kv_attention_rows(
            mx.zeros((2, 4, 2, 128)), mx.zeros(shape, mx.uint32), fmt, scale=1.0, offset=5
        )
