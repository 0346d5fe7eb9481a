"""RoPE tables at the far end of the context: exact to float32 rounding, against float64 and against mpmath."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_codellama.kernels.rope import RopeTable

LAST = 131_071
HEAD_DIM = 128
HALF_ULP = (
    0.5 + 1e-3
)  # of float32; the margin is the float64 angle's own error, 131071 · 2^-53 rad against an ulp of 2^-24


def table_row(position: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = RopeTable(HEAD_DIM, theta).rows(position, 1)
    return np.array(cos)[0], np.array(sin)[0]


def ulps(ours: np.ndarray, truth: np.ndarray) -> float:
    """Largest distance in units of the last place of float32 at the true value."""
    return float((np.abs(ours.astype(np.float64) - truth) / np.spacing(np.abs(truth).astype(np.float32))).max())


@pytest.mark.parametrize("theta", [1e6, 1e4])
@pytest.mark.parametrize("position", [0, 1, 255, 16_383, 99_999, LAST])
def test_tables_are_float64_values_rounded_once(position: int, theta: float) -> None:
    frequency = np.float64(theta) ** -(np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    cos, sin = table_row(position, theta)
    assert ulps(cos, np.cos(position * frequency)) <= HALF_ULP
    assert ulps(sin, np.sin(position * frequency)) <= HALF_ULP


def test_a_float32_angle_would_fail_these_tests() -> None:
    frequency = (np.float32(1e6) ** -(np.arange(HEAD_DIM // 2, dtype=np.float32) * 2 / HEAD_DIM)).astype(np.float32)
    cos, _ = table_row(LAST, 1e6)
    assert ulps(cos, np.cos(np.float32(LAST) * frequency, dtype=np.float32).astype(np.float64)) > 1000


@pytest.mark.peers
@pytest.mark.parametrize("position", [16_383, LAST])
def test_tables_agree_with_fifty_digits_of_mpmath(position: int) -> None:
    mpmath = pytest.importorskip("mpmath")
    cos, sin = table_row(position, 1e6)
    with mpmath.workdps(50):
        angles = [position * mpmath.mpf(10) ** (mpmath.mpf(-12 * i) / HEAD_DIM) for i in range(HEAD_DIM // 2)]
        true_cos = np.array([float(mpmath.cos(a)) for a in angles])
        true_sin = np.array([float(mpmath.sin(a)) for a in angles])
    assert ulps(cos, true_cos) <= HALF_ULP
    assert ulps(sin, true_sin) <= HALF_ULP
