"""`mlx-codellama infill`: fill a hole in a source file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.context import repo_options
from mlx_codellama.cli.cursor import (
    Hole,
    Window,
    check_replaceable,
    decode,
    hole_at,
    hole_marked,
    read_text,
    replace_file,
    split_lines,
    split_target,
    window,
)
from mlx_codellama.errors import ContextOverflowError, OutputError, PromptError

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama


@click.command(name="infill")
@click.argument("target", required=False, metavar="[FILE[:LINE[:COL]]]")
@click.option("--whole", is_flag=True, help="Print the whole text, filled.")
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option("--in-place", "-i", is_flag=True, help="Write the filled text back to FILE.")
@click.option(
    "--order",
    type=click.Choice(("psm", "spm")),
    default="psm",
    show_default=True,
    help="Which part the model reads first.",
)
@click.option("--single-line", is_flag=True, help="Stop at the end of the line.")
@repo_options
@options.model_options
@cache_options
@options.sampling_options(max_tokens=128)
@click.option("--stats", is_flag=True, help="Say on stderr how long it took.")
@output.quiet_option
@options.json_option
def command(
    target: str | None,
    whole: bool,
    diff: bool,
    in_place: bool,
    order: str,
    single_line: bool,
    repo: Path | None,
    repo_tokens: int,
    stats: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Fill a hole in a source file.

    The hole is at FILE:LINE:COL, at the end of the line with FILE:LINE, or at the mark <FILL_ME> in FILE or on stdin.
    Lines and columns count from 1, columns count characters. What the model writes there goes to stdout, unless
    --whole, --diff or --in-place ask for the text with it. With --repo the model reads other files of the project
    first. A text too long for the model is cut to the lines around the hole, and that is said. Line endings and the
    file's mode are kept. --in-place leaves a file alone that is read-only, or that was edited meanwhile.
    """
    if whole + diff + in_place > 1 and not (diff and in_place):
        raise click.UsageError("give one of --whole, --diff and --in-place (or --diff with --in-place)")
    name, path, hole = _hole(target)
    if in_place and path is None:
        raise click.UsageError("--in-place needs a FILE")
    if in_place and path is not None:
        check_replaceable(path)
    from mlx_codellama.cli import context, generation
    from mlx_codellama.prompts import infill_ids

    kept = KeptCache(chosen)
    model = generation.open_model(chosen)
    kept.open(model)
    sampling = options.sampling(chosen)
    most = model.max_context - sampling["max_tokens"]
    seen = _seen(model, hole, order, sampling["max_tokens"], reserved=min(repo_tokens, most // 2) if repo else 0)
    if not seen.whole:
        output.note(f"{name} is longer than the context; the model sees {seen.span}")
    if single_line:
        sampling["stop"] = [*sampling["stop"], "\n"]
    before, packed = "", None
    if repo is not None:
        before, packed = context.with_repository(
            repo,
            path,
            hole.prefix + hole.suffix,
            lambda part: len(model.tokenizer.encode(part)),
            lambda before: len(infill_ids(model.tokenizer, before + seen.prefix, seen.suffix, order=order)),
            repo_tokens,
            most,
        )
    live = not (as_json or whole or diff or in_place)
    with kept.interruptible() as cancel:
        how = {"order": order, "cancel": cancel, "on_prefill": generation.prefill_meter(), **sampling}
        with model.stream_infill(before + seen.prefix, seen.suffix, **how) as stream:
            for piece in stream:
                if live:
                    output.data(piece, newline=False)
    result = stream.result
    kept.keep_if_interrupted(model, result)
    cut = result.finish_reason == "length"  # in the middle of a character, perhaps: no half ones into a file
    filled = hole.filled(result.text.rstrip("\ufffd") if cut else result.text)
    if live:
        output.end_line()
    generation.note_if_cut(result, sampling["max_tokens"])
    if whole and not as_json:
        output.data(filled, newline=False)
    if diff and not as_json:
        output.data(unified_diff(hole, filled, name), newline=False)
    kept.keep(model, result)
    refused: OutputError | None = None
    if in_place and path is not None:
        try:
            replace_file(path, filled, was=hole.text)
            output.say(f"filled {path}: {len(result.text)} characters")
        except OutputError as error:
            if not (diff or as_json):  # which show the completion already
                output.data(result.text, newline=not result.text.endswith("\n"))
            refused = OutputError(str(error), hint=f"{error.hint}; the completion is on stdout")
    if stats:
        output.report(generation.summary(result))
    if as_json:
        document = {"file": name, "order": order, **generation.completion_document(result)}
        window_names = ("first_line", "last_line", "first_column", "last_column")
        document["window"] = {name: getattr(seen, name) for name in window_names} | {"lines": seen.n_lines}
        if packed is not None:
            document["repository"] = context.document(packed)
        if whole:
            document["whole"] = filled
        if diff:
            document["diff"] = unified_diff(hole, filled, name)
        output.document(document)
    if refused is not None:
        raise refused


def _hole(target: str | None) -> tuple[str, Path | None, Hole]:
    """(name for messages, the file if there is one, the hole)."""
    if target is None or target == "-":
        if sys.stdin.isatty():
            raise click.UsageError("no FILE: name one, or pipe a text with <FILL_ME> in")
        return "stdin", None, hole_marked(decode(sys.stdin.buffer.read(), "stdin"), "stdin", is_file=False)
    path, line, column = split_target(target)
    if not path.exists():
        raise PromptError(f"{path} does not exist", hint="the target is FILE, FILE:LINE or FILE:LINE:COL")
    if path.is_dir():
        raise PromptError(f"{path} is a folder", hint="the target is FILE, FILE:LINE or FILE:LINE:COL")
    text = read_text(path)
    hole = hole_marked(text, str(path)) if line is None else hole_at(text, line, column, str(path))
    return str(path), path, hole


def _seen(model: CodeLlama, hole: Hole, order: str, max_tokens: int, *, reserved: int) -> Window:
    """The part of the text that fits the model's context together with the answer and `reserved` tokens more."""
    from mlx_codellama.prompts import infill_ids

    tokenizer = model.tokenizer
    budget = model.max_context - max_tokens
    if budget < 16:
        raise ContextOverflowError(
            f"{max_tokens} new tokens leave no room in a context of {model.max_context}", hint="lower --max-tokens"
        )
    return window(
        hole.prefix,
        hole.suffix,
        lambda line: len(tokenizer.encode_infilling(line)),
        max(16, budget - reserved),
        lambda prefix, suffix: len(infill_ids(tokenizer, prefix, suffix, order=order)),
    )


def unified_diff(hole: Hole, filled: str, name: str) -> str:
    """What filling changes, as `diff -u` shows it: a patch for the file as it is, mark included."""
    import difflib

    old = split_lines(hole.text)
    shown = name.lstrip("/")
    lines = []
    for line in difflib.unified_diff(old, split_lines(filled), f"a/{shown}", f"b/{shown}"):
        lines.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(lines)
