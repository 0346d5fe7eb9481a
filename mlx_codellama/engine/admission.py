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

    def __init__(self, memory: Memory | None, prefixes: PrefixCache, *, shares: bool = True) -> None:
        """shares  False for windows, which whoever goes on with a shared one copies"""
        self._memory, self._prefixes, self._shares = memory, prefixes, shares

    def check(self, n_tokens: int, runs: list[Run], chunk: int | None) -> None:
        """Raise MemoryBudgetError for a request that would not fit alone."""
        if self._memory is not None:
            self._memory.check_call(n_tokens, sum(self.storages(runs).values()), chunk)

    def growth(self, n_tokens: int, n_shared: int) -> int:
        """Bytes of keys and values of n_tokens, without those of the first n_shared, which others hold as well; 0 where
        nothing is counted."""
        return 0 if self._memory is None else self._kv_bytes(n_tokens) - self._kv_bytes(n_shared)

    def promise(self, run: Run, n_foreign: int | None = None) -> None:
        """Set what is reserved for a run: all but the tokens of its prompt whose storage is counted with others.

        n_foreign  their number, where it is not known from the prompt: before reading begins
        """
        prompt, n_tokens = run.prompt, run.request.n_tokens
        if run.reads:
            run.foreign = prompt.foreign
            run.promised = self.growth(n_tokens, prompt.n_foreign if n_foreign is None else n_foreign)
        else:
            run.promised = self.growth(n_tokens, len(prompt.ids) if self._shares else 0)

    def reserve(self, run: Run, runs: list[Run], chunk: int | None) -> bool:
        """Reserve what a run may grow to, beside the runs that were admitted. → False where it has to wait for them.

        Sets how long the chunks of its prompt may be, if `chunk` does not. Raises MemoryBudgetError where it does not
        fit even alone.
        """
        if self._memory is None:
            return True
        prompt, n_tokens = run.prompt, run.request.n_tokens
        run.reads = not prompt.is_read and not any(other.reads and other.prompt is prompt for other in runs)
        while True:
            match, n_found = self._prefixes.match(prompt.ids, prompt.n_tokens)
            n_found = self._prefixes.free(match, min(n_found, len(prompt.ids) - 1))
            self.promise(run, n_found if prompt.sequence is None else None)
            held = mx.get_active_memory() + sum(max(0, one.promised - one.own_bytes) for one in (run, *runs))
            for most in [chunk] if chunk else CHUNK_LIMITS:
                plan = self._memory.plan(n_tokens, None, most)
                if held + plan.activations_bytes + plan.logits_bytes <= self._memory.allowed_bytes():
                    prompt.chunk_limit = most
                    return True
            if self._prefixes.drop_oldest(but=match):
                mx.clear_cache()
            elif runs:
                return False
            else:
                prompt.chunk_limit = self._memory.check_call(n_tokens, run.own_bytes, chunk)
                return True

    def _kv_bytes(self, n_tokens: int) -> int:
        assert self._memory is not None
        return self._memory.plan(n_tokens).kv_bytes if n_tokens else 0

    def storages(self, runs: list[Run]) -> dict[object, int]:
        """The bytes of each piece of storage that these runs, and idle sequences, hold."""
        sequences = [*self._prefixes.idle, *(s for run in list(runs) if (s := run.held) is not None)]
        return {key: n for sequence in sequences for key, n in sequence.storages.items()}
