"""`mlx-codellama convert`: a released checkpoint, in any of its layouts, to the one this package runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output, write_checkpoint

if TYPE_CHECKING:
    from mlx_codellama.convert.verify import VerifyReport
    from mlx_codellama.weights import Checkpoint


@click.command(name="convert")
@click.argument("src", type=options.ModelName())
@click.argument("out", type=click.Path(path_type=Path))
@write_checkpoint.quantisation_options
@click.option(
    "--dtype",
    type=click.Choice(options.DTYPES),
    help="Store what is not quantised in this type.  [default: the source's]",
)
@click.option(
    "--rope-theta",
    type=options.Number(min=1, min_open=True),
    help="Set it if the source does not say: 1000000, or 10000 for 70B Python and Instruct.",
)
@click.option(
    "--variant", metavar="NAME", help="Name the released model that a Meta folder holds, such as 7b-instruct."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Check that every written weight is within the error bound of its quantisation, and write the table to "
    "run.json. This checks what was written, not how SRC was read; quantize --report measures how good the model is.",
)
@write_checkpoint.overwrite_option
@options.json_option
def command(
    src: str,
    out: Path,
    dtype: str | None,
    rope_theta: float | None,
    variant: str | None,
    verify: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Convert a released checkpoint, quantising on the way.

    SRC is a folder with Meta's consolidated.*.pth, with Hugging Face safetensors or pytorch_model*.bin, an MLX
    checkpoint, or a hub id. OUT is a new folder; it appears only once it is complete. Memory does not grow with
    the model.
    """
    job = write_checkpoint.Job(src, out, **chosen)
    from mlx_codellama import convert

    opened = partial(convert.open, job.folder(), rope_theta=rope_theta, variant=variant, dtype=dtype)
    result = job.write(opened(), "convert")
    if not as_json:
        write_checkpoint.show(result)
    report = None
    if verify:
        report = _verify(opened(), job.target)
        result["verify"] = report.to_dict()
        if not as_json:
            _show(report, job.target)
    if as_json:
        output.document(result)
    if report is not None:
        report.raise_if_wrong()


def _verify(source: Checkpoint, out: Path) -> VerifyReport:
    """Compare OUT with the source; the table of every tensor goes to run.json."""
    from mlx_codellama.cli.progress import bytes_progress
    from mlx_codellama.convert.verify import verify

    try:
        with bytes_progress("verify") as progress:
            return verify(source, out, progress=progress)
    except KeyboardInterrupt:
        output.note(f"{out} is complete; it was not verified")
        raise


def _show(report: VerifyReport, out: Path) -> None:
    """One line per kind of tensor, and the verdict."""
    output.data(output.table(("tensors", "stored", "bits", "error", "max error", "wrong"), report.summary()))
    verdict = "every weight is within its error bound" if report.ok else "NOT GOOD"
    output.data(f"verified    {verdict}; every tensor is in {out / 'run.json'}")
