"""A lock that answers, where a plain one would wait for itself for ever."""

from __future__ import annotations

import threading

from mlx_codellama.errors import NotSupported
from mlx_codellama.kernels.dispatch import check_process


class Exclusive:
    """For `with`: one thread at a time. Whoever holds it already gets NotSupported.

    waits  False: another thread gets NotSupported too, and does not wait
    """

    def __init__(self, inside: str, beside: str, hint: str, *, waits: bool = True) -> None:
        """inside, beside: the sentence for a thread that holds it already, and for another one."""
        self._inside, self._beside, self._hint, self._waits = inside, beside, hint, waits
        self._lock, self._owner = threading.Lock(), 0

    @property
    def is_held_here(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        """Raises NotSupported; BackendError as `check_process` does."""
        check_process()
        if self.is_held_here:
            raise NotSupported(self._inside, hint=self._hint)
        if not self.acquire(wait=self._waits):
            raise NotSupported(self._beside, hint=self._hint)

    def acquire(self, *, wait: bool) -> bool:
        """Without any check: the garbage collector may call it. → whether this thread holds it now."""
        if not self._lock.acquire(blocking=wait):
            return False
        self._owner = threading.get_ident()
        return True

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()
