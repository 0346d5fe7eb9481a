"""One request on its way: pieces of text as they become certain, then the Completion."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_codellama.api.results import Completion, Stats, TokenLogprob
from mlx_codellama.api.stopping import Continuation
from mlx_codellama.cache import KVCache, make_cache
from mlx_codellama.errors import CacheError
from mlx_codellama.generate import FinishReason, Step, generate
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


class Slot:
    """The cache that a finished call leaves for the next one, with the ids it holds.

    A running call takes the cache out, so calls that overlap never share one: the later gets a fresh cache. `lock` is
    held for one step at a time, which lets streams take turns and never lets an abandoned one block the others. `take`
    is called with the lock held; `put` needs none, because the garbage collector may end a stream at any moment.
    """

    def __init__(self, model: Model, storage: KVStorage) -> None:
        self.lock = threading.Lock()
        self.costs = Costs()  # of this model's passes, as far as calls with lookup have measured them
        self._model, self._storage = model, storage
        self._idle: tuple[list[KVCache], list[int]] | None = None
        self._holders = weakref.WeakSet([self])  # of the idle cache's bytes: whoever goes on copies them

    def take(self, prompt: Sequence[int], max_tokens: int = 0) -> list[KVCache]:
        """A cache that holds the longest usable beginning of prompt: what is shared, but never all of it.

        A window that has dropped tokens goes back a few tokens at most: for more it is begun anew.
        """
        idle, self._idle = self._idle, None
        self._leave()
        if idle is None:
            return make_cache(self._model.args, self._storage)
        cache, held = idle
        shared = min(common_prefix(held, prompt), len(prompt) - 1)
        if any(layer.offset - shared > layer.trimmable for layer in cache) or self._outgrown(
            cache[0], len(prompt) + max_tokens
        ):
            return make_cache(self._model.args, self._storage)
        for layer in cache:
            layer.trim(layer.offset - shared)
        return cache

    def _outgrown(self, layer: KVCache, n_tokens: int) -> bool:
        """Whether dynamic rotary scaling gives a text of n_tokens other angles than those in the cache."""
        args = self._model.args
        return args.scaling_over(layer.horizon) != args.scaling_over(n_tokens)

    def put(self, cache: list[KVCache], ids: Sequence[int]) -> None:
        """Leave a cache behind. ids are all tokens of the call; the cache may hold fewer, or drafts after them."""
        for layer in cache:
            layer.trim(max(0, layer.offset - len(ids)))
        self._idle = cache, list(ids[: cache[0].offset])

    @property
    def idle_bytes(self) -> int:
        """Bytes of the cache that was left, which the next call takes over; 0 where it copies them, as a fork does."""
        idle = self._idle
        return sum(layer.nbytes for layer in idle[0]) if idle and len(self._holders) == 1 else 0

    def _leave(self) -> None:
        """No longer share bytes with a fork."""
        self._holders.discard(self)
        self._holders = weakref.WeakSet([self])

    @property
    def idle_tokens(self) -> int:
        idle = self._idle
        return len(idle[1]) if idle else 0

    def clear(self) -> None:
        self._idle = None
        self._leave()

    def share(self) -> Slot:
        """A slot with a cache of its own over the same bytes. Called with the lock held."""
        other = Slot(self._model, self._storage)
        other.costs = self.costs
        if self._idle is not None:
            cache, ids = self._idle
            other._idle = [layer.share() for layer in cache], list(ids)
            self._holders.add(other)
            other._holders = self._holders
        return other

    def save(self, path: Path) -> int:
        """Write the cache that the last call left; → its tokens. Called with the lock held. Raises CacheError."""
        if self._idle is None:
            raise CacheError("there is no cache to save", hint="read a prompt first; max_tokens=0 only reads")
        cache, ids = self._idle
        save_cache(path, self._model, self._storage, cache, ids)
        return len(ids)

    def load(self, path: Path) -> int:
        """Take the cache of a file in place of the last call's; → its tokens. Called with the lock held."""
        cache, ids = load_cache(path, self._model, self._storage)
        self.clear()
        self._idle = cache, ids
        return len(ids)


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
    stream closed early reports "cancelled". A stream may move between threads, but one thread at a time may use it.
    """

    def __init__(self, model: Model, slot: Slot, request: Request, text: Continuation) -> None:
        self._model, self._slot, self._request, self._text = model, slot, request, text
        self._ids: list[int] = []  # every token the model produced, a stop id included
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason = "cancelled"
        self._cached = self._dropped = 0
        self._lookup = Lookup(costs=slot.costs) if request.lookup else None
        self._begin = self._first = self._last = 0.0
        self._peak_bytes = 0
        self._result: Completion | None = None
        self._pieces = self._run()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; harmless after the end."""
        self._pieces.close()
        if self._result is None:
            self._settle()

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

    def _run(self) -> Generator[str, None, None]:
        request, text = self._request, self._text
        self._begin = time.perf_counter()
        with self._slot.lock:
            mx.reset_peak_memory()
            cache = self._slot.take(request.prompt, request.max_tokens)
            self._cached = cache[0].offset
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
                should_stop=request.should_stop,
                on_prefill=request.on_prefill,
            )
        sound = False  # whether the cache holds what the ids say
        try:
            while True:
                sound = False
                with self._slot.lock:
                    step = next(steps)
                    self._peak_bytes = max(self._peak_bytes, mx.get_peak_memory())
                    self._dropped = cache[0].dropped
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
        self._settle()
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

    def _settle(self) -> None:
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
        self._result = Completion(text.text, self._ids[:n], self._finish, stats, logprobs, text.stop)
