"""The simplest uses of an engine: one request alone, and the steps of several as they come."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator

from mlx_codellama.cache import Sequence
from mlx_codellama.engine.engine import Engine
from mlx_codellama.engine.generation import Generation
from mlx_codellama.engine.request import Request, Step
from mlx_codellama.lookup import Lookup
from mlx_codellama.model import Model
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.storage import KVStorage


def turns(engine: Engine, generations: list[Generation]) -> Iterator[tuple[int, Step]]:
    """Steps of several generations as they come, with the number of the one that each belongs to."""
    open_ones = dict(enumerate(generations))
    while open_ones:
        ready = [i for i, one in open_ones.items() if one.is_ready]
        if not ready:
            engine.take_turn()
        for i in ready:
            step = next(open_ones[i], None)
            if step is not None:
                yield i, step
            if step is None or step.finish_reason is not None:
                open_ones.pop(i)


def generate(
    model: Model,
    ids: Iterable[int],
    *,
    params: SamplingParams | None = None,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    sequence: Sequence | None = None,
    storage: KVStorage | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    chunk_limit: int | None = None,
    logprobs: int | None = None,
    lookup: Lookup | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generation:
    """One request on an engine of its own; see `Request` for the options, and `Engine.submit` for sequence.

    max_context    tokens, prompt and generated together; default: what the model was trained to read
    prefill_chunk  tokens per forward pass over the prompt; default: what a memory budget allows, at most chunk_limit
    Raises, before anything is computed: PromptError for an empty prompt or ids outside the vocabulary,
    ContextOverflowError where prompt and max_tokens do not fit; and while running BackendError for logits with NaN or
    infinity.
    """
    request = Request(
        [operator.index(i) for i in ids],
        max_tokens,
        params or SamplingParams(),
        frozenset(stop_ids),
        logprobs,
        lookup,
        should_stop,
        on_prefill,
    )
    request.check(model.args, max_context or model.args.max_position_embeddings)
    engine = Engine(model, storage, prefill_chunk=prefill_chunk, chunk_limit=chunk_limit)
    return engine.submit(request, sequence=sequence)[0]
