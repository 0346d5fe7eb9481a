"""`mlx-codellama infill`: fill a hole in a source file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.cursor import STDIN, check_replaceable, read_text, replace_file, split_target
from mlx_codellama.cli.repo_option import repo_options
from mlx_codellama.errors import OutputError, PromptError
from mlx_codellama.hole import FILL_ME, Hole, Window, hole_at, hole_marked, split_lines

if TYPE_CHECKING:
    from mlx_codellama.api import Completion
    from mlx_codellama.repository import Packed


@click.command(name="infill")
@click.argument("target", required=False, metavar="[FILE[:LINE[:COL]]]")
@click.option("--whole", is_flag=True, help="Print the whole text, filled.")
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option("--in-place", "-i", is_flag=True, help="Write the filled text back to FILE.")
@click.option("--accept-cut", is_flag=True, help="With --in-place: write an answer that --max-tokens cut, too.")
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
@options.sampling_options("infill")
@click.option("--stats", is_flag=True, help="Say on stderr how long it took.")
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
    file's mode are kept. --in-place leaves a file alone that is read-only or was edited meanwhile, and if --max-tokens
    cut the answer.
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
    from mlx_codellama.cli import generation, repo_option
    from mlx_codellama.prompts import infill_ids

    kept = KeptCache(chosen)
    model = generation.open_model(chosen)
    kept.open(model)
    sampling = options.sampling(chosen)
    tokenizer, most = model.tokenizer, model.max_context - sampling["max_tokens"]

    def n_prompt(prefix: str, suffix: str) -> int:
        return len(infill_ids(tokenizer, prefix, suffix, order=order))

    reserved = min(repo_tokens, most // 2) if repo else 0
    seen = generation.seen(model, name, hole.prefix, hole.suffix, n_prompt, sampling["max_tokens"], reserved)
    if single_line:
        sampling["stop"] = [*sampling["stop"], "\n"]
    before, packed = "", None
    if repo is not None:
        before, packed = repo_option.with_repository(
            repo,
            path,
            hole.prefix + hole.suffix,
            lambda part: len(tokenizer.encode(part)),
            lambda before: n_prompt(before + seen.prefix, seen.suffix),
            repo_tokens,
            most,
        )
    live = not (as_json or whole or diff or in_place)
    result = generation.run(
        lambda **how: model.stream_infill(before + seen.prefix, seen.suffix, order=order, **how, **sampling),
        kept,
        model,
        live=live,
    )
    cut = result.finish_reason == "length"  # in the middle of a character, perhaps: no half ones into a file
    filled = hole.filled(result.text.rstrip("\ufffd") if cut else result.text)
    generation.note_if_cut(result, sampling["max_tokens"])
    patch = unified_diff(hole, filled, name) if diff else ""
    if not as_json:
        output.data(filled if whole else patch, newline=False)
    kept.keep(model, result)
    refused: OutputError | None = None
    if in_place and path is not None:
        refused = _write_back(path, hole, filled, result, may_be_cut=accept_cut, shown=diff or as_json)
    if stats:
        output.report(generation.summary(result))
    if as_json:
        document = {"file": name, "order": order, **_document(result, seen, packed)}
        if whole or diff:
            document["whole" if whole else "diff"] = filled if whole else patch
        output.document(document)
    if refused is not None:
        raise refused


def _hole(target: str | None) -> tuple[Path | None, Hole]:
    """(the file if there is one, the hole)."""
    if target in (None, "-"):
        text = read_text(STDIN, f"no FILE: name one, or pipe a text with {FILL_ME} in")
        return None, hole_marked(text, "stdin", is_file=False)
    path, line, column = split_target(str(target))
    if not path.exists() or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PromptError(f"{path} {what}", hint="the target is FILE, FILE:LINE or FILE:LINE:COL")
    text = read_text(path)
    if line is None:
        return path, hole_marked(text, str(path))
    hole = hole_at(text, line, column, str(path))
    if FILL_ME in text:
        output.note(f"{path} holds {FILL_ME}, which is read as text: the hole is in line {line}")
    return path, hole


def _write_back(
    path: Path, hole: Hole, filled: str, result: Completion, *, may_be_cut: bool, shown: bool
) -> OutputError | None:
    """Put the filled text into the file. → the error if that was refused, with the completion on stdout.

    shown  stdout has the completion in any case
    """
    try:
        if result.finish_reason == "length" and not may_be_cut:
            raise OutputError(
                f"--max-tokens cut the answer, and {path} is as it was",
                hint="allow more tokens, or write it all the same with --accept-cut",
            )
        replace_file(path, filled, was=hole.text)
    except OutputError as error:
        if not shown:
            output.data(result.text, newline=not result.text.endswith("\n"))
        return OutputError(str(error), hint=f"{error.hint}; the completion is on stdout")
    output.say(f"filled {path}: {output.counted(len(result.text), 'character')}")
    return None


def _document(result: Completion, seen: Window, packed: Packed | None) -> dict[str, Any]:
    from mlx_codellama.cli import generation, repo_option

    window_names = ("first_line", "last_line", "first_column", "last_column")
    document = generation.completion_document(result)
    document["window"] = {name: getattr(seen, name) for name in window_names} | {"lines": seen.n_lines}
    return document if packed is None else document | {"repository": repo_option.document(packed)}


def unified_diff(hole: Hole, filled: str, name: str) -> str:
    """What filling changes, as `diff -u` shows it: a patch for the file as it is, mark included."""
    import difflib

    shown = patch_name(name)
    old, new = quoted(f"a/{shown}"), quoted(f"b/{shown}")
    lines = []
    for line in difflib.unified_diff(split_lines(hole.text), split_lines(filled), old, new):
        lines.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(lines)


def patch_name(name: str) -> str:
    """The file's path as a patch names it, for `patch -p1` in this folder: relative if it lies inside, without `..`."""
    real, here = os.path.abspath(name), os.getcwd()
    inside = os.path.relpath(real, here)
    return real.lstrip("/") if inside == os.pardir or inside.startswith(os.pardir + os.sep) else inside


def quoted(name: str) -> str:
    """name in the header of a patch: as git writes it, in quotes if it holds a control code, a quote or a backslash;
    with a tab behind it if it holds a space, at which `patch` would end it."""
    if any(letter < " " or letter in '"\\\x7f' for letter in name):
        escapes = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
        shown = (escapes.get(c, c if c >= " " and c != "\x7f" else f"\\{ord(c):03o}") for c in name)
        return f'"{"".join(shown)}"'
    return name + "\t" * (" " in name)
