"""From prompt ids to generated ids, one step at a time. Text, stop strings and prefix reuse live in `api`.

Decoding looks one step ahead: the forward pass of the next token is queued before the present token is read, so the
device does not wait for Python. A step queued in vain (after a stop id) costs one step of device time and changes
nothing that anyone reads. With prompt lookup a pass may also check a draft of several tokens: see `lookup` and `_Pass`.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple, cast

import mlx.core as mx

from mlx_codellama.cache import Sequence as CachedSequence
from mlx_codellama.cache import make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import BackendError, ContextOverflowError, PromptError
from mlx_codellama.kernels.dispatch import backend, native
from mlx_codellama.lookup import Lookup
from mlx_codellama.model import Model
from mlx_codellama.sampling import Sampler, SamplerState, SamplingParams
from mlx_codellama.storage import KVStorage

FinishReason = Literal["stop", "length", "cancelled"]

PREFILL_BYTES = 512 * 2**20  # what the activations of one prefill chunk may take
LAUNCH_FLOP = 3e11  # of one kernel: a GPU's watchdog ends those that run for seconds; the slowest Macs do 1e12 a second
_TIDY_EVERY = 256  # decode steps between releases of MLX's buffer pool: attention's buffers change size at each step


@dataclass(frozen=True)
class Step:
    """One generated token, or (id None) an end that came without one.

    id             the token; the stop id itself where that ended the generation
    logprob        natural logarithm of its probability under the model, before penalty and temperature, if asked for
    top            the n most likely tokens and their logarithms, most likely first
    finish_reason  None while there is more to come; after "stop", "length" or "cancelled" nothing follows
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


class _Choice(NamedTuple):
    """A token still on the device, with what the host will ask about it."""

    token: mx.array  # int32 []
    finite: mx.array  # bool [], of all logits
    logprob: mx.array | None = None  # float32 []
    top_ids: mx.array | None = None  # uint32 [n]
    top_logprobs: mx.array | None = None  # float32 [n]

    def step(self, finish_reason: FinishReason | None) -> Step:
        logprob = None if self.logprob is None else cast(float, self.logprob.item())
        top: tuple[tuple[int, float], ...] = ()
        if self.top_ids is not None and self.top_logprobs is not None:
            ids, values = cast(list[int], self.top_ids.tolist()), cast(list[float], self.top_logprobs.tolist())
            top = tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
        return Step(cast(int, self.token.item()), logprob, top, finish_reason)


