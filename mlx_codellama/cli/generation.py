"""What complete, infill and chat share: open a model, show how far the prompt is read, report what a call did."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.progress import EVERY_S
from mlx_codellama.config import DEMO

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion

MODEL_OPTIONS = ("model", "dtype", "exact", "max_context", "rope_scaling")


def open_model(chosen: dict[str, Any], logprobs: int | None = None) -> CodeLlama:
    """Load the model that the model options name (they are removed from `chosen`).

    logprobs  more than the vocabulary has are wrong use, said before anything is loaded
    """
    from mlx_codellama import load
    from mlx_codellama.cli.checkpoint import folder_of

    model, dtype, exact, context, scaling = (chosen.pop(name) for name in MODEL_OPTIONS)
    storage = options.kv_storage(chosen)
    path = None if model is None else folder_of(model)
    if logprobs is not None:
        _check_logprobs(logprobs, path or DEMO)
    if path is not None:
        note_widening(path, dtype)
    return load(
        path,
        dtype=dtype,
        exact=exact,
        max_context=context,
        kv_bits=storage.bits,
        window=storage.window,
        sinks=storage.sinks,
        rope_scaling=scaling,
    )


def _check_logprobs(n: int, folder: Path) -> None:
    """Raise click.UsageError if the model has fewer than n tokens. `load` reports anything else."""
    from mlx_codellama.config import load_config

    if not (folder / "config.json").is_file():
        return
    most = load_config(folder).vocab_size
    if n > most:
        raise click.BadParameter(
            f"{n} is more than this model's vocabulary has, {most}",
            ctx=click.get_current_context(silent=True),
            param_hint="'--logprobs'",
        )


def note_widening(path: Path, dtype: str | None) -> None:
    """Tell if an unquantised 16-bit checkpoint will be held in float32, which takes twice its size."""
    from mlx_codellama.config import load_config
    from mlx_codellama.placement import place

    if not (path / "config.json").is_file():
        return
    args = load_config(path)
    placement = place(args, dtype=dtype)
    if args.quantization is None and args.dtype != "float32" == placement.dtype:
        size, held = output.bytes_text, placement.weights_bytes
        output.note(
            f"the weights are {args.dtype}, {size(held // 2)}; computing in float32 they take {size(held)} "
            "(quantise them, or keep their type with --dtype, which is slow on a CPU)"
        )


def prefill_meter(clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Shows on stderr how much of a long prompt is read, how fast and how long still: on a terminal in one line that is
    written over and cleared at the end, elsewhere a line every few seconds."""
    redraw, shown, said_at = output.can_redraw(), False, clock()
    first, first_at = 0, 0.0  # the first chunk may begin with cached tokens: the rate counts from its end

    def show(done: int, total: int) -> None:
        nonlocal shown, said_at, first, first_at
        now = clock()
        if not first:
            first, first_at = done, now
        if done >= total:
            if shown:
                output.status("")
            return
        rate = (done - first) / (now - first_at) if now > first_at else 0.0
        text = f"prompt read: {100 * done // total} % of {total:,} tokens"
        if rate:
            text += f", {output.time_text((total - done) / rate)} left, {rate:.0f} tok/s"
        if redraw:
            shown = True
            output.status(text)
        elif now - said_at >= EVERY_S:
            said_at = now
            output.say(text)

    return show


@contextmanager
def stop_on_interrupt(note: str = "") -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C sets what the callable tells, so no step is torn; the second one interrupts.

    note  said at the first one
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        if note:
            output.note(note)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def note_tags(model: CodeLlama, result: Completion) -> None:
    """Tell if infill tags were left out of a text, which may read strangely without them."""
    n = sum(id in (model.tokenizer.infill or ()) for id in result.ids)
    if n:
        output.note(f"left out {output.counted(n, 'infill tag')} that the model wrote; --json shows the ids")


def note_if_cut(result: Completion, max_tokens: int) -> None:
    """Tell if a --window forgot tokens, and if --max-tokens cut the answer."""
    stats = result.stats
    if stats.dropped_tokens:
        total = stats.prompt_tokens + stats.generated_tokens
        output.note(f"--window has forgotten {stats.dropped_tokens:,} of {output.counted(total, 'token')}")
    if result.finish_reason == "length":
        output.note(f"stopped after {output.counted(max_tokens, 'token')}; --max-tokens allows more")


def completion_document(result: Completion) -> dict[str, Any]:
    """The part of a `--json` document that every generating verb has."""
    document: dict[str, Any] = {
        "text": result.text,
        "ids": result.ids,
        "finish_reason": result.finish_reason,
        "stats": asdict(result.stats),
    }
    if result.logprobs is not None:
        document["logprobs"] = [asdict(entry) for entry in result.logprobs]
    return document


def summary(result: Completion) -> str:
    """One line for --stats."""
    s = result.stats
    guessed = f" ({s.accepted_tokens} of {s.drafted_tokens} drafted accepted)" if s.drafted_tokens else ""
    dropped = f"{s.dropped_tokens} tokens dropped, " if s.dropped_tokens else ""
    return (
        f"{s.prompt_tokens} prompt tokens ({s.cached_tokens} cached), first token after {s.ttft_s:.2f} s, "
        f"{s.generated_tokens} tokens at {s.decode_tok_s:.1f} tok/s{guessed}, peak {output.bytes_text(s.peak_bytes)}, "
        f"{dropped}ended by {result.finish_reason}" + ("" if s.seed is None else f", seed {s.seed}")
    )
