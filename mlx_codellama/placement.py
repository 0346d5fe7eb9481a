"""How a model is held and run on this machine, decided once: `load`, `plan`, `bench` and the engine ask the result.

  ModelArgs, dtype, exact, storage ─┐
                                    ├─ place ─▶ Placement ─▶ dtype of the activations      (loader)
  Machine: backend, kernels, memory ┘                        code widths, dtype of scales  (loader)
                                                             tokens of a chunk             (engine)
                                                             bytes at a context            (plan, bench, admission)
                                                             what may still be allocated   (load, admission)

Nothing here needs MLX until memory in use is asked for, so that plans work without it.
"""

from __future__ import annotations

import gc
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_codellama.config import DTYPES, ModelArgs, QuantArgs
from mlx_codellama.errors import ConfigError, MemoryBudgetError
from mlx_codellama.memory import (
    CHUNK_LIMITS,
    MachineMemory,
    MemoryPlan,
    Runtime,
    chunk_limit,
    chunk_tokens,
    has_other_codes,
    largest_context,
    machine_memory,
    plan,
    require,
    weights_bytes,
)
from mlx_codellama.storage import STEP, KVStorage

LARGE_BYTES = 100 * 10**6  # weights from which on a slow path is worth a word


class Machine:
    """What MLX computes on here, and how much memory this process may hold."""

    def __init__(self, budget: str | None = None) -> None:
        """budget: such as 16GB, in place of MLX_CODELLAMA_MEMORY."""
        self._budget = budget
        self._memory: MachineMemory | None = None

    @property
    def backend(self) -> str:
        """metal, cuda or cpu; guessed from the platform if MLX is absent."""
        if (dispatch := _dispatch()) is not None:
            return str(dispatch.backend())
        return "metal" if platform.system() == "Darwin" else "cpu"

    @property
    def native(self) -> bool:
        """Whether there are native CPU kernels."""
        dispatch = _dispatch()
        return dispatch is not None and dispatch.native() is not None

    def memory(self) -> MachineMemory:
        """The limits of this process: MLX_CODELLAMA_MEMORY, else a Mac's wired limit, else what is free.

        Read again at each call only if it may have changed. Raises ConfigError for a budget that is no amount.
        """
        known = self._memory
        if known is None or known.limit_moves or known.process_free_bytes is not None:
            known = self._memory = self._read()
        return known

    def _read(self) -> MachineMemory:
        memory = machine_memory(budget=self._budget)
        if _dispatch() is None or self.backend != "cuda":
            return memory
        import mlx.core as mx

        if "free_memory" not in (found := mx.device_info()):
            return memory
        total, free = (int(found[key]) for key in ("total_memory", "free_memory"))
        return replace(  # MLX holds everything on an NVIDIA GPU
            memory, total_bytes=total, available_bytes=free, name="GPU memory", most_bytes=None, process_free_bytes=None
        )

    def active_bytes(self) -> int:
        """What MLX holds in this process now."""
        import mlx.core as mx

        return mx.get_active_memory()

    def allowed_bytes(self) -> int:
        """What this process may hold in all, given what it holds already."""
        return self.memory().allowed_bytes(self.active_bytes())

    def room_bytes(self) -> int:
        """What this process may still allocate."""
        active = self.active_bytes()
        return self.memory().allowed_bytes(active) - active

    def collect(self) -> None:
        """Free what nobody holds any more but still waits for Python's collector, and MLX's pool of buffers."""
        import mlx.core as mx

        gc.collect()
        mx.clear_cache()


def place(
    args: ModelArgs,
    *,
    dtype: str | None = None,
    exact: bool = False,
    storage: KVStorage | None = None,
    machine: Machine | None = None,
) -> Placement:
    """Decide how a model is held and run.

    dtype    of the activations; default: the checkpoint's, but float32 on a CPU, where 16-bit maths is emulated
    exact    see kernels/quant_matmul.py
    storage  of keys and values; default: all of them, in the activations' dtype
    machine  default: this one
    Codes are held as wide as the native kernels multiply by; `Placement.within` gives that up if memory is short.
    Raises ConfigError for an unknown dtype.
    """
    machine = machine or Machine()
    backend = machine.backend
    name = dtype or ("float32" if backend == "cpu" else args.dtype)
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", hint=f"known: {', '.join(DTYPES)}")
    runtime = Runtime(backend, 4 if name == "float32" else 2, native=machine.native)
    return Placement(args, storage or KVStorage(), name, exact, runtime, machine)


