"""What complete, infill and chat share: open a model, show how far the prompt is read, report what a call did."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_codellama.cli import output

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion

MODEL_OPTIONS = ("model", "dtype", "context")


def open_model(chosen: dict[str, Any]) -> CodeLlama:
    """Load the model that the model options name (they are removed from `chosen`)."""
    from mlx_codellama import load
    from mlx_codellama.cli.checkpoint import folder_of

    model, dtype, context = (chosen.pop(name) for name in MODEL_OPTIONS)
    path = None if model is None else folder_of(model)
    return load(path, dtype=dtype, max_context=context)


def prefill_meter() -> Callable[[int, int], None] | None:
    """Shows on a terminal's stderr how much of a long prompt is read; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    shown = False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done < total:
            shown = True
            output.say(f"\r\033[Kreading the prompt: {100 * done // total} %", newline=False)
        elif shown:
            output.say("\r\033[K", newline=False)

    return show


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
    return (
        f"{s.prompt_tokens} prompt tokens ({s.cached_tokens} cached), first token after {s.ttft_s:.2f} s, "
        f"{s.generated_tokens} tokens at {s.decode_tok_s:.1f} tok/s, peak {output.bytes_text(s.peak_bytes)}, "
        f"ended by {result.finish_reason}"
    )
