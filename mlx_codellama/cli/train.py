"""`train`: full-parameter training from scratch. The first recipe is that of the bundled demo checkpoint."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_codellama.cli import output
from mlx_codellama.cli.options import ExistingPath, json_option
from mlx_codellama.errors import NonFiniteError

if TYPE_CHECKING:
    from mlx_codellama.train.trainer import Report


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--recipe", type=click.Choice(["demo"]), default="demo", show_default=True, help="Choose what to train.")
@click.option(
    "--sources",
    type=ExistingPath(file_okay=False),
    help="Learn from the .py files in this folder.  [default: this Python's standard library]",
)
@click.option("--steps", type=click.IntRange(min=1), required=True, help="Train until this step, of 4096 tokens each.")
@click.option(
    "--decay", type=click.IntRange(min=0), default=0, help="Lower the learning rate over this many final steps."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed the weights and the order of the data.",
)
@json_option
def command(out: Path, recipe: str, sources: Path | None, steps: int, decay: int, seed: int, as_json: bool) -> None:
    """Train a small model from scratch.

    Trains in the folder OUT, and continues there if an earlier call stopped. Ctrl-C ends after the current step and
    saves. The finished model is OUT/model; `quantize` makes it small.
    """
    from mlx_codellama.cli.generation import stop_on_interrupt
    from mlx_codellama.train.demo import export, train_demo
    from mlx_codellama.train.trainer import TrainArgs

    def show(report: Report) -> None:
        held_out = f"  held-out {report.held_out_loss:.4f}" if report.held_out_loss is not None else ""
        left_s = (steps - report.step) * report.tokens / report.step / max(report.tok_s, 1e-9)
        output.say(
            f"step {report.step}/{steps}  loss {report.loss:.4f}{held_out}  {report.tok_s:.0f} tok/s"
            f"  tokens dropped: {report.dropped}  {left_s / 60:.0f} min left"
        )

    with stop_on_interrupt("stopping after this step; the state is saved") as stopped:
        try:
            trainer = train_demo(
                sources or Path(sysconfig.get_path("stdlib")),
                out,
                TrainArgs(steps=steps, decay=decay, seed=seed),
                on_report=show,
                cancel=stopped,
            )
        except FloatingPointError as error:
            raise NonFiniteError(
                f"training diverged: {error}", hint="run the command again; it continues from the last saved state"
            ) from None
        interrupted = stopped()
    if interrupted:
        raise KeyboardInterrupt
    model = export(trainer, out, overwrite=True)
    if as_json:
        output.document({"model": model, "step": trainer.step, "tokens": trainer.tokens})
    else:
        output.say(f"wrote {model}")
