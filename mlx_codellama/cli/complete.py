"""`mlx-codellama complete`: continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import cache_options
from mlx_codellama.cli.call import STDIN, Call, read_input, stats_option
from mlx_codellama.cli.repo_option import document, repo_options


@click.command(name="complete")
@click.argument("prompt", required=False, type=options.Text())
@click.option(
    "--file",
    "-f",
    type=options.ExistingPath(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read the prompt from this file; if it is too long for the model, its end.",
)
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--literal-infill", is_flag=True, help="Read `<PRE> … <SUF>… <MID>` in the prompt as an infill request.")
@repo_options
@options.model_options
@cache_options
@options.sampling_options("complete")
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: add the log-probability of each token, and of the N likeliest ones.",
)
@stats_option
@output.quiet_option
@options.json_option
def command(
    prompt: str | None,
    file: Path | None,
    echo: bool,
    literal_infill: bool,
    logprobs: int | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Continue a piece of code.

    PROMPT is the text itself; without it (or with -) the prompt is read from --file or stdin. If the text is too long
    for the model, its end is continued, and a note tells so. The continuation is written to stdout as it is generated;
    infill tags that a model writes by itself are left out (--json has them). With --repo the model reads other files of
    the project first.
    """
    _check_options(prompt, file, literal_infill, logprobs, as_json, chosen["repo"])
    if prompt in (None, "-"):
        prompt = read_input(file or STDIN, "no PROMPT: give one, or --file, or pipe a text in")
    from mlx_codellama.cli import generation
    from mlx_codellama.prompts import prompt_ids

    call = Call.of(chosen, logprobs)
    tokenizer, shown, text, packed = call.model.tokenizer, str(prompt), str(prompt), None
    if not literal_infill:
        file = None if file == STDIN else file
        name = "the prompt" if file is None else str(file)
        fitted = call.fit(name, file, text, "", lambda start, _: len(prompt_ids(tokenizer, start)))
        shown, text, packed = fitted.window.prefix, fitted.prefix, fitted.packed
    how: dict[str, Any] = {"literal_infill": literal_infill, "infill_tags": as_json, "logprobs": logprobs}
    result = call.run(
        lambda **more: call.model.stream_complete(text, **how, **more),
        live=not as_json,
        echo=shown if echo else "",
    )
    if as_json:
        output.document({"prompt": shown, **generation.completion_document(result), **document(packed)})
    else:
        generation.note_tags(call.model, result)
    call.end(result)


def _check_options(
    prompt: str | None, file: Path | None, literal_infill: bool, logprobs: int | None, as_json: bool, repo: Path | None
) -> None:
    """Raise click.UsageError for options that exclude each other."""
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if repo is not None and literal_infill:
        raise click.UsageError("--repo does not go with --literal-infill; the command infill takes --repo")
