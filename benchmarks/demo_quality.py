"""What the demo checkpoint can do: held-out loss and single-line infilling, with and without the suffix.

    python benchmarks/demo_quality.py [--model DIR] [--unquantised DIR] [--sources DIR] [--problems N]

The problems come from files that training never saw (train/corpus.py holds them out by name). A hole is one line of
such a file, whole but for its line end, or the rest of it from a random character on. The model sees up to 10 lines
before and 5 after it, answers greedily, and must also end by itself: an answer counts only if it equals the truth and
stopped at EOT.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np
from harness import Result, report

from mlx_codellama import load
from mlx_codellama.api import CodeLlama
from mlx_codellama.prompts import infill_ids
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


def cut(prefix: str, line: str, suffix: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """The hole moved into the line: from a random character after its indentation to its end."""
    indent = len(line) - len(line.lstrip())
    at = int(rng.integers(indent + 1, len(line)))
    return prefix + line[:at], line[at:], suffix


def truth_loss(model: CodeLlama, holes: list[tuple[str, str, str]]) -> float:
    """Nats per token of what was really there, and the EOT after it, in PSM order."""
    total, count = 0.0, 0
    for prefix, suffix, middle in holes:
        prompt = infill_ids(model.tokenizer, prefix, suffix)
        answer = [*model.tokenizer.encode_infilling(middle), model.tokenizer.infill.eot]
        logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        total += float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(answer)), answer]).sum())
        count += len(answer)
    return total / count


def fitting(model: CodeLlama, prefix: str, suffix: str, *, room: int = 72) -> tuple[str, str]:
    """Drop lines furthest from the hole until the prompt leaves room for 64 tokens and the marks."""
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

    lines = problems(corpus.held_out, args.problems)
    rng = np.random.default_rng(2)
    rests = [cut(prefix, line, suffix, rng) for prefix, line, suffix in lines]
    for what, holes in (("a whole line", lines), ("the rest of a line", rests)):
        cases = [(*fitting(model, prefix, suffix), middle) for prefix, middle, suffix in holes]
        for order, blind in (("psm", False), ("spm", False), ("psm", True)):
            name = f"{what}, {order.upper()}{', without the suffix' if blind else ''}"
            shown = [(prefix, "" if blind else suffix, middle) for prefix, suffix, middle in cases]
            answers = [model.infill(prefix, suffix, order=order, max_tokens=64) for prefix, suffix, _ in shown]
            ended = [answer.finish_reason == "stop" for answer in answers]
            exact = [a.text == middle and e for a, e, (*_, middle) in zip(answers, ended, shown, strict=True)]
            result.add(f"{name}: exact match", "%", [100 * float(np.mean(exact))], note=f"{len(cases)} holes")
            result.add(f"{name}: ended by itself within 64 tokens", "%", [100 * float(np.mean(ended))])
            if order == "psm":
                result.add(f"{name}: loss of the truth", "nats per token", [truth_loss(model, shown)])
    result.notes.append(
        f"corpus sha256 {corpus.digest[:16]}…: {len(corpus.train)} files, {len(corpus.held_out)} held out"
    )
    if args.no_save:
        report("not saved")
    else:
        result.save()


if __name__ == "__main__":
    main()
