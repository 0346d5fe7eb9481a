"""Samples side by side against one after the other, and what sequences over one long prefix cost.

    python benchmarks/many.py [--geometry 1.1b] [--bits 4] [--prompt 512] [--tokens 64] [--prefix 16384] [--repeat 3]

Needs no weights: random ones of the geometry, and random ids, which are sampled so that the samples differ. "Side by
side" is one engine that takes a step of all samples in one ragged pass and reads the prompt once; "one after the other"
is the same engine with one request at a time, which also finds the prompt read. Both write the same ids: checked.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
import mlx.core as mx
from harness import Result, report

from mlx_codellama.config import GEOMETRIES
from mlx_codellama.engine import Engine, Generation, Request, turns
from mlx_codellama.loader import random_model
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.storage import KVStorage

COUNTS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="1.1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--kv-bits", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    parser.add_argument("--prefix", type=int, default=16384, help="0 leaves the long prefix out")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    model = random_model(with_bits(GEOMETRIES[args.geometry], args.bits))
    result = Result(
        "many", f"Several samples of one prompt, {args.geometry} geometry, {args.bits}-bit weights, random ids"
    )
    storage = KVStorage.of(args.kv_bits)
    samples_side_by_side(result, model, storage, args.prompt, args.tokens, args.repeat)
    if args.prefix:
        long_prefix(result, model, storage, args.prefix, args.tokens)
    result.save()


def requests(model: Model, prompt: list[int], tokens: int, n: int) -> list[Request]:
    return [Request(prompt, tokens, SamplingParams(temperature=1.0, seed=seed)) for seed in range(n)]


def random_ids(model: Model, n: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, model.args.vocab_size) for _ in range(n)]


def written(engine: Engine, generations: Sequence[Generation]) -> tuple[list[list[int]], float]:
    """The ids of each, and the seconds from their first tokens to their last."""
    ids: list[list[int]] = [[] for _ in generations]
    begin = 0.0
    for i, step in turns(engine, list(generations)):
        assert step.id is not None
        ids[i].append(step.id)
        if not begin and all(ids):
            begin, n_before = time.perf_counter(), sum(map(len, ids))
    seconds = time.perf_counter() - begin
    return ids, seconds / (sum(map(len, ids)) - n_before)


def samples_side_by_side(
    result: Result, model: Model, storage: KVStorage, n_prompt: int, tokens: int, repeat: int
) -> None:
    prompt = random_ids(model, n_prompt)
    rates: dict[tuple[int, bool], list[float]] = {(n, together): [] for n in COUNTS for together in (True, False)}
    for turn in range(repeat + 1):  # the first warms up
        for n in COUNTS:
            engine = Engine(model, storage)
            side_by_side, each = written(engine, engine.submit(*requests(model, prompt, tokens, n)))
            engine, singly, seconds, count = Engine(model, storage), [], 0.0, 0
            for request in requests(model, prompt, tokens, n):
                (ids,), per_token = written(engine, engine.submit(request))
                singly.append(ids)
                seconds, count = seconds + per_token * (len(ids) - 1), count + len(ids) - 1
            if side_by_side != singly:
                report(f"n = {n}: the ids differ from those one after the other")
            if turn:
                rates[n, True].append(1 / each)
                rates[n, False].append(count / seconds)
    for n in COUNTS:
        for together, how in ((True, "side by side"), (False, "one after the other")):
            result.add(f"n = {n}, {how}", "tok/s", rates[n, together])
        note = "target 1.8" if n >= 4 else None
        ratios = [a / b for a, b in zip(rates[n, True], rates[n, False], strict=True)]
        if n > 1:
            result.add(f"n = {n}, side by side over one after the other", "×", ratios, note=note)


def long_prefix(result: Result, model: Model, storage: KVStorage, n_prefix: int, tokens: int) -> None:
    """Eight requests with one long beginning and different ends."""
    prefix = random_ids(model, n_prefix, seed=1)
    engine = Engine(model, storage)
    first_s: list[float] = []
    generations = []
    for n in range(8):
        begin = time.perf_counter()
        (one,) = engine.submit(Request([*prefix, *random_ids(model, 16, seed=2 + n)], tokens))
        next(one)
        first_s.append(time.perf_counter() - begin)
        generations.append(one)
        if n == 0:
            alone = bytes_of(engine)
    result.add(f"first token of the first request, {n_prefix + 16} tokens", "s", first_s[:1])
    result.add("first token of the others, 16 tokens of their own", "s", first_s[1:])
    others = sorted(first_s[1:])[len(first_s) // 2 - 1]
    result.add("first token of another over that of the first", "×", [others / first_s[0]], note="target 1/20")
    held = bytes_of(engine)
    result.add("bytes of keys and values, eight sequences over one", "×", [held / alone], bytes=held, note="target 1.1")
    mx.clear_cache()


def bytes_of(engine: Engine) -> int:
    """Bytes of all keys and values that the engine holds, each piece of storage once."""
    return sum(engine.storages.values())


if __name__ == "__main__":
    main()
