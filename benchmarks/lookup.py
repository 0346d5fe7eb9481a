"""How much faster an edit is written with prompt lookup: a source file with two names changed, on against off.

    python benchmarks/lookup.py [--geometry 1.1b] [--tokens 256] [--repeat 3] [--tokenizer DIR]

Needs no weights. A random model copies nothing, so the text is dictated: the model computes every pass in full, then
the wanted id is raised above all others before the sampler sees the logits. All else is the product's own path:
drafting, wide passes, verification, trimming, and the judgement of when it pays. What is not measured is how often a
real model departs from the expected edit; the row "something else" dictates a text the context does not hold.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
import mlx.core as mx
from harness import ROOT, Result

from mlx_codellama.cache import Span, make_sequence
from mlx_codellama.config import GEOMETRIES
from mlx_codellama.engine import generate
from mlx_codellama.loader import random_model
from mlx_codellama.lookup import Costs, Lookup
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.tokenizer import Tokenizer

RENAMES = ((r"\btext\b", "paragraph"), (r"\bself\.width\b", "self.n_columns"))


class Dictated:
    """A model whose every forward pass is real and whose next id is then the one of `ids` at that position."""

    def __init__(self, model: Model, ids: Sequence[int]) -> None:
        self.model, self.args, self._ids = model, model.args, mx.array([*ids, 0])

    def hidden(self, ids: mx.array, spans: Sequence[Span], **options: Any) -> mx.array:
        ((sequence, length),) = spans
        assert sequence is not None
        self._wanted = self._ids[sequence.offset + 1 : sequence.offset + length + 1]
        return self.model.hidden(ids, spans, **options)

    def head(self, x: mx.array, **options: Any) -> mx.array:
        logits = self.model.head(x, **options)
        return mx.put_along_axis(logits, self._wanted[None, -x.shape[1] :, None], mx.array(1e4), axis=2)

    def __call__(self, ids: mx.array, spans: Sequence[Span], **options: Any) -> mx.array:
        return self.head(self.hidden(ids, spans, **options), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="1.1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--lines", type=int, default=60, help="of the source file")
    parser.add_argument("--tokens", type=int, default=256, help="to write in each run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "mlx_codellama" / "demo")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    text = "".join(inspect.getsource(textwrap.TextWrapper).splitlines(keepends=True)[100 : 100 + args.lines])
    edited = text
    for old, new in RENAMES:
        edited = re.sub(old, new, edited)
    prompt = tokenizer.encode(text + "\n\n# The same with other names:\n", bos=True)
    tasks = {
        "an edited copy": tokenizer.encode_infilling(edited)[: args.tokens],
        "something else": tokenizer.encode_infilling(inspect.getsource(inspect.Signature))[: args.tokens],
    }
    model = random_model(with_bits(GEOMETRIES[args.geometry], args.bits))
    result = Result(
        "lookup", f"Writing an edit with prompt lookup, {args.geometry} geometry, {args.bits}-bit weights, dictated"
    )
    cache = make_sequence(model.args)
    costs = Costs()  # as a loaded model keeps them from call to call
    run(model, cache, prompt, tasks["an edited copy"][:40], Lookup(costs=costs))  # reads the prompt, warms up
    seen: dict[int, float] = {}
    for name, wanted in tasks.items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        lookup = Lookup()
        for _ in range(args.repeat):
            for on in (False, True):
                lookup = Lookup(costs=costs) if on else lookup
                rates[on].append(run(model, cache, prompt, wanted, lookup if on else None))
        off = result.add(f"{name}, without lookup", "tok/s", rates[False])
        what = f"{lookup.accepted} of {lookup.drafted} drafted tokens accepted"
        on = result.add(f"{name}, with lookup", "tok/s", rates[True], note=what)
        seen = seen or costs.measured
        target = "target 1.8" if name == "an edited copy" else "target: no slower"
        result.add(f"{name}, with against without", "×", [on / off], note=target)
    shown = ", ".join(f"{rows} rows {seconds / seen[1]:.2f}" for rows, seconds in seen.items())
    result.notes.append(
        f"Prompt {len(prompt)} tokens, {args.tokens} written. A pass takes, in passes of one row: {shown}."
    )
    result.save()


def run(model: Model, cache: list[Any], prompt: list[int], wanted: list[int], lookup: Lookup | None) -> float:
    """Tokens per second after the first; checks that the ids are the dictated ones."""
    for layer in cache:
        layer.trim(max(0, layer.offset - len(prompt) + 1))
    steps = generate(
        Dictated(model, [*prompt, *wanted]),  # type: ignore[arg-type]
        prompt,
        max_tokens=len(wanted),
        max_context=len(prompt) + len(wanted),
        sequence=cache,
        lookup=lookup,
    )
    ids = [next(steps).id]
    begin = time.perf_counter()
    ids += [step.id for step in steps]
    seconds = time.perf_counter() - begin
    if ids != wanted:
        raise AssertionError("the ids are not the dictated ones")
    return (len(ids) - 1) / seconds


if __name__ == "__main__":
    main()
