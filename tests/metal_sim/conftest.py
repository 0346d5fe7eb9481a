"""What the tests of the simulator share."""

from __future__ import annotations

import platform

import pytest
from metal_sim import on_metal


@pytest.fixture
def needs_simulator() -> None:
    """Skipped on a Mac, which has the real thing; elsewhere as `on_metal` decides."""
    if platform.system() == "Darwin":
        pytest.skip("a Mac runs kernels itself")
    with on_metal():
        pass
