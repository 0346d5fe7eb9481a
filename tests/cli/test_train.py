"""train: how it ends. The training itself is shown in tests/train."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_codellama.train import demo

from .conftest import Run


def test_a_loss_that_is_not_finite_is_an_error_not_a_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def astray(*_: Any, **__: Any) -> None:
        raise FloatingPointError("step 7: loss nan, gradient norm 1.0")

    monkeypatch.setattr(demo, "train_demo", astray)
    result = run("train", tmp_path / "out", "--steps", 9)
    assert result.exit_code == 1
    assert "error: training diverged: step 7" in result.stderr
    assert "hint: " in result.stderr


def test_ctrl_c_ends_after_the_step_and_exports_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, cancel: Callable[[], bool], **__: Any) -> None:
        assert not cancel()
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel()

    monkeypatch.setattr(demo, "train_demo", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = run("train", tmp_path / "out", "--steps", 9)
    assert result.exit_code == 130
    assert "stopping after this step" in result.stderr
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "out").exists()
