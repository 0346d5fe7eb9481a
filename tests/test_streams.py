"""Streams that are left, shared, or used from within: memory comes back, and nothing waits for itself."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlx_codellama import CodeLlama, load
from mlx_codellama.errors import CodeLlamaError, MemoryBudgetError, NotSupported

PROMPT = "def area(width, height):\n"


@pytest.fixture
def model() -> CodeLlama:
    return load(max_context=512)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Python's cyclic collector stays out of it: what is freed is freed by the last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_streams_that_are_left_in_the_middle_give_their_caches_back(model: CodeLlama, uncollected: None) -> None:
    model.complete(PROMPT, max_tokens=4)  # makes what stays with the model, such as its table of angles
    model.forget()
    before = mx.get_active_memory()
    for i in range(6):
        for _ in model.stream_complete(f"# {i}\n{PROMPT}", max_tokens=64):
            break
    mx.synchronize()  # a pass was on its way
    one = mx.get_active_memory() - before  # the cache that the last of them leaves for the next call
    model.forget()
    assert mx.get_active_memory() - before < 100_000
    assert one < 3_000_000


def test_a_model_that_is_dropped_frees_everything(uncollected: None) -> None:
    before = mx.get_active_memory()
    model = load(max_context=512)
    stream = model.stream_complete(PROMPT, max_tokens=8)
    next(stream)
    assert mx.get_active_memory() - before > 3_000_000
    del model, stream
    mx.synchronize()
    assert mx.get_active_memory() - before < 100_000


def test_memory_in_cycles_is_collected_before_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "30MB")
    model = load(max_context=512)
    gc.disable()
    try:
        held: Any = [mx.zeros(28_000_000, mx.int8)]
        mx.eval(held[0])
        with pytest.raises(MemoryBudgetError, match="held by others"):
            model.complete(PROMPT, max_tokens=4)
        held.append(held)
        del held
        assert model.complete(PROMPT, max_tokens=4).ids
    finally:
        gc.enable()


def test_dropping_a_stream_ends_it_and_the_next_call_goes_on_from_its_cache(model: CodeLlama) -> None:
    stream = model.stream_complete(PROMPT, max_tokens=64)
    next(stream)
    del stream
    assert model.cached_tokens > 5


INSIDE: dict[str, Callable[[CodeLlama], object]] = {
    "complete": lambda m: m.complete("x", max_tokens=1),
    "logits": lambda m: m.logits([1, 2]),
    "save_cache": lambda m: m.save_cache("nowhere"),
    "load_cache": lambda m: m.load_cache("nowhere"),
    "fork": lambda m: m.fork(),
}


@pytest.mark.parametrize("call", INSIDE)
@pytest.mark.parametrize("where", ["on_prefill", "cancel"])
def test_a_call_from_inside_a_callback_is_an_error_and_the_model_goes_on(
    model: CodeLlama, call: str, where: str
) -> None:
    def callback(*_: int) -> bool:
        INSIDE[call](model)
        return False

    options: Any = {where: callback}
    with pytest.raises(NotSupported, match="inside a callback") as e:
        model.complete(PROMPT, max_tokens=4, **options)
    assert e.value.hint
    assert model.complete(PROMPT, max_tokens=4).ids


def test_a_callback_may_neither_read_nor_close_its_own_stream(model: CodeLlama) -> None:
    told: list[str] = []

    def callback(*_: int) -> None:
        for use in (stream.close, lambda: next(stream)):
            with pytest.raises(NotSupported, match="callback") as e:
                use()
            told.append(str(e.value))

    stream = model.stream_complete(PROMPT, max_tokens=4, on_prefill=callback)
    assert stream.drain().ids
    assert len(told) == 2


def paused(model: CodeLlama) -> tuple[Any, threading.Event, threading.Event]:
    """A stream, an Event for when it is in the middle of a step, and one that lets it go on."""
    begun, go = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        begun.set()
        assert go.wait(30)

    return model.stream_complete(PROMPT, max_tokens=64, on_prefill=wait), begun, go


def test_two_threads_on_one_stream_are_told_so(model: CodeLlama) -> None:
    stream, begun, go = paused(model)
    first = threading.Thread(target=stream.drain)
    first.start()
    assert begun.wait(30)
    with pytest.raises(NotSupported, match="two threads") as e:
        next(stream)
    assert "cancel" in e.value.hint
    go.set()
    first.join(30)
    assert stream.result.ids


def test_another_thread_may_close_a_stream(model: CodeLlama) -> None:
    stream, begun, go = paused(model)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert begun.wait(30)
    closer = threading.Thread(target=stream.close)
    closer.start()
    go.set()
    closer.join(30)
    reader.join(30)
    assert not closer.is_alive()
    assert not reader.is_alive()
    assert stream.result.finish_reason == "cancelled"
    assert model.complete(PROMPT, max_tokens=4).ids


def test_memory_that_runs_out_in_the_middle_is_an_error_of_ours(
    model: CodeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError("mlx_codellama_cpu: out of memory"), RuntimeError("std::bad_alloc")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(model.model), "hidden", fail)
            for call in (lambda: model.complete(PROMPT, max_tokens=4), lambda: model.logits([1, 2])):
                with pytest.raises(MemoryBudgetError, match="out of memory"):
                    call()
        assert model.complete(PROMPT, max_tokens=4).ids


FORK = """
import os, sys, signal
import mlx_codellama
from mlx_codellama.errors import BackendError
def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(50)
        try:
            work()
        except BackendError as error:
            os._exit(3 if "fork" in str(error) and "spawn" in error.hint else 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_at_its_first_call_and_does_not_hang() -> None:
    code = """
m = mlx_codellama.load()
m.complete("x", max_tokens=2)
print(child(lambda: m.complete("y", max_tokens=2)), child(lambda: m.logits([1])), child(mlx_codellama.load))
print(len(m.complete("x", max_tokens=2).ids))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK + code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["3", "3", "3", "2"], done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_before_the_first_model_is_harmless() -> None:
    code = 'print(child(lambda: mlx_codellama.load().complete("y", max_tokens=2)))'
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK + code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["0"], done.stderr


def test_processes_that_are_spawned_each_load_a_model(tmp_path: Any) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        """
import multiprocessing
import mlx_codellama

def work(text):
    return len(mlx_codellama.load().complete(text, max_tokens=2).ids)

if __name__ == "__main__":
    print(work("a"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, ["b"])[0])
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "2"], done.stderr


def test_an_id_outside_the_vocabulary_gives_nan_and_no_crash(model: CodeLlama) -> None:
    size = model.args.vocab_size
    for wrong in (size, 2**30, -1, -(2**31)):
        logits = model.model(mx.array([[1, wrong, 2]]))
        assert mx.all(mx.isnan(logits[0, 1:])).item()
    with pytest.raises(CodeLlamaError, match="outside the vocabulary"):
        model.complete([1, size], max_tokens=1)
