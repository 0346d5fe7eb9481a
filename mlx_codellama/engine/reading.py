"""The logits of a whole text, chunk by chunk."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import mlx.core as mx

from mlx_codellama.cache import make_sequence
from mlx_codellama.engine.request import check_context, check_ids
from mlx_codellama.errors import PromptError
from mlx_codellama.model import Model
from mlx_codellama.placement import place
from mlx_codellama.storage import KVStorage


def read_logits(
    model: Model,
    ids: Iterable[int],
    *,
    storage: KVStorage | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    chunk_limit: int | None = None,
) -> Iterator[mx.array]:
    """Teacher-forced logits of a text, chunk by chunk from a fresh sequence of the given storage.

    ids [L] → arrays float32 [l, V] whose lengths sum to L; row i is the prediction after ids[i].
    prefill_chunk  tokens per forward pass; default: as `Placement.chunk_tokens`, at most chunk_limit
    Raises, before anything is computed: PromptError for an empty text or ids outside the vocabulary,
    ContextOverflowError where they are more than max_context, by default what the model was trained to read.
    """
    args, prompt = model.args, [operator.index(i) for i in ids]
    check_ids(prompt, args)
    check_context(len(prompt), 0, max_context or args.max_position_embeddings)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise PromptError(f"prefill_chunk is {prefill_chunk}; expected at least 1 token")
    placement, sequence = place(args), make_sequence(args, storage)
    sequence.reserve(len(prompt))
    sequence.horizon = len(prompt)
    while (start := sequence.offset) < len(prompt):
        most = prefill_chunk or min(chunk_limit or 1024, placement.chunk_tokens(start, every_logit=True))
        end = min(len(prompt), start + most)
        x = model.hidden(mx.array([prompt[start:end]], mx.int32), [(sequence, end - start)], prompt=True)
        out = model.head(x, prompt=True).squeeze(0)  # a view: an index would copy
        del x
        mx.eval(out, sequence.arrays)
        yield out
        del out  # before the next chunk is computed
        mx.clear_cache()
