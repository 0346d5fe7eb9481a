"""The memory budget, kept: what a call would take is summed up and refused before any of it is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import MemoryBudgetError
from mlx_codellama.generate import chunk_tokens
from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.quant_matmul import NATIVE_BITS
from mlx_codellama.memory import CPU, GPU, MachineMemory, MemoryPlan, Runtime, machine_memory, plan, require
from mlx_codellama.storage import STEP, KVStorage


def runtime_of(args: ModelArgs, dtype: str | None) -> Runtime:
    """How this machine runs the model. dtype: of the activations; None for the backend's own."""
    name = dispatch.backend()
    runtime = replace(CPU if name == "cpu" else GPU, name=name, chunk=lambda offset: chunk_tokens(args, offset))
    if name == "cpu" and dispatch.native() is not None and dtype in (None, "float32"):
        quantised = args.quantization
        kinds = [quantised.default, *quantised.overrides.values()] if quantised else []
        unpacks = any(kind is not None and kind.bits not in NATIVE_BITS for kind in kinds)
        runtime = replace(runtime, fused=True, unpacks=unpacks)
    return replace(runtime, compute_bytes=4 if dtype == "float32" else 2) if dtype else runtime


class Budget:
    """What one model may take: MLX_CODELLAMA_MEMORY, else a Mac's wired limit, else what is free on this machine."""

    def __init__(self, args: ModelArgs, storage: KVStorage, dtype: str | None) -> None:
        self._args, self._storage = args, storage
        self._runtime = runtime_of(args, dtype)
        self._machine: MachineMemory | None = None

    def plan(self, context: int, storage: KVStorage | None = None) -> MemoryPlan:
        return plan(self._args, context, storage=storage or self._storage, runtime=self._runtime)

    def check_load(self, max_context: int | None) -> None:
        """Before loading: the weights, and a context of max_context tokens where one was asked for, else a short one.

        Raises MemoryBudgetError.
        """
        self._require(max_context or min(STEP, self._args.max_position_embeddings), held=0)

    def check_call(self, n_tokens: int, reused_bytes: int) -> None:
        """Before a call with the weights loaded: n_tokens of prompt and answer together.

        reused_bytes  of an earlier call's cache that this one takes over or replaces
        Raises MemoryBudgetError.
        """
        self._require(n_tokens, held=self.plan(n_tokens).weights_bytes + reused_bytes)

    def check_file(self, path: Path) -> None:
        """Before a saved cache is loaded. Raises MemoryBudgetError where it is larger than what is left."""
        machine, active, size = self._current(), mx.get_active_memory(), path.stat().st_size
        if active + size > machine.allowed_bytes(active):
            raise MemoryBudgetError(
                f"{path} holds {size / 1e9:.2f} GB of keys and values, with the weights that is more than the "
                f"{machine.allowed_bytes(active) / 1e9:.2f} GB that may be taken",
                hint="leave --cache out, or read the prompt again with fewer --kv-bits",
            )

    def _current(self) -> MachineMemory:
        if self._machine is None or self._machine.limit_moves:
            self._machine = machine_memory()
        return self._machine

    def _require(self, n_tokens: int, *, held: int) -> None:
        active = mx.get_active_memory()
        require(self.plan, self._storage, n_tokens, self._current(), active_bytes=active, held_bytes=min(held, active))
