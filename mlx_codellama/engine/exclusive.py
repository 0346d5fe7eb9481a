"""A lock that answers, where a plain one would wait for itself for ever."""

from __future__ import annotations

import contextlib
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
        self._lock, self._owner = threading.RLock(), 0  # whose release tells whether this thread had it

    @property
    def is_held_here(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        """Raises NotSupported; BackendError as `check_process` does."""
        check_process()
        if self.is_held_here:
            raise NotSupported(self._inside, hint=self._hint)
        try:
            if self.acquire(wait=self._waits):
                return
        except BaseException:  # Ctrl-C, as it returns
            if self._owner == threading.get_ident():
                self.__exit__()
            raise
        raise NotSupported(self._beside, hint=self._hint)

    def acquire(self, *, wait: bool) -> bool:
        """Without any check: the garbage collector may call it. → whether this thread holds it now."""
        if self.is_held_here:
            return False
        try:
            if not self._lock.acquire(blocking=wait):
                return False
            self._owner = threading.get_ident()
            return True
        except BaseException:  # Ctrl-C, before or after it was acquired
            self._owner = 0 if self.is_held_here else self._owner
            with contextlib.suppress(RuntimeError):
                self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._owner = 0
        finally:
            self._lock.release()
