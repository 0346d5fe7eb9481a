"""What a caller holds of a request: its steps as they come."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

from mlx_codellama.engine.request import FinishReason, Step
from mlx_codellama.engine.run import Run


class Owner(Protocol):
    """The engine, as a generation knows it."""

    def fetch(self, run: Run) -> Step | None: ...
    def close(self, run: Run, reason: FinishReason | None = None) -> None: ...
    def abandon(self, run: Run) -> None: ...


class Generation(Iterator[Step]):
    """The steps of one request. Close it, or leave its `with`, to end early; so does dropping the last reference.

    Once it has ended, it holds on to no model.
    """

    def __init__(self, engine: Owner, run: Run) -> None:
        self._engine: Owner | None = engine
        self._run = run
        self._finalizer = weakref.finalize(self, engine.abandon, run)
        self._finalizer.atexit = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Step:
        engine, run = self._engine, self._run
        if engine is None:
            raise StopIteration
        if run.steps and run.n_fetched and run.asks_to_stop():
            engine.close(run, "cancelled")
        try:
            step = engine.fetch(run)
        finally:
            if run.ended and not run.steps and run.error is None:
                self._release()
        if step is None:
            raise StopIteration
        return step

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End here; harmless after the end. What was generated and not fetched is forgotten."""
        if (engine := self._engine) is not None:
            engine.close(self._run)
            self._release()

    def _release(self) -> None:
        self._finalizer.detach()
        self._engine = None

    @property
    def is_ready(self) -> bool:
        """Whether the next step, an error or the end is there without waiting."""
        return self._run.is_ready

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that an earlier request had read."""
        return self._run.prompt.cached

    def cancel(self) -> None:
        """Ask to end with "cancelled" at the next step, from any thread."""
        self._run.cancelled = True

    @property
    def dropped_tokens(self) -> int:
        """Tokens that a window no longer sees."""
        return self._run.dropped
