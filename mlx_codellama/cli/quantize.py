"""`mlx-codellama quantize`: quantise a checkpoint that is converted already, and measure what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_codellama.cli import options, output, write_checkpoint


@click.command(name="quantize")
@click.argument("model", type=options.ModelName())
@click.argument("out", type=click.Path(path_type=Path))
@write_checkpoint.quantisation_options
@click.option(
    "--report",
    type=options.ExistingPath(dir_okay=False),
    metavar="TEXTFILE",
    help="Measure KL and perplexity on this text.",
)
@write_checkpoint.overwrite_option
@options.json_option
def command(model: str, out: Path, report: Path | None, as_json: bool, **chosen: Any) -> None:
    """Quantise a converted checkpoint and measure what it costs.

    MODEL is an unquantised checkpoint folder (or a hub id), OUT a new folder. Without --recipe or --bits: q4.
    """
    job = write_checkpoint.Job(model, out, **chosen)
    if not job.bits:
        job.recipe = job.recipe or "q4"
    from mlx_codellama.errors import PromptError
    from mlx_codellama.source_file import read_text
    from mlx_codellama.tokenizer import Tokenizer
    from mlx_codellama.weights import Checkpoint

    text = read_text(report) if report else None
    folder = job.folder()
    stream = Checkpoint.open(folder)
    if text is not None and not Tokenizer.load(folder).encode(text):
        raise PromptError(f"{report} is empty: there is nothing to measure on", hint="give a text file")
    result = job.write(stream, "quantize")
    if not as_json:
        write_checkpoint.show(result)
    if text is not None:
        result["report"] = _compare(folder, job.target, text)
        if not as_json:
            _show(result["report"])
    if as_json:
        output.document(result)


def _compare(reference: Path, quantised: Path, text: str) -> dict[str, Any]:
    """KL, perplexity and agreement of two checkpoints on a text; both are in memory at once."""
    from mlx_codellama import load
    from mlx_codellama.cli.generation import note_widening
    from mlx_codellama.quant.report import compare

    output.say("measuring on the text …")
    note_widening(reference, None)
    truth, model = load(reference, exact=True), load(quantised, exact=True)
    tokenizer = truth.tokenizer
    window = min(512, truth.args.max_position_embeddings - 1)
    ids = tokenizer.encode(text)
    return compare(truth.logits, model.logits, ids, window=window, bos=tokenizer.bos_id).to_dict()


def _show(report: dict[str, Any]) -> None:
    rows = [
        ("tokens", f"{report['n_tokens']:,}"),
        ("KL", f"{report['mean_kl']:.5f} nats on average, {report['max_kl']:.4f} at worst"),
        ("perplexity", f"{report['reference_perplexity']:.4f} before, {report['model_perplexity']:.4f} after"),
        ("same top-1", f"{100 * report['top1_agreement']:.2f} %"),
    ]
    output.data(output.pairs(rows))
