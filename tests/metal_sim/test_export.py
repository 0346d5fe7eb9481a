"""The sources for Apple's compiler are what MLX generates for our kernels."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from metal_sim import export

from mlx_codellama.kernels.gpu import catalogue

every_entry = catalogue.entries


def test_each_kernel_is_a_file_that_starts_as_mlx_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three entries are enough: rope_append, and both passes of attention for two plans, one of them of segments."""
    monkeypatch.setattr(catalogue, "entries", lambda language: itertools.islice(every_entry(language), 3))
    files = export.write(tmp_path)
    kernels = {file.name.partition("-")[2] for file in files}
    attention = {f"kv_attention_{name}.metal" for name in ("lanes", "lanes_segments", "merge")}
    assert kernels == {*attention, "rope_append.metal"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        name = text.splitlines()[0].removeprefix("// ")
        assert text.splitlines()[1] == '#include "mlx/backend/metal/kernels/utils.h"'
        assert f"[[kernel]] void {name}(" in text
        assert f'[[host_name("{name}")]]' in text