@dataclass(frozen=True)
class Placement:
    """How one model is held and run here. `place` makes it.

    dtype    of the activations, as in config.DTYPES
    runtime  what of the backend decides about memory, and whether codes are held wider
    """

    args: ModelArgs
    storage: KVStorage
    dtype: str
    exact: bool
    runtime: Runtime
    machine: Machine = field(compare=False, repr=False)

    # ── how matrices are held ───────────────────────────────────────────────────────────────────────────────────────

    def held(self, path: str) -> QuantArgs | None:
        """The codes that the matrix of the module at `path` is held as; None if it is not quantised."""
        quant = self.args.quant_of(path)
        return None if quant is None else self.runtime.held(quant)

    def keeps_dtype(self, name: str) -> bool:
        """Whether the tensor `name` keeps the dtype it is stored in, if that is a float: scales and biases that only
        the native kernels read, a tenth of the bytes. All others take `dtype`."""
        path, _, part = name.rpartition(".")
        quant = self.args.quant_of(path) if part in ("scales", "biases") else None
        return quant is not None and self.runtime.keeps_scales(path, quant)

    @property
    def held_wider(self) -> bool | None:
        """Whether codes of 2, 3, 5 and 6 bits are held as 4 or 8 for the native kernels; None if there are none of
        these, or no such kernels."""
        return self.runtime.widens_codes if self.runtime.native and has_other_codes(self.args) else None

    def as_stored(self) -> Placement:
        """The same with codes as wide as they are stored."""
        return replace(self, runtime=replace(self.runtime, widens_codes=False))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights once loaded."""
        return weights_bytes(self.args, self.runtime)

    @property
    def weight_bits(self) -> int | str:
        """Bits per weight as stored, or "mixed"."""
        quantization = self.args.quantization
        if quantization is None:
            return 16
        return "mixed" if any(quantization.overrides.values()) else quantization.default.bits

    @property
    def kv_bits(self) -> int | str:
        """Bits of stored keys and values, "8/4" if they differ; by default those of the activations."""
        if self.storage.bits is None:
            return 8 * self.runtime.compute_bytes
        keys, values = self.storage.bits
        return keys if keys == values else f"{keys}/{values}"

    def to_dict(self) -> dict[str, Any]:
        """What reports say of it."""
        scaling = self.args.rope_scaling
        return {
            "bits": self.weight_bits,
            "kv_bits": self.kv_bits,
            "window": self.storage.window,
            "rope_scaling": scaling.to_dict() if scaling else None,
            "backend": self.runtime.name,
        }

    def why_slow(self) -> str:
        """Why this CPU multiplies by the model's packed weights many times slower than it could, and what to do about
        it; empty if it does not, and for a model so small that nobody waits."""
        dispatch = _dispatch()
        if dispatch is None or self.args.quantization is None:
            return ""
        if missing := dispatch.native_missing():
            large = has_other_codes(self.args) or weights_bytes(self.args) >= LARGE_BYTES
            why = f"no native CPU kernels ({missing}): MLX's own multiply by packed weights, many times slower; "
            return why + dispatch.REINSTALL if large else ""
        if self.held_wider is False:
            return (
                "codes of 2, 3, 5 and 6 bits stay as they are stored, since held as 4 or 8 they would not fit: MLX "
                "unpacks them for every product, many times slower; free memory, or take a model of 4 bits"
            )
        return ""

    # ── chunks and plans ────────────────────────────────────────────────────────────────────────────────────────────

    def chunk_tokens(self, offset: int, *, every_logit: bool = False) -> int:
        """How many prompt tokens to read at once with `offset` cached.

        every_logit  the pass computes the logits of all of them
        """
        return chunk_tokens(self.args, offset, self.runtime, every_logit=every_logit)

    def plan(
        self, context: int, storage: KVStorage | None = None, most: int | None = None, *, every_logit: bool = False
    ) -> MemoryPlan:
        """The memory taken at `context` tokens of prompt and answer together.

        most         tokens of a prefill's chunk at most
        every_logit  the caller gets the logits of all tokens
        """
        return plan(
            self.args,
            context,
            storage=storage or self.storage,
            runtime=self.runtime,
            most=most,
            every_logit=every_logit,
        )

    def plan_within(self, context: int, room_bytes: int) -> MemoryPlan:
        """`plan` with chunks as small, and codes as narrow, as room_bytes require."""
        held = self.within(context, room_bytes)
        return held.plan(context, most=chunk_limit(lambda most: held.plan(context, most=most), room_bytes))

    def largest_context(self, room_bytes: int, most: int) -> int:
        """The largest context in 1 … most whose `plan_within` fits, in whole cache steps below `most`; 0 if none
        does."""
        return largest_context(lambda n: self.plan_within(n, room_bytes), room_bytes, most)

    def within(self, context: int, room_bytes: int) -> Placement:
        """This placement; with codes as they are stored if `context` tokens do not fit in room_bytes otherwise, and if
        that takes less: MLX unpacks such codes, a layer at a time."""
        if not self.held_wider:
            return self
        stored = self.as_stored()
        wide_bytes, stored_bytes = (one.plan(context, most=CHUNK_LIMITS[-1]).total_bytes for one in (self, stored))
        return stored if stored_bytes < wide_bytes > room_bytes else self

    # ── what may be allocated ───────────────────────────────────────────────────────────────────────────────────────

    def allowed_bytes(self) -> int:
        """What this process may hold in all, given what it holds already."""
        return self.machine.allowed_bytes()

    def for_loading(self, max_context: int | None = None) -> Placement:
        """Before loading: the placement in which weights and max_context tokens fit, by default a short context.

        Raises MemoryBudgetError if there is none.
        """
        context = max_context or min(STEP, self.args.max_position_embeddings)
        chosen = self.within(context, self.machine.room_bytes())
        if chosen is not self:
            self.machine.collect()
            chosen = self.within(context, self.machine.room_bytes())
        chosen._require(context, held=0)
        return chosen

    def check_call(
        self, n_tokens: int, reused_bytes: int, chunk: int | None = None, *, every_logit: bool = False
    ) -> int | None:
        """Before a call with the weights loaded: n_tokens of prompt and answer together.

        reused_bytes  of an earlier call's cache that this one takes over or replaces
        chunk         tokens of a prefill's chunk if the caller decides that
        every_logit   the call returns the logits of all tokens
        → how many tokens a chunk may have at most, so that it fits; None if chunks need not be cut down.
        Raises MemoryBudgetError if the smallest chunks are too large.
        """
        return self._require(n_tokens, held=self.weights_bytes + reused_bytes, chunk=chunk, every_logit=every_logit)

    def check_file(self, path: Path) -> None:
        """Before a saved cache is loaded. Raises MemoryBudgetError if it is larger than what is left."""
        size = path.stat().st_size
        if size > self.machine.room_bytes():
            self.machine.collect()
        if size > self.machine.room_bytes():
            raise MemoryBudgetError(
                f"{path} holds {size / 1e9:.2f} GB of keys and values, with the weights that is more than the "
                f"{self.allowed_bytes() / 1e9:.2f} GB that may be taken",
                hint="leave --cache out, or read the prompt again with fewer --kv-bits",
            )

    def _require(self, n_tokens: int, *, held: int, chunk: int | None = None, every_logit: bool = False) -> int | None:
        try:
            return self._fits(n_tokens, held, chunk, every_logit)
        except MemoryBudgetError:
            self.machine.collect()
        return self._fits(n_tokens, held, chunk, every_logit)

    def _fits(self, n_tokens: int, held: int, chunk: int | None, every_logit: bool) -> int | None:
        active, memory = self.machine.active_bytes(), self.machine.memory()
        held = min(held, active)

        def planned(n: int, storage: KVStorage) -> MemoryPlan:
            return self.plan(n, storage, chunk or CHUNK_LIMITS[-1], every_logit=every_logit)

        require(planned, self.storage, n_tokens, memory, active_bytes=active, held_bytes=held)
        room = memory.allowed_bytes(active) - (active - held)
        return chunk or chunk_limit(lambda most: self.plan(n_tokens, most=most, every_logit=every_logit), room)


def _dispatch() -> ModuleType | None:
    """`kernels.dispatch`; None if MLX is absent."""
    try:
        from mlx_codellama.kernels import dispatch
    except ImportError:
        return None
    return dispatch
