"""Requests on their way: pieces of text as they become certain, then the Completion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.api.results import Completion, Stats, TokenLogprob
from mlx_codellama.api.stopping import Continuation
from mlx_codellama.engine import Engine, Exclusive, FinishReason, Generation, Request, Step, turns


class TextStream(Iterator[str]):
    """Pieces of text, never empty, that join to `result.text`. Close it, or leave its `with`, to stop early.

    Work begins with the first piece asked for. `result` is the Completion once the stream has ended or was closed; a
    stream closed early reports "cancelled". A stream may move between threads, but one thread at a time may read it:
    a second one, or a callback of the stream itself, gets NotSupported. Any thread may close it.
    """

    def __init__(self, generation: Generation, request: Request, text: Continuation) -> None:
        self._generation, self._request, self._text = generation, request, text
        self._reading = Exclusive(
            "a callback (on_prefill, cancel) uses the stream that called it",
            "two threads read one stream",
            "to end a stream early from elsewhere, pass cancel= or close() it in another thread",
            waits=False,
        )
        self._ids: list[int] = []  # every token the model produced, a stop id included
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason = "cancelled"
        self._begin = self._first = self._last = 0.0
        self._peak_bytes = 0
        self._result: Completion | None = None

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        with self._reading:
            return self._next()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; harmless after the end. Waits for the step of another thread that is reading just now.

        Raises NotSupported inside a callback of the stream itself.
        """
        if self._reading.is_held_here:
            self._reading.__enter__()  # which says so
        self._generation.cancel()
        self._reading.acquire(wait=True)
        try:
            self._generation.close()
            if self._result is None:
                self._settle()
        finally:
            self._reading.__exit__()

    @property
    def result(self) -> Completion:
        """Raises RuntimeError while the stream is still open."""
        if self._result is None:
            raise RuntimeError("the stream has not ended: read it to its end or close() it, then ask for the result")
        return self._result

    def drain(self) -> Completion:
        """Read to the end."""
        for _ in self:
            pass
        return self.result

    def _next(self) -> str:
        if not self._begin:
            self._begin = time.perf_counter()
            mx.reset_peak_memory()
        while self._result is None:
            step = next(self._generation, None)
            piece = self._feed(step)
            if piece:
                return piece
        raise StopIteration

    def _feed(self, step: Step | None) -> str:
        """Take in a step, or None for an end without one. → the text that became certain."""
        piece = "" if step is None else self._take(step)
        if step is None or step.finish_reason is not None or self._text.stop is not None:
            self._generation.close()
            piece += self._text.finish()
            if step is not None:
                self._finish = "stop" if self._text.stop is not None else step.finish_reason or "length"
            self._settle()
        return piece

    def _take(self, step: Step) -> str:
        """Account for one step; → the text that became certain."""
        self._peak_bytes = max(self._peak_bytes, mx.get_peak_memory())
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if step.id is None:
            return ""
        self._ids.append(step.id)
        if step.finish_reason == "stop":
            return ""
        if step.logprob is not None:
            self._logprobs.append(TokenLogprob(step.id, step.logprob, step.top))
        return self._text.add(step.id)

    def _settle(self) -> None:
        request, text, lookup, cached = self._request, self._text, self._request.lookup, self._generation.cached_tokens
        n = text.n_ids
        fresh = len(request.prompt) - cached
        ttft, decode = self._first - self._begin, self._last - self._first
        stats = Stats(
            cached_tokens=cached,
            prompt_tokens=len(request.prompt),
            generated_tokens=len(self._ids),
            ttft_s=ttft,
            prompt_tok_s=fresh / ttft if ttft > 0 and (self._ids or self._finish != "cancelled") else 0.0,
            decode_tok_s=(len(self._ids) - 1) / decode if decode > 0 and len(self._ids) > 1 else 0.0,
            peak_bytes=self._peak_bytes,
            drafted_tokens=lookup.drafted if lookup else 0,
            accepted_tokens=lookup.accepted if lookup else 0,
            dropped_tokens=self._generation.dropped_tokens,
            seed=None if request.params.greedy else request.params.seed,
        )
        logprobs = None if request.logprobs is None else self._logprobs[:n]
        self._result = Completion(text.text, self._ids[:n], self._finish, stats, logprobs, text.stop)


class Piece(NamedTuple):
    """Text of one sample: the number of its prompt, its number among the samples of that prompt, and the text."""

    prompt: int
    sample: int
    text: str


class ManyStreams(Iterator[Piece]):
    """Pieces of several samples as they come. Close it, or leave its `with`, to stop early."""

    def __init__(self, engine: Engine, streams: Sequence[Sequence[TextStream]]) -> None:
        """streams  of each prompt, its samples'"""
        self._streams, self._begun = streams, False
        self._places = [(i, j) for i, samples in enumerate(streams) for j in range(len(samples))]
        flat = [stream for samples in streams for stream in samples]
        self._steps = turns(engine, [stream._generation for stream in flat])

    def __iter__(self) -> ManyStreams:
        return self

    def __next__(self) -> Piece:
        if not self._begun:
            self._begun = True
            mx.reset_peak_memory()
            now = time.perf_counter()
            for samples in self._streams:
                for stream in samples:
                    stream._begin = stream._begin or now  # all of them: those that wait for a place do wait
        for at, step in self._steps:
            i, j = self._places[at]
            stream = self._streams[i][j]
            if stream._result is None and (text := stream._feed(step)):
                return Piece(i, j, text)
        raise StopIteration

    def __enter__(self) -> ManyStreams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; harmless after the end."""
        for samples in self._streams:
            for stream in samples:
                stream.close()

    @property
    def results(self) -> list[list[Completion]]:
        """Of each prompt, its samples' Completions. Raises RuntimeError while some are still open."""
        return [[stream.result for stream in samples] for samples in self._streams]

    def drain(self) -> list[list[Completion]]:
        """Read all of them to the end."""
        for _ in self:
            pass
        return self.results
