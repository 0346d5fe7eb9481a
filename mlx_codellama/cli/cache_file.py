"""`--cache FILE`: what was read of a prompt is kept in a file, so that the next question costs only its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.errors import CacheError

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion

LEAST_FRESH = 64  # tokens of a prompt that were not in the file, from which on it may be worth writing again
FRESH_SHARE = 8  # and it is where they are at least one token in so many

cache_options = options.stack(
    click.option(
        "--cache",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Keep what was read of the prompt in FILE and begin with it next time. It belongs to one model and its "
        "settings; another file is refused.",
    ),
    click.option("--rewrite-cache", is_flag=True, help="Begin a cache anew that does not fit, instead of refusing it."),
)


class KeptCache:
    """The file of `--cache`, or none."""

    def __init__(self, chosen: dict[str, Any]) -> None:
        """Take the two options out of a command's options. Raises click.UsageError for one without the other."""
        self.path: Path | None = chosen.pop("cache")
        self._rewrite: bool = chosen.pop("rewrite_cache")
        self._loaded = 0  # tokens that were in the file
        if self._rewrite and self.path is None:
            raise click.UsageError("--rewrite-cache needs --cache")
        if self.path is not None and not self.path.parent.is_dir():  # said now, not when the prompt is read
            raise CacheError(f"{self.path.parent} is no folder", hint="make it first, or name another file for --cache")

    def open(self, model: CodeLlama) -> None:
        """Load the file if there is one. Raises CacheError for one that does not fit, unless it is to be rewritten, and
        in any case for one that never was a cache: a name mistyped must not cost a source file."""
        if self.path is None or not self.path.exists():
            return
        from mlx_codellama.snapshot import check_replaceable

        try:
            if not self.path.is_file():
                check_replaceable(self.path)  # a pipe is not read, nor a device
            n = model.load_cache(self.path)
        except CacheError as error:
            check_replaceable(self.path)
            if not self._rewrite:
                raise CacheError(str(error), hint=f"{error.hint}; --rewrite-cache begins the file anew") from None
            output.note(f"{error}; it is begun anew")
            return
        self._loaded = n
        output.say(f"cache: {n:,} tokens in {self.path}")

    @contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool] | None]:
        """Within, the first Ctrl-C ends the stream that is given the callable as `cancel` after the part of the prompt
        that is being read. Without a file there is nothing to keep (None), and Ctrl-C ends everything at once."""
        if self.path is None:
            yield None
            return
        from mlx_codellama.cli.generation import stop_on_interrupt

        with stop_on_interrupt("stopping after this part, to keep what is read; Ctrl-C again stops now") as stop:
            yield stop

    def keep_if_interrupted(self, model: CodeLlama, result: Completion) -> None:
        """Where Ctrl-C ended the stream, keep what was read until then and raise KeyboardInterrupt."""
        if result.finish_reason == "cancelled":
            self.keep(model, result)
            raise KeyboardInterrupt

    def keep(self, model: CodeLlama, result: Completion) -> None:
        """Write the file where there is none, or where much of the prompt was not in it; of a prompt that was not read
        to its end where more was read than the file has. In one step: a write that fails leaves the old file.

        Raises CacheError for a file that came meanwhile and is none, OutputError.
        """
        stats, held = result.stats, model.cached_tokens
        if self.path is None or not held:
            return
        part = result.finish_reason == "cancelled" and held < stats.prompt_tokens
        if part:
            worth = held > self._loaded and held - stats.cached_tokens >= min(LEAST_FRESH, held)
        else:
            fresh = stats.prompt_tokens - stats.cached_tokens
            worth = not self._loaded or fresh >= max(LEAST_FRESH, stats.prompt_tokens // FRESH_SHARE)
        if not worth:
            return
        n = self._loaded = model.save_cache(self.path)
        of = f" of {stats.prompt_tokens:,}" if part else ""
        more = "; the same command reads on from there" if part else ""
        output.say(f"cache: {n:,}{of} tokens kept in {self.path}{more}")
