"""What the demo checkpoint can do: held-out loss and single-line infilling, with and without the suffix.

    python benchmarks/demo_quality.py [--model DIR] [--unquantised DIR] [--sources DIR] [--problems N]

The problems come from files that training never saw (train/corpus.py holds them out by name). A problem is one line of
such a file, taken out whole but for its line end; the model sees up to 10 lines before and 5 after it, answers
greedily, and must also end by itself: an answer counts only if it equals the line and stopped at EOT.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np
from harness import Result, report

from mlx_codellama import load
from mlx_codellama.api import CodeLlama
from mlx_codellama.train.corpus import Document
from mlx_codellama.train.demo import DemoRun, corpus_of
from mlx_codellama.train.trainer import TrainArgs, evaluate


def problems(documents: tuple[Document, ...], n: int, *, seed: int = 1) -> list[tuple[str, str, str]]:
    """n different (prefix, line, suffix), of lines of 8 to 70 characters that are no comment."""
    rng, found = np.random.default_rng(seed), dict[tuple[int, int], tuple[str, str, str]]()
    weights = np.array([len(d.text) * d.weight for d in documents])
    while len(found) < n:
        i = int(rng.choice(len(documents), p=weights / weights.sum()))
        lines = documents[i].text.split("\n")
        at = int(rng.integers(1, len(lines)))
        if 8 <= len(lines[at].strip()) <= 70 and not lines[at].strip().startswith("#"):
            before, after = lines[max(0, at - 10) : at], lines[at + 1 : at + 6]
            found[i, at] = "".join(f"{line}\n" for line in before), lines[at], "\n" + "\n".join(after)
    return list(found.values())


def fitting(model: CodeLlama, prefix: str, suffix: str, *, room: int = 64) -> tuple[str, str]:
    """Drop lines furthest from the hole until the prompt leaves room for the answer."""
    count = model.tokenizer.encode
    while len(count(prefix)) + len(count(suffix)) + room > model.max_context:
        if len(prefix) > 2 * len(suffix):
            prefix = prefix.partition("\n")[2]
        else:
            suffix = suffix.rpartition("\n")[0]
    return prefix, suffix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint folder; default: the bundled demo")
    parser.add_argument("--unquantised", type=Path, default=None, help="its float checkpoint, to compare the loss with")
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    model = load(args.model)
    corpus = corpus_of(args.sources)
    result = Result("demo_quality", "What the demo checkpoint can do, on files that training never saw")

    demo = DemoRun(corpus, model.tokenizer, TrainArgs(steps=1))
    for name, other in (("held-out loss", model), ("held-out loss before quantisation", args.unquantised)):
        if other is not None:
            loaded = other if isinstance(other, CodeLlama) else load(other)
            result.add(name, "nats per token", [evaluate(loaded.model, demo.held_out())])

    cases = [(fitting(model, p, s), line) for p, line, s in problems(corpus.held_out, args.problems)]
    for name, order, blind in (
        ("PSM", "psm", False),
        ("SPM", "spm", False),
        ("PSM without the suffix", "psm", True),
    ):
        exact = ended = 0
        for (prefix, suffix), line in cases:
            answer = model.infill(prefix, "" if blind else suffix, order=order, max_tokens=64)
            ended += answer.finish_reason == "stop"
            exact += answer.finish_reason == "stop" and answer.text == line
        result.add(f"single-line exact match, {name}", "%", [100 * exact / len(cases)], note=f"{len(cases)} lines")
        result.add(f"ended by itself within 64 tokens, {name}", "%", [100 * ended / len(cases)])
    result.notes.append(
        f"corpus sha256 {corpus.digest[:16]}…: {len(corpus.train)} files, {len(corpus.held_out)} held out"
    )
    if args.no_save:
        report("not saved")
    else:
        result.save()


if __name__ == "__main__":
    main()
