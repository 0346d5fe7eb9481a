"""Metal kernels on a Linux CPU. README.md says how it works; docs/metal.md what it can and cannot catch."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Any

from metal_sim.launch import ORDERS, Memory, Report, Traffic
from metal_sim.simulator import Simulation, simulated
from metal_sim.toolchain import MetalError, Unavailable, compiler

__all__ = ["ORDERS", "Memory", "MetalError", "Report", "Simulation", "Traffic", "on_metal", "simulated"]


@contextlib.contextmanager
def on_metal(**settings: Any) -> Iterator[Simulation]:
    """Run kernels on Metal: on a Mac's own, anywhere else simulated with these settings (see `simulated`).

    Where neither can be had the test is skipped with the reason; where CI or METAL_SIM_REQUIRED is set, it fails. On a
    Mac `reports` stays empty.
    """
    if platform.system() == "Darwin":
        yield Simulation()
        return
    try:
        compiler()
    except Unavailable as error:
        import pytest  # only tests come here

        if os.environ.get("CI") or os.environ.get("METAL_SIM_REQUIRED"):
            pytest.fail(f"Metal kernels cannot be simulated: {error}")
        pytest.skip(f"Metal kernels cannot be simulated: {error}")
    with simulated(**settings) as simulation:
        yield simulation
