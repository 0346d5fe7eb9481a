"""The kernels that a released model or the demo would use, for `doctor --kernels` and for exporting their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.kernels import kv_attention_rows, kv_attention_window, rope_append
from mlx_codellama.kernels.gpu import kv_attention as attention
from mlx_codellama.kernels.gpu import rope_append as appending
from mlx_codellama.kernels.gpu import selftest, trust
from mlx_codellama.kernels.packed_kv import Bits, RowFormat

WIDTHS: tuple[tuple[Bits, Bits], ...] = ((4, 4), (8, 4), (8, 8), (16, 16))
DTYPES = (mx.float16, mx.bfloat16)
SHAPES = ((False, False), (False, True), (True, False))  # of a window or not; in segments or not
QUERY_ROWS = (1, 4, 8, 16)  # 7B and 13B; a few tokens at once; 34B and 70B; those with several tokens


class Entry(NamedTuple):
    """A compiled kernel, and the self-test that shows it right or wrong."""

    plan: trust.Planned
    selftest: Callable[[], float]


def entries(language: str) -> Iterator[Entry]:
    """Heads of 128 values, as in every released model."""
    for dtype in DTYPES:
        for k_bits, v_bits in WIDTHS:
            fmt = RowFormat(128, k_bits, v_bits)
            if plan := appending.plan(language, dtype, fmt):
                yield Entry(plan, _append_selftest(plan))
            for n_rows in QUERY_ROWS:
                for window, segments in SHAPES if (k_bits, v_bits) == WIDTHS[0] else SHAPES[:2]:
                    if found := attention.plan(language, dtype, fmt, n_rows, window, segments=segments):
                        yield Entry(found, _attention_selftest(found))


def table(language: str) -> Iterator[trust.Verdict]:
    """Try every kernel now, whatever was known of it."""
    for entry in entries(language):
        yield trust.verdict(entry.plan, entry.selftest)


def _append_selftest(plan: appending.Plan) -> Callable[[], float]:
    return lambda: selftest.append_error(plan.fmt, plan.dtype, rope_append.reference, appending.bound(plan))


def _attention_selftest(plan: attention.Plan) -> Callable[[], float]:
    how = plan.fmt, plan.dtype, plan.tile_rows
    if plan.window:
        return lambda: selftest.window_error(*how, kv_attention_window.reference_rows, attention.bound(plan))
    check = selftest.segments_error if plan.segments else selftest.attention_error
    return lambda: check(*how, kv_attention_rows.reference, attention.bound(plan))
