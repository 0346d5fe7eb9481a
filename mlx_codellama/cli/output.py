"""What the commands say, and where: data goes to stdout, everything else to stderr.

With `--json` the last line of stdout is one compact JSON document. A failure is `error: …` and, where there is
something to do about it, `hint: …`, both on stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_codellama import env
from mlx_codellama.errors import CodeLlamaError, missing_mlx, printable, refused_by_system
from mlx_codellama.errors import bytes_text as bytes_text
from mlx_codellama.errors import counted as counted

QUIET = "mlx_codellama.quiet"  # in the context of a command
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141


_unfinished: Any = None  # the stdout whose last line has not ended


def data(text: str, *, newline: bool = True) -> None:
    """Write text to stdout as UTF-8, whatever the locale says. A terminal gets control codes escaped, a pipe the text
    as it is."""
    global _unfinished
    text += "\n" * newline
    shown = printable(text.replace("\r\n", "\n"), keep="\n\t") if sys.stdout.isatty() else text
    click.echo(shown.encode("utf-8", "replace"), nl=False)
    if text:
        _unfinished = None if text.endswith("\n") else sys.stdout


def end_line() -> None:
    """End the last line of streamed text, on a terminal only: a pipe gets the text as it is."""
    if sys.stdout.isatty() and _unfinished is sys.stdout:
        data("")


def report(text: str = "", *, newline: bool = True) -> None:
    """Write to stderr what the user asked for: statistics, answers to commands, prompts."""
    global _unfinished
    if _unfinished is sys.stdout and _share_a_screen():
        _unfinished = None
        text = "\n" + text
    click.echo(printable(text, keep="\n\t"), nl=newline, err=True)


def _share_a_screen() -> bool:
    """Whether a line on stderr would go on where stdout has stopped."""
    if sys.stderr.isatty():
        return True
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # streams of a test have no number
        return False


def quiet_option(function: Callable[..., Any]) -> Any:
    """`--quiet`: silences `say`, `note` and `status` for the rest of the command."""

    def silence(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[QUIET] = value

    shown = "Show only errors on stderr: no notes, no progress."
    return click.option("--quiet", "-q", is_flag=True, expose_value=False, callback=silence, help=shown)(function)


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def say(text: str = "") -> None:
    """Write to stderr what somebody at the keyboard wants to know."""
    if not _quiet():
        report(text)


def note(text: str) -> None:
    say(f"note: {printable(text)}")


def can_redraw() -> bool:
    """Whether stderr is a terminal that can write over its last line."""
    return sys.stderr.isatty() and env.terminal_type() not in ("dumb", "unknown")


def status(text: str) -> None:
    """Write over the last line of a terminal that `can_redraw`; "" clears it. What is too long is cut, for a terminal
    goes back to the beginning of one line, not of several."""
    if _quiet():
        return
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    text = printable(text)
    if len(text) >= (columns or 80):
        text = text[: (columns or 80) - 2] + "…"
    click.echo(f"\r\033[K{text}", nl=False, err=True)


def failure(message: str, hint: str = "") -> None:
    report(f"error: {printable(message)}")
    if hint:
        report(f"hint: {printable(hint)}")


def document(content: Mapping[str, Any]) -> None:
    """The one JSON document of `--json`. NaN and infinity become null, paths become strings."""
    text = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) if not text.isprintable() else text)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (Sequence, frozenset, set)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def explain(error: BaseException) -> tuple[str, str] | None:
    """(message, hint) of a failure that is no bug of ours; None where the traceback should be seen."""
    if isinstance(error, CodeLlamaError):
        return str(error), error.hint
    if isinstance(error, ImportError):
        known = missing_mlx(error)
        return (str(known), known.hint) if known else None
    if refused := refused_by_system(error):
        return str(refused), refused.hint
    if isinstance(error, UnicodeDecodeError):
        return "the input is not UTF-8 text", "convert it first, for example with iconv -t UTF-8"
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{where}{error.strerror}", ""
    return None


def time_text(seconds: float) -> str:
    """A duration for people: 7 s, 2 min 05 s, 1 h 03 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Lines of name and value, the values below each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{printable(name).ljust(width)}  {printable(str(value))}" for name, value in rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table: columns that hold only numbers or sizes are set to the right."""
    cells = [[printable(str(c)) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [headings, *cells]) for i in range(len(headings))]
    right = [bool(cells) and all(r[i][:1].isdigit() or r[i] in ("", "-") for r in cells) for i in range(len(headings))]
    lines = []
    for row in [list(headings), *cells]:
        line = "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        lines.append(line.rstrip())
    return "\n".join(lines)
