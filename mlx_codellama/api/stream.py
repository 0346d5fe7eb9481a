"""One request on its way: pieces of text as they become certain, then the Completion."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_codellama.api.budget import system_errors
from mlx_codellama.api.results import Completion, Stats, TokenLogprob
from mlx_codellama.api.stopping import Continuation
from mlx_codellama.cache import Sequence as CachedSequence
from mlx_codellama.cache import make_sequence
from mlx_codellama.errors import CacheError, NotSupported
from mlx_codellama.generate import FinishReason, Step, generate
from mlx_codellama.kernels.dispatch import check_process
from mlx_codellama.lookup import Costs, Lookup
from mlx_codellama.model import Model
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.snapshot import load_cache, save_cache
from mlx_codellama.storage import KVStorage


@dataclass(frozen=True)
class Request:
    """Everything that determines one generation. context: tokens, prompt and generated together."""

    prompt: list[int]
    max_tokens: int
    context: int
    params: SamplingParams
    stop_ids: frozenset[int]
    prefill_chunk: int | None = None
    chunk_limit: int | None = None
    logprobs: int | None = None
    lookup: bool = False
    should_stop: Callable[[], bool] | None = None
    on_prefill: Callable[[int, int], None] | None = None


class Turn:
    """A lock for `with`. Whoever holds it already is told so, where a plain lock would wait for itself for ever.

    waits  False: another thread is told as well, and does not wait
    """

    def __init__(self, inside: str, beside: str, hint: str, *, waits: bool = True) -> None:
        self._inside, self._beside, self._hint, self._waits = inside, beside, hint, waits
        self._lock, self._owner = threading.Lock(), 0

    @property
    def held_here(self) -> bool:
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        """Raises NotSupported; BackendError as `check_process` does."""
        check_process()
        if self.held_here:
            raise NotSupported(self._inside, hint=self._hint)
        self.acquire(wait=self._waits)

    def acquire(self, *, wait: bool) -> None:
        if not self._lock.acquire(blocking=wait):
            raise NotSupported(self._beside, hint=self._hint)
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()


class Slot:
    """The cache that a finished call leaves for the next one, with the ids it holds.

    A running call takes the cache out, so calls that overlap never share one: the later gets a fresh cache. `lock` is
    held for one step at a time, which lets streams take turns and never lets an abandoned one block the others. `take`
    is called with the lock held; `put` needs none, because the garbage collector may end a stream at any moment.
    """

    def __init__(self, model: Model, storage: KVStorage) -> None:
        self.lock = Turn(
            "a call on this model began inside a callback (on_prefill, cancel) of another call on it",
            "",
            "let the first call end, for example by cancel; then begin the next",
        )
        self.costs = Costs()  # of this model's passes, as far as calls with lookup have measured them
        self._model, self._storage = model, storage
        self._idle: CachedSequence | None = None

    def take(self, prompt: Sequence[int], max_tokens: int = 0) -> CachedSequence:
        """A cache that holds the longest usable beginning of prompt: what is shared, but never all of it.

        Once a window has evicted tokens it can rewind only a few; beyond that we start fresh.
        """
        cache, self._idle = self._idle, None
        if cache is None:
            return make_sequence(self._model.args, self._storage)
        surplus = cache.offset - min(common_prefix(cache.ids, prompt), len(prompt) - 1)
        if surplus > cache.trimmable or self._outgrown(cache, len(prompt) + max_tokens):
            return make_sequence(self._model.args, self._storage)
        cache.trim(surplus)
        return cache

    def _outgrown(self, cache: CachedSequence, n_tokens: int) -> bool:
        """Whether dynamic rotary scaling gives a text of n_tokens other angles than those in the cache."""
        args = self._model.args
        return args.scaling_over(cache.horizon) != args.scaling_over(n_tokens)

    def put(self, cache: CachedSequence, ids: Sequence[int]) -> None:
        """Leave a cache behind. ids are all tokens of the call; the cache may hold fewer, or drafts after them."""
        cache.trim(max(0, cache.offset - len(ids)))
        cache.ids = list(ids[: cache.offset])
        self._idle = cache

    @property
    def idle_bytes(self) -> int:
        """Bytes of the cache that was left, which the next call takes over; 0 where it copies them first."""
        idle = self._idle
        return 0 if idle is None or idle.copies_on_write else idle.nbytes

    @property
    def idle_tokens(self) -> int:
        return self._idle.offset if self._idle else 0

    def clear(self) -> None:
        self._idle = None

    def share(self) -> Slot:
        """A slot with a cache of its own over the same bytes. Called with the lock held."""
        other = Slot(self._model, self._storage)
        other.costs = self.costs
        if self._idle is not None:
            other._idle = self._idle.share()
        return other

    def save(self, path: Path) -> int:
        """Write the cache that the last call left; → its tokens. Called with the lock held. Raises CacheError."""
        if self._idle is None:
            raise CacheError("there is no cache to save", hint="read a prompt first; max_tokens=0 only reads")
        save_cache(path, self._model, self._storage, self._idle)
        return self._idle.offset

    def load(self, path: Path) -> int:
        """Take the cache of a file in place of the last call's; → its tokens. Called with the lock held."""
        self._idle = load_cache(path, self._model, self._storage)
        return self._idle.offset


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


