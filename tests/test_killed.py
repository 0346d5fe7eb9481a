"""A few of the kills of killing.py, which does thousands: `python tests/killing.py --kills 2000`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from killing import FAULTS, WORKS

KILLS = 120


def killing(*options: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has not computed with MLX: a child forked from one that has would hang."""
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), "--seed", "1", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_kill_9_loses_nothing_and_the_command_can_be_run_again() -> None:
    done = killing("--kills", KILLS)
    assert done.returncode == 0, done.stdout + done.stderr
    for work in WORKS:
        assert f" {work.name}\n" in done.stdout  # each was killed at least once


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_killing_finds_seeded_faults(fault: str) -> None:
    done = killing("--kills", 10 * KILLS, "--fault", fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "LOST" in done.stdout
