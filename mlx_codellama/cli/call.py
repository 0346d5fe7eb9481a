"""One call of complete, infill or chat: the text on stdin, the model, the prompt that fits, and the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output, repo_option
from mlx_codellama.cli.cache_file import KeptCache
from mlx_codellama.source_file import MAX_BYTES, decode, read_text

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion, TextStream
    from mlx_codellama.fitting import Fitted
    from mlx_codellama.hole import Window

STDIN = Path("-")

stats_option = click.option("--stats", is_flag=True, help="Show on stderr how long it took.")


def read_input(path: Path, missing: str = "") -> str:
    """The text of a file, or of stdin if path is STDIN.

    missing  the usage error if stdin is a terminal, so that nothing was piped in
    Raises PromptError as `read_text`; click.UsageError.
    """
    if path != STDIN:
        return read_text(path)
    if sys.stdin.isatty():
        raise click.UsageError(missing)
    return decode(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin")


@dataclass
class Call:
    """A model, how it is to answer, and what is kept and shown of the call."""

    model: CodeLlama
    sampling: dict[str, Any]
    kept: KeptCache = field(default_factory=KeptCache)
    stats: bool = False
    repo: Path | None = None
    repo_tokens: int = 0

    @classmethod
    def of(cls, chosen: dict[str, Any], logprobs: int | None = None) -> Call:
        """Load the model and the cache file that a command's options name."""
        from mlx_codellama.cli import generation

        kept = KeptCache(chosen.pop("cache"), chosen.pop("rewrite_cache"))
        model = generation.open_model(chosen, logprobs)
        kept.open(model)
        return cls(model, options.sampling(chosen), kept, **chosen)

    def fit(
        self, name: str, file: Path | None, prefix: str, suffix: str, n_prompt: Callable[[str, str], int]
    ) -> Fitted:
        """The prompt for a text and the repository of --repo; notes tell what is left out and what comes first.

        n_prompt  tokens of a prompt made of (prefix, suffix)
        """
        from mlx_codellama.fitting import fit

        fitted = fit(
            self.model.tokenizer,
            prefix,
            suffix,
            n_prompt,
            context=self.model.max_context,
            max_tokens=self.sampling["max_tokens"],
            repository=self.repo,
            repository_tokens=self.repo_tokens,
            file=file,
        )
        note_window(name, fitted.window)
        if fitted.packed is not None:
            repo_option.say(fitted.packed)
        return fitted

    def run(self, start: Callable[..., TextStream], *, live: bool, echo: str = "") -> Completion:
        """Read the stream that `start` opens (it takes the sampling, cancel= and on_prefill=) to its end.

        live  write its pieces to stdout as they come, after `echo`
        Raises KeyboardInterrupt after Ctrl-C, when what was read is kept.
        """
        from mlx_codellama.cli import generation

        how = {**self.sampling, "on_prefill": generation.prefill_meter()}
        with self.kept.interruptible() as cancel, start(cancel=cancel, **how) as stream:
            if live:
                output.data(echo, newline=False)
            for piece in stream:
                if live:
                    output.data(piece, newline=False)
        if live:
            output.end_line()
        self.kept.keep_if_interrupted(self.model, stream.result)
        generation.note_if_cut(stream.result, self.sampling["max_tokens"])
        return stream.result

    def end(self, result: Completion) -> None:
        """Keep the cache, and show statistics if they are wanted."""
        from mlx_codellama.cli import generation

        self.kept.keep(self.model, result)
        if self.stats:
            output.report(generation.summary(result))


def note_window(name: str, window: Window | None) -> None:
    if window is not None and not window.whole:
        output.note(f"{name} is longer than the context; the model sees {window.span}")
