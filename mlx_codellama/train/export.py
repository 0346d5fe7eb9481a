"""A model in memory as a stream of blocks, ready for quantisation and `weights.save`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_codellama.model import Model
from mlx_codellama.weights import Block, TensorSpec, tensor_specs


class ModelStream:
    """The unquantised parameters of `model`, cast to `dtype` (see weights.Stream).

    files   copied beside the weights: file name → path
    record  provenance for run.json
    """

    def __init__(self, model: Model, *, dtype: str, files: dict[str, Path], record: dict[str, Any]) -> None:
        self.args = replace(model.args, dtype=dtype, quantization=None)
        self.specs: list[TensorSpec] = tensor_specs(self.args)
        self.files, self.record = files, record
        self.total_bytes, self.done_bytes = sum(spec.nbytes for spec in self.specs), 0
        self._parameters = dict(model.named_parameters())

    def blocks(self) -> Iterator[Block]:
        self.done_bytes = 0
        for spec in self.specs:
            self.done_bytes += spec.nbytes
            yield Block(spec.name, 0, self._parameters[spec.name].astype(getattr(mx, spec.dtype)))