def generate(
    model: Model,
    ids: Sequence[int],
    *,
    params: SamplingParams | None = None,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    cache: CachedSequence | None = None,
    storage: KVStorage | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    chunk_limit: int | None = None,
    logprobs: int | None = None,
    lookup: Lookup | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generator[Step, None, None]:
    """Read the prompt in chunks, then yield one Step per token until a stop id, max_tokens or a cancellation.

    ids            the whole prompt; the first cache.offset of them are taken to be in the cache already
    params         how tokens are chosen; default greedy
    max_tokens     0 only reads the prompt (a warm-up)
    stop_ids       a token among these ends the generation; it is the last Step's id
    cache          extended in place: after each Step it holds the prompt and every token yielded so far, except that
                   the very last token may not have been read back (cache.offset says how far it goes). With
                   lookup it may be ahead of the Steps, by the tokens that the next ones will yield
    storage        how a cache made here keeps keys and values; default: all of them, in the activations' dtype
    max_context    tokens, prompt and generated together; default: what the model was trained to read
    prefill_chunk  tokens per forward pass over the prompt; default: what PREFILL_BYTES allow
    chunk_limit    of them at most, where prefill_chunk does not say how many
    logprobs       None for none, 0 for the chosen token's, n for the n most likely ones as well
    lookup         drafts tokens from the context and counts what came of it; None never drafts. The ids are the same
    should_stop    asked before each prefill chunk and each step; True ends with finish_reason "cancelled"
    on_prefill     called with (tokens of the prompt read, tokens of the prompt) after each chunk

    Raises, before anything is computed: PromptError for an empty prompt or ids outside the vocabulary,
    ContextOverflowError where prompt and max_tokens do not fit; and while running BackendError for logits with NaN or
    infinity.
    """
    args = model.args
    prompt = [operator.index(i) for i in ids]
    check_ids(prompt, args)
    check_context(len(prompt), max_tokens, max_context or args.max_position_embeddings)
    check_logprobs(logprobs, args)
    chunk = _chunks(args, prefill_chunk, chunk_limit)
    cache = make_sequence(args, storage) if cache is None else cache
    if cache.offset >= len(prompt):
        raise ValueError(f"{cache.offset} of {len(prompt)} prompt tokens are cached; at least one must be left")
    cache.horizon = cache.horizon or len(prompt) + max_tokens
    sampler = Sampler(params or SamplingParams(), prompt)
    prefill = _Prefill(model, prompt, cache, chunk, on_prefill)
    return _steps(prefill, sampler, max_tokens, frozenset(stop_ids), logprobs, lookup, should_stop or _never)


def _never() -> bool:
    return False


def _chunks(args: ModelArgs, chunk: int | None, most: int | None, *, logits: bool = False) -> Callable[[int], int]:
    """Tokens of the next chunk, given how many are cached. Raises PromptError where the caller's own is no size."""
    if chunk is not None:
        if chunk < 1:
            raise PromptError(f"prefill_chunk is {chunk}; expected at least 1 token")
        return lambda start: chunk
    return lambda start: min(most or 1024, chunk_tokens(args, start, logits=logits))


class _Prefill:
    """The prompt on its way into the cache."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        cache: CachedSequence,
        chunk: Callable[[int], int],
        on_chunk: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.prompt, self.cache = model, prompt, cache
        self._chunk, self._on_chunk = chunk, on_chunk

    def run(self, should_stop: Callable[[], bool]) -> mx.array | None:
        """Read what is not cached. → logits float32 [V] after the last token, or None where should_stop said so."""
        total, logits = len(self.prompt), None
        self.cache.reserve(total + 1)
        while (start := self.cache.offset) < total:
            if should_stop():
                return None
            end = min(total, start + self._chunk(start))
            x = self.model.hidden(mx.array([self.prompt[start:end]], mx.int32), [(self.cache, end - start)])
            if end < total:
                mx.eval(self.cache.arrays)
                mx.clear_cache()
            else:
                logits = self.model.head(x[:, -1:], prompt=True)[0, -1]
                mx.eval(logits, self.cache.arrays)
            self.cache.ids = self.prompt[:end]
            if self._on_chunk is not None:
                self._on_chunk(end, total)
        return logits


def _steps(
    prefill: _Prefill,
    sampler: Sampler,
    max_tokens: int,
    stop_ids: frozenset[int],
    logprobs: int | None,
    lookup: Lookup | None,
    should_stop: Callable[[], bool],
) -> Generator[Step, None, None]:
    logits = prefill.run(should_stop)
    if logits is None:
        yield Step(None, finish_reason="cancelled")
        return
    if max_tokens == 0:
        yield Step(None, finish_reason="length")
        return
    model, cache, n = prefill.model, prefill.cache, 0
    if lookup is not None:
        lookup.begin(prefill.prompt)
    read_at, away_s = 0.0, 0.0  # when the last token was read, and how long the caller was busy since
    passed = _Pass(logits[None], sampler, logprobs, [], cache)
    while True:
        if should_stop():
            yield Step(None, finish_reason="cancelled")
            return
        ahead = None
        if not passed.draft and n + 1 < max_tokens and (lookup is None or lookup.rows() == 1):
            next_id = passed.choices[0].token[None, None]
            ahead = _Pass(model(next_id, [(cache, 1)], prompt=False)[0], sampler, logprobs, [], cache)
        steps = passed.read(stop_ids, max_tokens - n, len(prefill.prompt) + n)
        if lookup is not None:
            now = time.perf_counter()
            if n:
                lookup.timed(len(passed.choices), now - max(passed.begun, read_at) - away_s)
            read_at, away_s = now, 0.0
            lookup.settle(len(passed.draft), [step.id for step in steps if step.id is not None])
        passed.forget(len(passed.choices) - len(steps), sampler, cache)
        for i, step in enumerate(steps):
            if i and should_stop():
                yield Step(None, finish_reason="cancelled")
                return
            left = time.perf_counter()
            yield step
            away_s += time.perf_counter() - left
            if step.finish_reason is not None:
                return
            n += 1
            if n % _TIDY_EVERY == 0:
                mx.clear_cache()
        if ahead is None:
            assert lookup is not None
            draft, away_s = lookup.draft(max_tokens - n - 1), 0.0
            ids = mx.array([[steps[-1].id, *draft]], mx.int32)
            ahead = _Pass(model(ids, [(cache, 1 + len(draft))], prompt=False)[0], sampler, logprobs, draft, cache)
        passed = ahead


class _Pass:
    """A forward pass over one known token and a draft, on its way: what is chosen after each of them.

    Row i of the logits is right if the draft was right up to there, so the sampler, with its random key and its recent
    tokens, goes through exactly the states it has when every token is read by itself. The first choice that differs
    from the draft is still a true one: it is what the sampler takes in that place. All after it is forgotten.
    """

    def __init__(
        self, logits: mx.array, sampler: Sampler, logprobs: int | None, draft: list[int], cache: CachedSequence
    ) -> None:
        """logits float32 [1 + len(draft), V]. Computing starts here, without waiting.

        Nothing is left lazy: MLX evaluates a graph only in the thread that built it, and a stream may change threads.
        """
        self.begun = time.perf_counter()
        self.draft = draft
        self.choices: list[_Choice] = []
        self._states: list[SamplerState] = []
        for i in range(len(draft) + 1):
            self.choices.append(_choose(logits[i], sampler, logprobs))
            self._states.append(sampler.state)
        arrays = [a for row in (*self.choices, *self._states) for a in row if a is not None]
        mx.async_eval(arrays, cache.arrays)  # type: ignore[no-untyped-call]

    def read(self, stop_ids: Collection[int], most: int, n_known: int) -> list[Step]:
        """Wait for it. → at least one Step and at most `most`: the draft as far as it was chosen, and one more.

        Raises BackendError for logits with NaN or infinity after n_known tokens; where they come later in the pass, it
        ends before them.
        """
        steps: list[Step] = []
        for choice, drafted in zip_longest(self.choices, self.draft):
            if not choice.finite.item():
                if steps:
                    break
                raise BackendError(
                    f"the model's logits after {n_known} tokens are not finite",
                    hint="float16 may overflow: try dtype='float32' or 'bfloat16'; else check the weights for NaN",
                )
            id, finish = choice.token.item(), cast("FinishReason | None", None)
            if id in stop_ids:
                finish = "stop"
            elif len(steps) + 1 == most:
                finish = "length"
            steps.append(choice.step(finish))
            if finish is not None or id != drafted:
                break
        return steps

    def forget(self, n_rows: int, sampler: Sampler, cache: CachedSequence) -> None:
        """Undo the last n_rows rows of this pass, which must be the last one that the sampler and the cache saw."""
        if n_rows:
            sampler.state = self._states[-1 - n_rows]
            cache.trim(n_rows)


def _choose(logits: mx.array, sampler: Sampler, logprobs: int | None) -> _Choice:
    """Choose a token and gather what was asked about it. logits float32 [V]; nothing is evaluated here."""
    token, finite = sampler(logits), mx.all(mx.isfinite(logits))
    if logprobs is None:
        return _Choice(token, finite)
    values = logits - mx.logsumexp(logits)
    if logprobs == 0:
        return _Choice(token, finite, values[token])
    top = mx.argpartition(-values, min(logprobs, values.size - 1))[:logprobs]
    return _Choice(token, finite, values[token], top, values[top])


def read_logits(
    model: Model,
    ids: Sequence[int],
    *,
    storage: KVStorage | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    chunk_limit: int | None = None,
) -> Iterator[mx.array]:
    """Teacher-forced logits of a sequence, chunk by chunk from a fresh cache of the given storage.

    ids [L] → arrays float32 [l, V] whose lengths sum to L; row i is the prediction after ids[i].
    prefill_chunk, chunk_limit  as in `generate`, whose errors it raises
    """
    args, cache = model.args, make_sequence(model.args, storage)
    prompt = [operator.index(i) for i in ids]
    check_ids(prompt, args)
    check_context(len(prompt), 0, max_context or args.max_position_embeddings)
    chunk = _chunks(args, prefill_chunk, chunk_limit, logits=True)
    cache.reserve(len(prompt))
    cache.horizon = len(prompt)
    while (start := cache.offset) < len(prompt):
        part = prompt[start : start + chunk(start)]
        out = model(mx.array([part], mx.int32), [(cache, len(part))]).squeeze(0)
        mx.eval(out, cache.arrays)
        yield out
        del out  # before the next chunk is computed
        mx.clear_cache()


def check_ids(ids: Sequence[int], args: ModelArgs) -> None:
    """Raises PromptError for an empty sequence or an id outside the vocabulary."""
    if not ids:
        raise PromptError("the prompt is empty", hint="an empty text still has one token, the beginning of sequence")
    low, high = min(ids), max(ids)
    if low < 0 or high >= args.vocab_size:
        raise PromptError(f"token id {low if low < 0 else high} is outside the vocabulary of {args.vocab_size}")


def check_logprobs(logprobs: int | None, args: ModelArgs) -> None:
    """Raises PromptError for a number of tokens that the vocabulary does not have."""
    if logprobs is not None and not 0 <= logprobs <= args.vocab_size:
        raise PromptError(
            f"logprobs is {logprobs}; expected 0 to {args.vocab_size}",
            hint="0 for the chosen token's alone; a model has no more tokens than its vocabulary",
        )


def check_context(n_prompt: int, max_tokens: int, context: int) -> None:
    """Raises ContextOverflowError where n_prompt + max_tokens exceeds context; PromptError for a negative count."""
    if max_tokens < 0:
        raise PromptError(f"max_tokens is {max_tokens}; expected 0 or more")
    if n_prompt + max_tokens <= context:
        return
    if n_prompt > context:
        raise ContextOverflowError(
            f"the prompt has {n_prompt} tokens, the context {context}",
            hint="shorten the prompt, or read beyond what the model was trained for (max_context=, --max-context)",
        )
    raise ContextOverflowError(
        f"{n_prompt} prompt tokens + max_tokens {max_tokens} = {n_prompt + max_tokens}, the context has {context}",
        hint=f"ask for at most {context - n_prompt} tokens, shorten the prompt, or extend the context (--max-context)",
    )


def chunk_tokens(args: ModelArgs, offset: int, *, budget_bytes: int = PREFILL_BYTES, logits: bool = False) -> int:
    """How many prompt tokens to read at once with `offset` cached, so that activations fit budget_bytes.

    Counted in float32: residual and projections of one layer and, on a CPU without our native kernels, attention's
    [H, L, T] scores, which MLX writes out. A multiple of 16, from 16 to 1024; at most 256 on a CPU, where a chunk takes
    seconds and a cancellation has to wait for its end. On a GPU no single kernel gets more than LAUNCH_FLOP to do:
    attention's share of a chunk grows with what is cached. `logits` counts [L, V] as well.
    """
    on_cpu = backend() == "cpu"
    heads, kv_heads, width = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    per_token = 4 * (4 * args.hidden_size + 3 * args.intermediate_size + 3 * (heads + 2 * kv_heads) * width)
    per_token += 4 * args.vocab_size if logits else 0
    per_pair = 2 * 4 * heads if on_cpu and native() is None else 0  # scores and their softmax
    # n · per_token + n · (offset + n) · per_pair ≤ budget
    linear = per_token + offset * per_pair
    if per_pair:
        n = int((math.sqrt(linear**2 + 4 * per_pair * budget_bytes) - linear) / (2 * per_pair))
    else:
        n = budget_bytes // linear
    if not on_cpu:  # attention multiplies twice with offset + n keys, a projection once with E · F weights
        projection = 2 * args.hidden_size * max(args.intermediate_size, args.vocab_size if logits else 0)
        n = min(n, int(LAUNCH_FLOP / max(4 * heads * width * (offset + n), projection)))
    return max(16, min(n, 256 if on_cpu else 1024) // 16 * 16)
