"""`mlx-codellama complete`: continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.cursor import STDIN, read_text
from mlx_codellama.cli.repo_option import repo_options


@click.command(name="complete")
@click.argument("prompt", required=False, type=options.Text())
@click.option(
    "--file",
    "-f",
    "file",
    type=options.ExistingPath(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read the prompt from a file; of one too long for the model, the end.",
)
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--literal-infill", is_flag=True, help="Read `<PRE> … <SUF>… <MID>` in the prompt as an infill request.")
@repo_options
@options.model_options
@cache_options
@options.sampling_options("complete")
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

    PROMPT is the text itself; without it (or as -) it is read from --file or stdin. Of a text too long for the model
    the end is continued, and that is said. The continuation is written to stdout as it is generated; infill tags that a
    model writes by itself are left out (--json has them). With --repo the model reads other files of the project first.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if repo is not None and literal_infill:
        raise click.UsageError("--repo does not go with --literal-infill; the command infill takes --repo")
    if prompt in (None, "-"):
        prompt = read_text(file or STDIN, "no PROMPT: give one, or --file, or pipe a text in")
    text = str(prompt)
    from mlx_codellama.cli import generation, repo_option

    kept = KeptCache(chosen)
    model = generation.open_model(chosen, logprobs)
    kept.open(model)
    sampling = options.sampling(chosen)
    tokenizer, most = model.tokenizer, model.max_context - sampling["max_tokens"]
    name = "the prompt" if file in (None, STDIN) else str(file)
    shown = text
    if not literal_infill:
        reserved = min(repo_tokens, most // 2) if repo else 0
        shown = generation.seen(
            model, name, text, "", lambda start, _: 1 + len(tokenizer.encode(start)), sampling["max_tokens"], reserved
        ).prefix
    before, packed = "", None
    if repo is not None:
        before, packed = repo_option.with_repository(
            repo,
            None if file == STDIN else file,
            text,
            lambda part: len(tokenizer.encode(part)),
            lambda before: 1 + len(tokenizer.encode(before + shown)),
            repo_tokens,
            most,
        )
    how = {"literal_infill": literal_infill, "infill_tags": as_json, "logprobs": logprobs, **sampling}
    result = generation.run(
        lambda **more: model.stream_complete(before + shown, **how, **more),
        kept,
        model,
        live=not as_json,
        echo=shown if echo else "",
    )
    if as_json:
        document = {"prompt": shown, **generation.completion_document(result)}
        output.document(document if packed is None else document | {"repository": repo_option.document(packed)})
    else:
        generation.note_tags(model, result)
    generation.note_if_cut(result, sampling["max_tokens"])
    kept.keep(model, result)
    if stats:
        output.report(generation.summary(result))
