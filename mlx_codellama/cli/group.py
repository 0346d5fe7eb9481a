"""The command `mlx-codellama`: a click group that imports a verb's file only when that verb is called."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from mlx_codellama.cli import output

# Verb → what it does, in the order of `--help`. The verb's file in this folder has the verb's name and holds `command`.
VERBS = {
    "complete": "Continue a piece of code.",
    "infill": "Fill a hole in a source file.",
    "chat": "Talk to an Instruct model.",
    "convert": "Convert a released checkpoint, quantising on the way.",
    "quantize": "Quantise a converted checkpoint and measure what it costs.",
    "inspect": "Show what a checkpoint is, reading headers only.",
    "plan": "Work out what a model needs in memory, and what would fit.",
    "train": "Train a small model from scratch.",
    "bench": "Measure prefill and decode speed.",
    "doctor": "Show this machine, MLX, and which kernels run.",
}


class LazyGroup(click.Group):
    """Lists verbs from a table, so `--help` imports none of them, and turns failures into `error:` and `hint:`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"mlx_codellama.cli.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run and exit: 0 done, 1 failed, 2 usage error, 130 interrupted, 141 the reader of stdout went away."""
        extra["standalone_mode"] = False
        if not _open_streams():
            output.failure("stdout is closed", "send it to a file, or to /dev/null")
            sys.exit(output.EXIT_FAILED)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _shown(warnings.showwarning)
                result = super().main(args, prog_name or "mlx-codellama", **extra)
            sys.stdout.flush()
        except click.UsageError as error:
            _usage(error)
            sys.exit(output.EXIT_USAGE)
        except click.ClickException as error:
            output.failure(error.format_message())
            sys.exit(output.EXIT_FAILED)
        except (click.Abort, KeyboardInterrupt):
            output.report("interrupted")
            sys.exit(output.EXIT_INTERRUPTED)
        except BrokenPipeError:
            _leave_pipe()
        except Exception as error:
            told = output.explain(error)
            if told is None:
                raise
            output.failure(*told)
            sys.exit(output.EXIT_FAILED)
        sys.exit(result if isinstance(result, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _no_reader():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _no_reader():
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name in VERBS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name.lower(), VERBS, n=1)
        raise click.UsageError(f"No such command {name!r}{f'; did you mean {near[0]}?' if near else ''}", ctx)


@contextmanager
def _no_reader() -> Iterator[None]:
    """Within, a reader of stdout that goes away ends the command; click would exit 1 before main() sees it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            _leave_pipe()
        raise


def _open_streams() -> bool:
    """Replace standard streams that are closed, or the next file opened takes their number.

    → False if stdout is closed: there is nowhere to write a result
    """
    has_stdout = sys.stdout is not None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    return has_stdout


def _shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How warnings are written: the package's own as a note, without the line of source that Python would quote."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("mlx_codellama."):
            output.note(str(message))
        else:
            otherwise(message, category, *where, **more)

    return show


def _usage(error: click.UsageError) -> None:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):  # the bare command: its message is the whole help
        output.report(error.format_message())
        return
    if error.ctx is not None:
        output.report(error.ctx.get_usage())
    path = error.ctx.command_path if error.ctx is not None else "mlx-codellama"
    output.failure(error.format_message().rstrip("."), f"see `{path} --help`")


def _leave_pipe() -> NoReturn:
    """End quietly: what is still buffered goes nowhere, as Python would otherwise complain while shutting down."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(output.EXIT_PIPE)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlx-codellama", message="%(package)s %(version)s")
def group() -> None:
    """Code Llama on your own machine: convert, quantise, complete, infill and chat.

    Every command that loads a model uses the small bundled demo model unless you name another.
    """
