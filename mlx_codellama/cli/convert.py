"""`mlx-codellama convert`: a released checkpoint, in any of its layouts, to the one this package runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_codellama.cli import options, output, write_checkpoint


@click.command(name="convert")
@click.argument("src", type=options.ModelName())
@click.argument("out", type=click.Path(path_type=Path))
@write_checkpoint.quantisation_options
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), help="Type of what is not quantised.  [default: the source's]"
)
@click.option(
    "--rope-theta",
    type=options.Number(min=1, min_open=True),
    help="Where the source does not say: 1000000, or 10000 for 70B Python and Instruct.",
)
@click.option("--variant", metavar="NAME", help="Which released model a Meta folder holds, such as 7b-instruct.")
@click.option(
    "--verify",
    is_flag=True,
    help="Hold every weight that was written to the bound of its quantisation, and keep the table in run.json. It "
    "proves the writing, not the reading, which is the same on both sides; how good the model still is, quantize "
    "--report measures.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT, a model folder that was written here and holds nothing else."
)
@options.json_option
def command(
    src: str,
    out: Path,
    recipe: str | None,
    bits: str | None,
    group_size: str | None,
    dtype: str | None,
    rope_theta: float | None,
    variant: str | None,
    verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert a released checkpoint, quantising on the way.

    SRC is a folder with Meta's consolidated.*.pth, with Hugging Face safetensors or pytorch_model*.bin, an MLX
    checkpoint, or a hub id. OUT is a new folder; it appears only once it is complete. Memory does not grow with
    the model.
    """
    write_checkpoint.check_choice(recipe, bits, group_size)
    shown, out = out, Path(os.path.abspath(out))  # the folder this runs in may be the one that is replaced
    write_checkpoint.refuse_existing(out, overwrite, src)
    from mlx_codellama import convert
    from mlx_codellama.cli.checkpoint import folder_of

    folder = Path(os.path.abspath(folder_of(src)))
    write_checkpoint.refuse_existing(out, overwrite, str(folder))  # what a hub's cache holds may be links into OUT
    stream = convert.open(folder, rope_theta=rope_theta, variant=variant, dtype=dtype)
    quantization = write_checkpoint.chosen_quantisation(stream.args, recipe, bits, group_size)
    run = {"command": ["mlx-codellama", *sys.argv[1:]], "input": src}
    result = write_checkpoint.write(stream, out, quantization, overwrite=overwrite, verb="convert", run=run)
    result |= {"source": src, "out": str(shown)}
    if not as_json:
        write_checkpoint.show(result)
    raise_if_wrong = None
    if verify:
        result["verify"], raise_if_wrong = _verify(folder, out, rope_theta, variant, dtype, show=not as_json)
    if as_json:
        output.document(result)
    if raise_if_wrong is not None:
        raise_if_wrong()


def _verify(
    folder: Path,
    out: Path,
    rope_theta: float | None,
    variant: str | None,
    dtype: str | None,
    *,
    show: bool,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Compare OUT with the source; the table of every tensor goes to run.json, one line per kind to stdout.

    → the report, and what raises where it is bad
    """
    from mlx_codellama import convert
    from mlx_codellama.cli.progress import bytes_progress
    from mlx_codellama.convert.verify import verify

    source = convert.open(folder, rope_theta=rope_theta, variant=variant, dtype=dtype)
    try:
        with bytes_progress("verify") as progress:
            report = verify(source, out, progress=progress)
    except KeyboardInterrupt:
        output.note(f"{out} is complete; it was not verified")
        raise
    if show:
        output.data(output.table(("tensors", "stored", "bits", "error", "max error", "wrong"), report.summary()))
        verdict = "every weight is where its bits can put it" if report.ok else "NOT GOOD"
        output.data(f"verified    {verdict}; every tensor is in {out / 'run.json'}")
    return report.to_dict(), report.raise_if_wrong