class TextStream(Iterator[str]):
    """Pieces of text, never empty, that join to `result.text`. Close it, or leave its `with`, to stop early.

    Work begins with the first piece asked for. `result` is the Completion once the stream has ended or was closed; a
    stream closed early reports "cancelled". A stream may move between threads, but one thread at a time may read it:
    a second one, or a callback of the stream itself, gets NotSupported. Any thread may close it.
    """

    def __init__(self, model: Model, slot: Slot, request: Request, text: Continuation) -> None:
        # The generator knows the run alone, not the stream: without a cycle, a stream that is dropped ends at once.
        self._run = _Run(model, slot, request, text)
        self._pieces = self._run.pieces()
        self._reading = Turn(
            "a callback (on_prefill, cancel) uses the stream that called it",
            "two threads read one stream",
            "to end a stream early from elsewhere, pass cancel= or close() it in another thread",
            waits=False,
        )

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        with self._reading:
            return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; harmless after the end. Waits for the step of another thread that is reading just now.

        Raises NotSupported inside a callback of the stream itself.
        """
        if not self._reading.held_here:
            self._run.closing = True
            self._reading.acquire(wait=True)
            try:
                self._pieces.close()
                self._run.settle()
            finally:
                self._reading.__exit__()
        else:
            self._reading.__enter__()

    @property
    def result(self) -> Completion:
        """Raises RuntimeError while the stream is still open."""
        if self._run.result is None:
            raise RuntimeError("the stream has not ended: read it to its end or close() it, then ask for the result")
        return self._run.result

    def drain(self) -> Completion:
        """Read to the end."""
        for _ in self:
            pass
        return self.result


class _Run:
    """What a stream does and has found so far."""

    def __init__(self, model: Model, slot: Slot, request: Request, text: Continuation) -> None:
        self._model, self._slot, self._request, self._text = model, slot, request, text
        self._ids: list[int] = []  # every token the model produced, a stop id included
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason = "cancelled"
        self._cached = self._dropped = 0
        self._lookup = Lookup(costs=slot.costs) if request.lookup else None
        self._begin = self._first = self._last = 0.0
        self._peak_bytes = 0
        self.result: Completion | None = None
        self.closing = False  # another thread waits for the end

    def pieces(self) -> Generator[str, None, None]:
        request, text = self._request, self._text
        self._begin = time.perf_counter()
        with self._slot.lock, system_errors():
            mx.reset_peak_memory()
            cache = self._slot.take(request.prompt, request.max_tokens)
            self._cached = cache.offset
            steps = generate(
                self._model,
                request.prompt,
                params=request.params,
                max_tokens=request.max_tokens,
                stop_ids=request.stop_ids,
                cache=cache,
                max_context=request.context,
                prefill_chunk=request.prefill_chunk,
                chunk_limit=request.chunk_limit,
                logprobs=request.logprobs,
                lookup=self._lookup,
                should_stop=self._should_stop,
                on_prefill=request.on_prefill,
            )
        sound = False  # whether the cache holds what the ids say
        try:
            while True:
                sound = False
                with self._slot.lock, system_errors():
                    step = next(steps)
                    self._peak_bytes = max(self._peak_bytes, mx.get_peak_memory())
                    self._dropped = cache.dropped
                piece = self._take(step)
                sound = True
                if step.finish_reason is not None or text.stop is not None:
                    break
                if piece:
                    yield piece
        finally:
            if sound:
                self._slot.put(cache, [*request.prompt, *self._ids])
        piece += text.finish()
        self._finish = "stop" if text.stop is not None else step.finish_reason or "length"
        self.settle()
        if piece:
            yield piece

    def _take(self, step: Step) -> str:
        """Account for one step; → the text that became certain."""
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

    def _should_stop(self) -> bool:
        return self.closing or (self._request.should_stop is not None and self._request.should_stop())

    def settle(self) -> None:
        """Sum up, once."""
        if self.result is not None:
            return
        request, text = self._request, self._text
        n = text.n_ids
        fresh = len(request.prompt) - self._cached
        ttft, decode = self._first - self._begin, self._last - self._first
        stats = Stats(
            cached_tokens=self._cached,
            prompt_tokens=len(request.prompt),
            generated_tokens=len(self._ids),
            ttft_s=ttft,
            prompt_tok_s=fresh / ttft if ttft > 0 and (self._ids or self._finish != "cancelled") else 0.0,
            decode_tok_s=(len(self._ids) - 1) / decode if decode > 0 and len(self._ids) > 1 else 0.0,
            peak_bytes=self._peak_bytes,
            drafted_tokens=self._lookup.drafted if self._lookup else 0,
            accepted_tokens=self._lookup.accepted if self._lookup else 0,
            dropped_tokens=self._dropped,
            seed=None if request.params.greedy else request.params.seed,
        )
        logprobs = None if request.logprobs is None else self._logprobs[:n]
        self.result = Completion(text.text, self._ids[:n], self._finish, stats, logprobs, text.stop)
