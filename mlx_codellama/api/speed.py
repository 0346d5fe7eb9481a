"""How fast a model reads and writes, measured on random ids: what `mlx-codellama bench` reports."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_codellama.engine import generate
from mlx_codellama.model import Model
from mlx_codellama.storage import KVStorage


@dataclass(frozen=True)
class Speed:
    """One run. peak_bytes is the most memory MLX held at once, weights included."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    peak_bytes: int


def measure_speed(
    model: Model,
    *,
    prompt_tokens: int,
    tokens: int,
    storage: KVStorage | None = None,
    seed: int = 0,
    chunk_limit: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Speed:
    """Read prompt_tokens random ids with an empty cache and write `tokens` more (at least 2), never stopping early.

    prefill_tok_s  prompt tokens per second until the first token is there; decode_tok_s  tokens after it per second
    chunk_limit    as in `generate`
    More than the model was trained to read is allowed: the time does not depend on what the ids mean.
    """
    draw = random.Random(seed)
    ids = [draw.randrange(3, model.args.vocab_size) for _ in range(prompt_tokens)]
    mx.clear_cache()
    mx.reset_peak_memory()
    steps = generate(
        model,
        ids,
        max_tokens=tokens,
        storage=storage,
        max_context=prompt_tokens + tokens,
        stop_ids=(),
        chunk_limit=chunk_limit,
        on_prefill=on_prefill,
    )
    begin = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    n = sum(1 for _ in steps)
    last = time.perf_counter()
    return Speed(
        prefill_tok_s=prompt_tokens / (first - begin),
        decode_tok_s=n / (last - first) if n else 0.0,
        ttft_s=first - begin,
        peak_bytes=mx.get_peak_memory(),
    )


def median_speed(runs: list[Speed]) -> Speed:
    """Medians of the runs, and the highest of their peaks."""
    return Speed(
        prefill_tok_s=statistics.median(run.prefill_tok_s for run in runs),
        decode_tok_s=statistics.median(run.decode_tok_s for run in runs),
        ttft_s=statistics.median(run.ttft_s for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def weights_bytes(model: Model) -> int:
    """Bytes of all parameters as they lie in memory."""
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))  # type: ignore[no-untyped-call]
    return sum(array.nbytes for _, array in parameters)
