"""Ctrl-C at every line: what holds sequences and the model stays whole. A trace function raises it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest

from mlx_codellama.engine import Exclusive
from mlx_codellama.engine.prefix import PrefixCache


@dataclass(eq=False)
class Stored:
    """Stands in for a sequence: ids, and storage by its key."""

    storages: dict[object, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    horizon: int = 0

    @property
    def offset(self) -> int:
        return len(self.ids)


def interrupted(work: Callable[[], object], module: str, at: int) -> bool:
    """Do it, with Ctrl-C before the line that is run as number `at` in a module. → whether it came."""
    n = 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal n
        if event == "line":
            n += 1
            if n == at:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename == module else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("drops", [False, True])
def test_sequences_are_found_and_dropped_after_an_interrupt_at_any_line(drops: bool) -> None:
    module, at = inspect.getfile(PrefixCache), 0
    while True:
        at += 1
        prefixes = PrefixCache(10**6)
        first, second = Stored({1: 60}, [1, 2, 3, 4]), Stored({2: 60}, [1, 2, 9, 9, 9])
        prefixes.leave(first, [])  # type: ignore[arg-type]
        if drops:
            prefixes.leave(second, [])  # type: ignore[arg-type]
            came = interrupted(lambda: prefixes.drop(second), module, at)  # type: ignore[arg-type]  # noqa: B023
        else:
            came = interrupted(lambda: prefixes.leave(second, []), module, at)  # type: ignore[arg-type]  # noqa: B023
        assert prefixes.match([1, 2, 3, 4], 9) == (first, 4)
        found, n = prefixes.match([1, 2, 9, 9, 9], 9)
        assert (found, n) in [(None, 0), (second, 5)]  # the two tokens in common with `first` are not worth it
        while prefixes.drop_oldest(but=None):
            pass
        for tree in prefixes._trees.values():
            assert not len(tree)
            assert not tree._root.children
            assert not tree._root.through
        if not came:
            break
    assert at > 15


@pytest.mark.parametrize("inner", [True, False])
def test_a_lock_is_free_if_ctrl_c_comes_as_it_is_taken(inner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Exclusive("held here", "held elsewhere", "")
    holder, name = (lock, "_lock") if inner else (lock, "acquire")
    original = getattr(holder, name)

    class Interrupted:
        """Python asks for signals after each call: when the lock is taken and nobody knows it yet."""

        release = original.release if inner else None

        def acquire(self, **options: bool) -> bool:
            original.acquire(**options)
            raise KeyboardInterrupt

        def __call__(self, *, wait: bool) -> bool:
            original(wait=wait)
            raise KeyboardInterrupt

    monkeypatch.setattr(holder, name, Interrupted())
    with pytest.raises(KeyboardInterrupt), lock:
        pass
    monkeypatch.undo()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(wait=False)))
    thread.start()
    thread.join()
    assert taken == [True]


def test_the_collector_takes_no_lock_that_its_thread_holds() -> None:
    lock = Exclusive("held here", "held elsewhere", "")
    with lock:
        assert not lock.acquire(wait=False)
    assert lock.acquire(wait=False)
