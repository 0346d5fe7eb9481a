"""The memory budget, kept: what a call would take is summed up and refused before any of it is allocated."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_codellama.config import ModelArgs
from mlx_codellama.engine import chunk_tokens
from mlx_codellama.errors import MemoryBudgetError
from mlx_codellama.kernels import dispatch
from mlx_codellama.memory import (
    CHUNK_LIMITS,
    CPU,
    GPU,
    MachineMemory,
    MemoryPlan,
    Runtime,
    chunk_limit,
    has_other_codes,
    machine_memory,
    plan,
    require,
)
from mlx_codellama.storage import STEP, KVStorage


def runtime_of(args: ModelArgs, dtype: str | None, *, wide: bool = True) -> Runtime:
    """How this machine runs the model. dtype: of the activations; None for the backend's own. wide: see `Runtime`."""
    name = dispatch.backend()
    runtime = replace(CPU if name == "cpu" else GPU, name=name, chunk=lambda offset: chunk_tokens(args, offset))
    if name == "cpu":
        native = dispatch.native() is not None
        multiplied = native and (wide or not has_other_codes(args))
        runtime = replace(runtime, unpacks=not multiplied and dtype in (None, "float32"))  # never for 16-bit values
        if native:
            runtime = replace(runtime, fused=True, widens=0, native=True, wide=wide)
    return replace(runtime, compute_bytes=4 if dtype == "float32" else 2) if dtype else runtime


def machine_here(budget: str | None = None) -> MachineMemory:
    """`machine_memory`; where MLX computes on an NVIDIA GPU that of the GPU, since there everything is held."""
    machine = machine_memory(budget=budget)
    if dispatch.backend() != "cuda" or "free_memory" not in (found := mx.device_info()):
        return machine
    total, free = (int(found[key]) for key in ("total_memory", "free_memory"))
    return replace(
        machine, total_bytes=total, available_bytes=free, name="GPU memory", most_bytes=None, process_free_bytes=None
    )


class Budget:
    """What one model may take: MLX_CODELLAMA_MEMORY, else a Mac's wired limit, else what is free on this machine."""

    def __init__(self, args: ModelArgs, storage: KVStorage, dtype: str | None) -> None:
        self._args, self._storage, self._dtype = args, storage, dtype
        self._runtime = runtime_of(args, dtype)
        self._machine: MachineMemory | None = None

    def plan(
        self, context: int, storage: KVStorage | None = None, most: int | None = None, *, every_logit: bool = False
    ) -> MemoryPlan:
        """most: tokens of a prefill's chunk at most. every_logit: as in `memory.plan`."""
        runtime = self._runtime
        if every_logit:
            runtime = replace(runtime, chunk=lambda offset: chunk_tokens(self._args, offset, logits=True))
        storage = storage or self._storage
        return plan(self._args, context, storage=storage, runtime=runtime.limited(most), every_logit=every_logit)

    def check_load(self, max_context: int | None) -> int | None:
        """Before loading: the weights, and a context of max_context tokens where one was asked for, else a short one.

        Where codes of 2, 3, 5 or 6 bits fit only as they are stored, they are planned for so from here on (`wide`).
        → as `check_call`. Raises MemoryBudgetError.
        """
        context = max_context or min(STEP, self._args.max_position_embeddings)
        try:
            return self._require(context, held=0)
        except MemoryBudgetError:
            if not (self._runtime.native and has_other_codes(self._args)):
                raise
            self._runtime = runtime_of(self._args, self._dtype, wide=False)
            return self._require(context, held=0)

    @property
    def wide(self) -> bool:
        """Whether codes are to be held as the native kernels multiply by them (`Runtime.wide`)."""
        return self._runtime.wide

    def check_call(
        self, n_tokens: int, reused_bytes: int, chunk: int | None = None, *, every_logit: bool = False
    ) -> int | None:
        """Before a call with the weights loaded: n_tokens of prompt and answer together.

        reused_bytes  of an earlier call's cache that this one takes over or replaces
        chunk         tokens of a prefill's chunk where the caller decides that
        every_logit   the call returns the logits of all tokens
        → how many tokens a chunk may have at most, so that it fits; None where chunks need not be cut down.
        Raises MemoryBudgetError where the smallest chunks are too large.
        """
        held = self.plan(n_tokens).weights_bytes + reused_bytes
        return self._require(n_tokens, held=held, chunk=chunk, every_logit=every_logit)

    def check_file(self, path: Path) -> None:
        """Before a saved cache is loaded. Raises MemoryBudgetError where it is larger than what is left."""
        size = path.stat().st_size
        if mx.get_active_memory() + size > self._current().allowed_bytes(mx.get_active_memory()):
            gc.collect()
            mx.clear_cache()
        machine, active = self._current(), mx.get_active_memory()
        if active + size > machine.allowed_bytes(active):
            raise MemoryBudgetError(
                f"{path} holds {size / 1e9:.2f} GB of keys and values, with the weights that is more than the "
                f"{machine.allowed_bytes(active) / 1e9:.2f} GB that may be taken",
                hint="leave --cache out, or read the prompt again with fewer --kv-bits",
            )

    def allowed_bytes(self) -> int:
        """What this process may hold in all, given what it holds already."""
        return self._current().allowed_bytes(mx.get_active_memory())

    def _current(self) -> MachineMemory:
        known = self._machine
        if known is None or known.limit_moves or known.process_free_bytes is not None:
            known = self._machine = machine_here()
        return known

    def _require(self, n_tokens: int, *, held: int, chunk: int | None = None, every_logit: bool = False) -> int | None:
        try:
            return self._fits(n_tokens, held, chunk, every_logit)
        except MemoryBudgetError:  # what nobody holds any more may still wait for Python's collector
            gc.collect()
            mx.clear_cache()
        return self._fits(n_tokens, held, chunk, every_logit)

    def _fits(self, n_tokens: int, held: int, chunk: int | None, every_logit: bool) -> int | None:
        active, machine = mx.get_active_memory(), self._current()
        held = min(held, active)

        def planned(n: int, storage: KVStorage) -> MemoryPlan:
            return self.plan(n, storage, chunk or CHUNK_LIMITS[-1], every_logit=every_logit)

        require(planned, self._storage, n_tokens, machine, active_bytes=active, held_bytes=held)
        room = machine.allowed_bytes(active) - (active - held)
        return chunk or chunk_limit(lambda most: self.plan(n_tokens, most=most, every_logit=every_logit), room)
