"""`--cache FILE`: what was read of a prompt is kept in a file, so that the next question costs only its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_codellama.cli import options, output
from mlx_codellama.errors import CacheError

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion

LEAST_FRESH = 64  # tokens of a prompt that were not in the file: with fewer it is not worth writing again
FRESH_SHARE = 8  # nor if fewer than one token in FRESH_SHARE is new

cache_options = options.stack(
    click.option(
        "--cache", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="Keep what was read of the prompt in FILE and start with it next time. The file belongs to one model and "
        "its settings; a file of another is refused.",
    ),
    click.option("--rewrite-cache", is_flag=True, help="Replace a cache that does not fit, instead of refusing it."),
)  # fmt: skip


class KeptCache:
    """The file of `--cache`, or none."""

    def __init__(self, path: Path | None = None, rewrite: bool = False) -> None:
        """Raises click.UsageError for --rewrite-cache alone; CacheError, before a prompt is read, for no folder."""
        self.path, self._rewrite = path, rewrite
        self._loaded = 0  # tokens that are in the file
        if rewrite and path is None:
            raise click.UsageError("--rewrite-cache needs --cache")
        if path is not None and not path.parent.is_dir():
            raise CacheError(f"{path.parent} is no folder", hint="make it first, or name another file for --cache")

    def open(self, model: CodeLlama) -> None:
        """Load the file if there is one. Raises CacheError if it does not fit and must not be rewritten, and always if
        it never was a cache: a mistyped name must not cost a source file."""
        if self.path is None or not self.path.exists():
            return
        from mlx_codellama.snapshot import check_replaceable

        try:
            if not self.path.is_file():
                check_replaceable(self.path)  # never reads a pipe or a device
            self._loaded = model.load_cache(self.path)
            output.say(f"cache: {self._loaded:,} tokens in {self.path}")
        except CacheError as error:
            check_replaceable(self.path)
            if not self._rewrite:
                raise CacheError(str(error), hint=f"{error.hint}; --rewrite-cache replaces the file") from None
            output.note(f"{error}; it will be replaced")

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
        """If Ctrl-C ended the stream, keep what was read until then and raise KeyboardInterrupt."""
        if result.finish_reason == "cancelled":
            self.keep(model, result)
            raise KeyboardInterrupt

    def keep(self, model: CodeLlama, result: Completion) -> None:
        """Write the file if there is none, or if much of the prompt was not in it; after Ctrl-C, if more was read than
        the file has. A write that fails leaves the old file.

        Raises OutputError; CacheError if another file has appeared there that is no cache.
        """
        held, total = model.cached_tokens, result.stats.prompt_tokens
        part = result.finish_reason == "cancelled" and held < total
        if self.path is None or not held or not self._is_worth(held if part else total, result, part):
            return
        n = self._loaded = model.save_cache(self.path)
        of, more = (f" of {total:,}", "; the same command continues from there") if part else ("", "")
        output.say(f"cache: {n:,}{of} tokens kept in {self.path}{more}")

    def _is_worth(self, n_read: int, result: Completion, part: bool) -> bool:
        """Whether writing pays, if n_read tokens of the prompt were read, or taken from the file."""
        fresh = n_read - result.stats.cached_tokens
        if part:
            return n_read > self._loaded and fresh >= min(LEAST_FRESH, n_read)
        return not self._loaded or fresh >= max(LEAST_FRESH, n_read // FRESH_SHARE)
