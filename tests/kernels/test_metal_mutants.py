"""Do our own checks find mistakes in our Metal kernels? One at a time, each must be found: at compile time, by the
simulator, or because the result is wrong. A sample by default; all of them, and at least 95 %, with the slow tests."""

from __future__ import annotations

import collections
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from kernels.metal_mutants import (
    APPEND,
    LANES,
    LANES_SEGMENTS,
    MERGE,
    MMA,
    MMA_SEGMENTS,
    MUTANTS,
    TILES,
    TILES_SEGMENTS,
    Mutant,
)
from kernels.test_metal_rope_append import extremes
from metal_sim import MetalError, on_metal

from mlx_codellama.kernels import kv_attention_rows, kv_attention_window, rope_append
from mlx_codellama.kernels.gpu import kernel, selftest
from mlx_codellama.kernels.gpu import kv_attention as attention
from mlx_codellama.kernels.gpu import rope_append as appending
from mlx_codellama.kernels.gpu.source import KernelText, kernel_text
from mlx_codellama.kernels.packed_kv import RowFormat

SAMPLE = MUTANTS[:: len(MUTANTS) // 5]


def attends(
    n_rows: int, k_bits: int, v_bits: int, dtype: mx.Dtype = mx.float16, head_dim: int = 128
) -> Callable[[], float]:
    plan = attention.plan("metal", dtype, RowFormat(head_dim, k_bits, v_bits), n_rows)
    assert plan is not None
    return lambda: selftest.attention_error(
        plan.fmt, plan.dtype, plan.tile_rows, kv_attention_rows.reference, attention.bound(plan)
    )


def attends_by_products(k_bits: int, v_bits: int, window: bool = False) -> Callable[[], float]:
    """CUDA's kernel for 16 query rows, which the simulator runs from the Metal text it is translated from."""
    plan = attention.plan("cuda", mx.float16, RowFormat(128, k_bits, v_bits), 16, window)
    assert plan is not None
    plan = plan._replace(language="metal")
    check, reference = selftest.attention_error, kv_attention_rows.reference
    if window:
        check, reference = selftest.window_error, kv_attention_window.reference_rows  # type: ignore[assignment]
    return lambda: check(plan.fmt, plan.dtype, plan.tile_rows, reference, attention.bound(plan))


def attends_segments(language: str, n_rows: int) -> Callable[[], float]:
    plan = attention.plan(language, mx.float16, RowFormat(128, 4, 4), n_rows, segments=True)
    assert plan is not None
    plan = plan._replace(language="metal")
    return lambda: selftest.segments_error(
        plan.fmt, plan.dtype, plan.tile_rows, kv_attention_rows.reference, attention.bound(plan)
    )


def attends_window(n_rows: int) -> Callable[[], float]:
    plan = attention.plan("metal", mx.float32, RowFormat(128, 4, 4), n_rows, window=True)
    assert plan is not None
    return lambda: selftest.window_error(
        plan.fmt, plan.dtype, plan.tile_rows, kv_attention_window.reference_rows, attention.bound(plan)
    )


def appends(head_dim: int, k_bits: int, v_bits: int) -> Callable[[], float]:
    plan = appending.plan("metal", mx.float32, RowFormat(head_dim, k_bits, v_bits))
    assert plan is not None
    return lambda: selftest.append_error(plan.fmt, plan.dtype, rope_append.reference, appending.bound(plan))


def packs_extremes() -> float:
    """0 or 1: rows of V that are easy to get wrong, word for word."""
    fmt, given = extremes()
    plan = appending.plan("metal", mx.float32, fmt)
    assert plan is not None
    words = [
        np.array(rows)[..., fmt.v_start :]
        for rows in (appending.append(plan, *given)[1], rope_append.reference(*given, fmt)[1])
    ]
    return 2.0 * float((words[0] != words[1]).any())


# The self-tests that a device would run; the second of each reaches what the first does not.
SELFTESTS = {
    LANES: [attends(4, 4, 4, mx.float32), attends(3, 4, 16), attends(1, 16, 4, head_dim=64), attends_window(2)],
    TILES: [attends(16, 4, 8, mx.float32), attends(8, 4, 4), attends_window(8)],
    MMA: [attends_by_products(4, 8), attends_by_products(8, 4, window=True)],
    LANES_SEGMENTS: [attends_segments("metal", 1)],
    TILES_SEGMENTS: [attends_segments("metal", 8)],
    MMA_SEGMENTS: [attends_segments("cuda", 16)],
    MERGE: [attends(1, 4, 4)],
    APPEND: [appends(128, 4, 8), appends(32, 8, 16), packs_extremes],
}


def stage(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the mistake was found: in the simulator ("compile" or "run"), by a wrong "result", or "missed"."""

    def mutated(language: str, file: str, name: str) -> KernelText:
        text = kernel_text(language, file, name)
        if name != mutant.kernel:
            return text
        assert mutant.old in text.body + text.header, f"{mutant.what}: its text is not there any more"
        if mutant.old in text.body:
            return text._replace(body=text.body.replace(mutant.old, mutant.new, 1))
        return text._replace(header=text.header.replace(mutant.old, mutant.new, 1))

    monkeypatch.setattr(kernel, "kernel_text", mutated)
    for run in SELFTESTS[mutant.kernel]:
        try:
            with on_metal(order="random", seed=1, cpu_s=10):
                if not run() <= 1:
                    return "result"
        except MetalError as error:
            return "compile" if "error: " in str(error) else "run"
    return "missed"


@pytest.mark.slow
@pytest.mark.parametrize("name", SELFTESTS)
def test_the_kernels_as_they_are_pass_the_same_selftests(name: str) -> None:
    for run in SELFTESTS[name]:
        with on_metal(order="random", seed=1):
            assert run() <= 1


@pytest.mark.parametrize("mutant", SAMPLE, ids=lambda mutant: mutant.what)
def test_a_mistake_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage(mutant, monkeypatch) != "missed"


@pytest.mark.slow
def test_at_least_95_percent_of_all_mistakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {mutant.what: stage(mutant, monkeypatch) for mutant in MUTANTS}
    assert len(found) == len(MUTANTS) >= 40
    counts = collections.Counter(found.values())
    missed = [what for what, where in found.items() if where == "missed"]
    assert len(missed) <= 0.05 * len(MUTANTS), (counts, missed)
