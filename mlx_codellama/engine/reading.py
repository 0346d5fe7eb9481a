"""How prompts are cut into chunks, and the logits of a whole text."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator

import mlx.core as mx

from mlx_codellama.cache import make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.engine.request import check_context, check_ids
from mlx_codellama.errors import PromptError
from mlx_codellama.kernels.dispatch import backend, native
from mlx_codellama.model import Model
from mlx_codellama.storage import KVStorage

PREFILL_BYTES = 512 * 2**20  # what the activations of one prefill chunk may take
LAUNCH_FLOP = 3e11  # of one kernel: a GPU's watchdog ends those that run for seconds; the slowest Macs do 1e12 a second


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
    prefill_chunk  tokens per forward pass; default: what PREFILL_BYTES allow, at most chunk_limit
    Raises, before anything is computed: PromptError for an empty text or ids outside the vocabulary,
    ContextOverflowError where they are more than max_context, by default what the model was trained to read.
    """
    args, prompt = model.args, [operator.index(i) for i in ids]
    check_ids(prompt, args)
    check_context(len(prompt), 0, max_context or args.max_position_embeddings)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise PromptError(f"prefill_chunk is {prefill_chunk}; expected at least 1 token")
    sequence = make_sequence(args, storage)
    sequence.reserve(len(prompt))
    sequence.horizon = len(prompt)
    while (start := sequence.offset) < len(prompt):
        most = prefill_chunk or min(chunk_limit or 1024, chunk_tokens(args, start, logits=True))
        end = min(len(prompt), start + most)
        x = model.hidden(mx.array([prompt[start:end]], mx.int32), [(sequence, end - start)], prompt=True)
        out = model.head(x, prompt=True).squeeze(0)  # a view: an index would copy
        del x
        mx.eval(out, sequence.arrays)
        yield out
        del out  # before the next chunk is computed
        mx.clear_cache()


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
