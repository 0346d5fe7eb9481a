"""Whether requests may begin: what each may grow to is reserved first, so that together they cannot outgrow memory."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_codellama.engine.prefix import PrefixCache
from mlx_codellama.engine.run import Run
from mlx_codellama.memory import CHUNK_LIMITS, MemoryPlan
from mlx_codellama.storage import KVStorage


class Memory(Protocol):
    """What bounds the engine: a `Placement`."""

    def chunk_tokens(self, offset: int) -> int:
        """How many prompt tokens to read at once with `offset` cached."""
        ...

    def plan(self, context: int, storage: KVStorage | None = None, most: int | None = None) -> MemoryPlan: ...

    def allowed_bytes(self) -> int:
        """What this process may hold in all."""
        ...

    def check_call(self, n_tokens: int, reused_bytes: int, chunk: int | None = None) -> int | None:
        """Raise MemoryBudgetError where n_tokens do not fit although reused_bytes are given up."""
        ...


class Admission:
    """Reservations of keys and values. Idle sequences are given up where that lets a request in."""

    def __init__(self, memory: Memory | None, prefixes: PrefixCache) -> None:
        self._memory, self._prefixes = memory, prefixes

    def check(self, n_tokens: int, runs: list[Run], chunk: int | None) -> None:
        """Raise MemoryBudgetError for a request that would not fit alone."""
        if self._memory is not None:
            self._memory.check_call(n_tokens, sum(self.storages(runs).values()), chunk)

    def growth(self, n_tokens: int, n_shared: int) -> int:
        """Bytes of keys and values of n_tokens, without those of the first n_shared; 0 where nothing is counted."""
        return 0 if self._memory is None else self._kv_bytes(n_tokens) - self._kv_bytes(n_shared)

    def reserve(self, run: Run, runs: list[Run], chunk: int | None) -> bool:
        """Reserve what a run may grow to, beside the runs that were admitted. → False where it has to wait for them.

        Sets how long the chunks of its prompt may be, if `chunk` does not. Raises MemoryBudgetError where it does not
        fit even alone.
        """
        if self._memory is None:
            return True
        prompt, n_tokens = run.prompt, run.request.n_tokens
        while True:
            match, n_shared = self._prefixes.match(prompt.ids, n_tokens)
            if prompt.is_read or any(other.prompt is prompt for other in runs):
                n_shared = len(prompt.ids)  # with the other samples
            promised = self.growth(n_tokens, max(n_shared, prompt.n_read))
            held = mx.get_active_memory() + promised + sum(max(0, other.promised - other.own_bytes) for other in runs)
            for most in [chunk] if chunk else CHUNK_LIMITS:
                plan = self._memory.plan(n_tokens, None, most)
                if held + plan.activations_bytes + plan.logits_bytes <= self._memory.allowed_bytes():
                    run.promised, prompt.chunk_limit = promised, most
                    return True
            if self._prefixes.drop_oldest(but=match):
                mx.clear_cache()
            elif runs:
                return False
            else:
                prompt.chunk_limit = self._memory.check_call(n_tokens, 0, chunk)
                run.promised = promised
                return True

    def _kv_bytes(self, n_tokens: int) -> int:
        assert self._memory is not None
        return self._memory.plan(n_tokens).kv_bytes if n_tokens else 0

    def storages(self, runs: list[Run]) -> dict[object, int]:
        """The bytes of each piece of storage that these runs, and idle sequences, hold."""
        sequences = [*self._prefixes.idle, *(s for run in list(runs) if (s := run.held) is not None)]
        return {key: n for sequence in sequences for key, n in sequence.storages.items()}
