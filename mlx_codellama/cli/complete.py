"""`mlx-codellama complete`: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.context import repo_options


@click.command(name="complete")
@click.argument("prompt", required=False, type=options.Text())
@click.option(
    "--file",
    "-f",
    "file",
    type=options.ExistingPath(dir_okay=False),
    metavar="FILE",
    help="Read the prompt from a file.",
)
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--literal-infill", is_flag=True, help="Read `<PRE> … <SUF>… <MID>` in the prompt as an infill request.")
@repo_options
@options.model_options
@cache_options
@options.sampling_options(max_tokens=128)
@click.option(
    "--logprobs", type=click.IntRange(min=0), help="With --json: log-probabilities, and of the N likeliest too."
)
@click.option("--stats", is_flag=True, help="Say on stderr how long it took.")
@output.quiet_option
@options.json_option
def command(
    prompt: str | None,
    file: Path | None,
    echo: bool,
    literal_infill: bool,
    repo: Path | None,
    repo_tokens: int,
    logprobs: int | None,
    stats: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Continue a piece of code.

    PROMPT is the text itself; without it, --file or stdin. The continuation is written to stdout as it is generated;
    infill tags that a model writes by itself are left out (--json has them).
    With --repo the model reads other files of the project first.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if repo is not None and literal_infill:
        raise click.UsageError("--repo does not go with --literal-infill; the command infill takes --repo")
    text = _text(prompt, file)
    from mlx_codellama.cli import context, generation

    kept = KeptCache(chosen)
    model = generation.open_model(chosen, logprobs)
    kept.open(model)
    sampling = options.sampling(chosen)
    before, packed = "", None
    if repo is not None:
        before, packed = context.with_repository(
            repo,
            file,
            text,
            lambda part: len(model.tokenizer.encode(part)),
            lambda before: len(model.tokenizer.encode(before + text)) + 1,
            repo_tokens,
            model.max_context - sampling["max_tokens"],
        )
    with kept.interruptible() as cancel:
        stream = model.stream_complete(
            before + text,
            literal_infill=literal_infill,
            infill_tags=as_json,
            logprobs=logprobs,
            cancel=cancel,
            on_prefill=generation.prefill_meter(),
            **sampling,
        )
        if echo and not as_json:
            output.data(text, newline=False)
        with stream:
            for piece in stream:
                if not as_json:
                    output.data(piece, newline=False)
    kept.keep_if_interrupted(model, stream.result)
    if as_json:
        document = {"prompt": text, **generation.completion_document(stream.result)}
        output.document(document if packed is None else document | {"repository": context.document(packed)})
    else:
        output.end_line()
        generation.note_tags(model, stream.result)
    generation.note_if_cut(stream.result, sampling["max_tokens"])
    kept.keep(model, stream.result)
    if stats:
        output.report(generation.summary(stream.result))


def _text(prompt: str | None, file: Path | None) -> str:
    from mlx_codellama.cli.cursor import decode, read_text

    if prompt is not None:
        return prompt
    if file is not None:
        return read_text(file)
    if sys.stdin.isatty():
        raise click.UsageError("no PROMPT: give one, or --file, or pipe a text in")
    return decode(sys.stdin.buffer.read(), "stdin")
