"""`mlx-codellama infill`: fill a hole in a source file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import cache_options
from mlx_codellama.cli.call import STDIN, Call, read_input, stats_option
from mlx_codellama.cli.repo_option import document, repo_options
from mlx_codellama.errors import OutputError, PromptError
from mlx_codellama.hole import FILL_ME, Hole, hole_at, hole_marked
from mlx_codellama.source_file import check_replaceable, read_text, replace_file, split_target, unified_diff

if TYPE_CHECKING:
    from mlx_codellama.api import Completion

WINDOW = ("first_line", "last_line", "first_column", "last_column")  # in a document of --json


@click.command(name="infill")
@click.argument("target", required=False, metavar="[FILE[:LINE[:COL]]]")
@click.option("--whole", is_flag=True, help="Print the whole text, filled.")
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option("--in-place", "-i", is_flag=True, help="Write the filled text back to FILE.")
@click.option("--accept-cut", is_flag=True, help="With --in-place: also write an answer that --max-tokens cut.")
@click.option(
    "--order",
    type=click.Choice(("psm", "spm")),
    default="psm",
    show_default=True,
    help="Choose which part the model reads first: prefix or suffix.",
)
@click.option("--single-line", is_flag=True, help="Stop at the end of the line.")
@repo_options
@options.model_options
@cache_options
@options.sampling_options("infill")
@stats_option
@output.quiet_option
@options.json_option
def command(
    target: str | None,
    whole: bool,
    diff: bool,
    in_place: bool,
    accept_cut: bool,
    order: str,
    single_line: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Fill a hole in a source file.

    The hole is at FILE:LINE:COL, at the end of the line with FILE:LINE, or at the mark <FILL_ME> in FILE or on stdin.
    Lines and columns count from 1, columns count characters. What the model writes there goes to stdout; --whole,
    --diff and --in-place show or write it within the text. With --repo the model reads other files of the project
    first. If the text is too long for the model, it sees the lines around the hole, and a note tells which. Line
    endings and the file's mode are kept. --in-place refuses a file that is read-only or was edited meanwhile, and an
    answer that --max-tokens cut.
    """
    if whole + diff + in_place > 1 and not (diff and in_place):
        raise click.UsageError("give one of --whole, --diff and --in-place (or --diff with --in-place)")
    if accept_cut and not in_place:
        raise click.UsageError("--accept-cut needs --in-place")
    path, hole = _hole(target)
    name = "stdin" if path is None else str(path)
    if in_place:
        if path is None:
            raise click.UsageError("--in-place needs a FILE")
        check_replaceable(path)
    from mlx_codellama.prompts import infill_ids

    call = Call.of(chosen)
    model = call.model
    fitted = call.fit(
        name, path, hole.prefix, hole.suffix, lambda *parts: len(infill_ids(model.tokenizer, *parts, order=order))
    )
    if single_line:
        call.sampling["stop"].append("\n")
    result = call.run(
        lambda **how: model.stream_infill(fitted.prefix, fitted.suffix, order=order, **how),
        live=not (as_json or whole or diff or in_place),
    )
    cut = result.finish_reason == "length"  # in the middle of a character, perhaps: no half ones into a file
    filled = hole.filled(result.text.rstrip("\ufffd") if cut else result.text)
    shown = {"whole": filled} if whole else {"diff": unified_diff(hole.text, filled, name)} if diff else {}
    if not as_json:
        output.data("".join(shown.values()), newline=False)
    refused = None
    if in_place and path is not None:
        refused = _write_back(path, hole, filled, result, accept_cut=accept_cut, shown=diff or as_json)
    if as_json:
        from mlx_codellama.cli.generation import completion_document

        window = {name: getattr(fitted.window, name) for name in WINDOW} | {"lines": fitted.window.n_lines}
        about = {"file": name, "order": order, **completion_document(result), "window": window}
        output.document({**about, **document(fitted.packed), **shown})
    call.end(result)
    if refused is not None:
        raise refused


def _hole(target: str | None) -> tuple[Path | None, Hole]:
    """(the file if there is one, the hole)."""
    if target in (None, "-"):
        text = read_input(STDIN, f"no FILE: name one, or pipe a text with {FILL_ME} in")
        return None, hole_marked(text, "stdin", is_file=False)
    path, line, column = split_target(str(target))
    if not path.exists() or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PromptError(f"{path} {what}", hint="name a target as FILE, FILE:LINE or FILE:LINE:COL")
    text = read_text(path)
    if line is None:
        return path, hole_marked(text, str(path))
    hole = hole_at(text, line, column, str(path))
    if FILL_ME in text:
        output.note(f"{path} holds {FILL_ME}, which is read as text: the hole is in line {line}")
    return path, hole


def _write_back(
    path: Path, hole: Hole, filled: str, result: Completion, *, accept_cut: bool, shown: bool
) -> OutputError | None:
    """Put the filled text into the file. → the error if that was refused, with the completion on stdout.

    shown  stdout has the completion in any case
    """
    try:
        if result.finish_reason == "length" and not accept_cut:
            raise OutputError(
                f"--max-tokens cut the answer, and {path} is as it was",
                hint="allow more tokens, or write it anyway with --accept-cut",
            )
        replace_file(path, filled, was=hole.text)
    except OutputError as error:
        if not shown:
            output.data(result.text, newline=not result.text.endswith("\n"))
        return OutputError(str(error), hint="; ".join(filter(None, (error.hint, "the completion is on stdout"))))
    output.say(f"filled {path}: {output.counted(len(result.text), 'character')}")
    return None
