"""What `convert` and `quantize` share: choose a quantisation, say what it will take, write it, say what it took."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.progress import bytes_progress
from mlx_codellama.config import RECIPES
from mlx_codellama.errors import OutputExistsError

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs, Quantization
    from mlx_codellama.weights import Stream

quantisation_options = options.stack(
    click.option(
        "--recipe", "-q", type=click.Choice(list(RECIPES)),
        help="Choose how to quantise; `mixed` keeps embeddings, head and sensitive projections wider.",
    ),
    click.option("--bits", type=click.Choice(options.BITS), help="Use this many bits everywhere."),
    click.option("--group-size", type=click.Choice(options.GROUP_SIZES), help="Input features that share a scale."),
)  # fmt: skip

overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace OUT, a model folder that was written here and holds nothing else."
)


@dataclass
class Job:
    """What to write: source and out as they were named, and the options above."""

    source: str
    out: Path
    overwrite: bool
    recipe: str | None
    bits: str | None
    group_size: str | None

    def __post_init__(self) -> None:
        """Raises click.UsageError for options that exclude each other."""
        if self.recipe and self.bits:
            raise click.UsageError("give --recipe or --bits, not both")
        if self.group_size and not (self.recipe or self.bits):
            raise click.UsageError("--group-size needs --recipe or --bits")
        self.target = Path(os.path.abspath(self.out))  # the folder this runs in may be the one that is replaced

    def folder(self) -> Path:
        """The source's folder, fetched if need be. Raises OutputExistsError if OUT must not be replaced, or holds the
        source or a file of it: before anything is fetched, and once more for the files in a hub's cache, which may be
        links into OUT."""
        from mlx_codellama.cli.checkpoint import folder_of

        self._check_target(Path(self.source).expanduser())
        folder = Path(os.path.abspath(folder_of(self.source)))
        self._check_target(folder)
        return folder

    def _check_target(self, source: Path) -> None:
        if self.target.exists() and not self.overwrite:
            raise OutputExistsError(f"{self.out} exists", hint="pass --overwrite to replace it, or name another folder")
        if self.target.exists() or self.target.is_symlink():
            from mlx_codellama import weights  # here: it brings MLX

            weights.refuse_source_within(self.target, source)
            weights.refuse_existing(self.target, self.overwrite)

    def quantization(self, args: ModelArgs) -> Quantization | None:
        """None if no quantisation was asked for."""
        from mlx_codellama.quant.recipes import recipe, uniform

        group = int(self.group_size) if self.group_size else None
        if self.recipe:
            return recipe(self.recipe, args, group_size=group)
        return uniform(args, int(self.bits), group_size=group) if self.bits else None

    def write(self, stream: Stream, verb: str) -> dict[str, Any]:
        """Write the stream, quantised. → what there is to report, sizes in bytes."""
        from mlx_codellama.quant.pipeline import apply
        from mlx_codellama.weights import save

        note_left_aside(stream)
        quantization = self.quantization(stream.args)
        predicted, bits_per_weight = _predicted(stream, quantization)
        output.say(
            f"{stream.args.n_parameters:,} parameters, {output.bytes_text(predicted)} to write, "
            f"{bits_per_weight:.3f} bits per weight"
        )
        quantised = apply(quantization, stream)
        run = {"command": ["mlx-codellama", *sys.argv[1:]], "input": self.source}
        begun = time.monotonic()
        with bytes_progress(verb) as progress:
            save(self.target, quantised, overwrite=self.overwrite, progress=progress, run=run)
        elapsed = time.monotonic() - begun
        source = getattr(stream, "total_bytes", predicted)
        result = {
            "out": str(self.out),
            "source": self.source,
            "parameters": stream.args.n_parameters,
            "predicted_bytes": predicted,
            "bits_per_weight": round(bits_per_weight, 4),
            "written_bytes": sum(file.stat().st_size for file in self.target.glob("*.safetensors")),
            "source_bytes": source,
            "elapsed_s": round(elapsed, 3),
            "source_bytes_per_s": round(source / elapsed) if elapsed > 0 else None,
            "quantization": quantised.args.quantization.to_dict() if quantised.args.quantization else None,
        }
        if held := _held_bytes(quantised.args):
            result["held_bytes"] = held
        return result | _errors(quantised.record.get("quantization", {}).get("tensor_errors"))


def note_left_aside(stream: Stream) -> None:
    """Tell which files beside the weights look like weights and were not taken."""
    if aside := list(getattr(stream, "aside", ())):
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        output.note(f"left aside: {', '.join(aside[:3])}{more}")


def _predicted(stream: Stream, quantization: Quantization | None) -> tuple[int, float]:
    """(bytes to write, bits per weight). What is quantised already is copied."""
    from mlx_codellama.quant.plan import predict

    if stream.args.quantization is None:
        size = predict(stream.args, quantization, dtypes={spec.name: spec.dtype for spec in stream.specs})
        return size.n_bytes, size.bits_per_weight
    n_bytes = sum(spec.nbytes for spec in stream.specs)
    return n_bytes, 8 * n_bytes / stream.args.n_parameters


def _errors(errors: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """The worst and the mean relative error of the tensors that were quantised."""
    if not errors:
        return {}
    relative = {name: float(error["relative_rms"]) for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    return {
        "worst_tensor": {"name": worst, "relative_rms": errors[worst]["relative_rms"]},
        "mean_relative_rms": sum(relative.values()) / len(relative),
    }


def _held_bytes(args: ModelArgs) -> int | None:
    """Bytes of the weights in this machine's memory, where its kernels take codes wider than they are stored."""
    from mlx_codellama.placement import place

    placement = place(args)
    return placement.weights_bytes if placement.held_wider else None


def show(result: dict[str, Any]) -> None:
    size = output.bytes_text
    rate = f", {size(result['source_bytes_per_s'])}/s of source" if result["source_bytes_per_s"] else ""
    rows = [("size", f"{size(result['written_bytes'])} (predicted {size(result['predicted_bytes'])})")]
    if "held_bytes" in result:
        held = size(result["held_bytes"])
        rows.append(("in memory", f"{held} on this CPU (2 and 3 bits held as 4, 5 and 6 as 8)"))
    rows.append(("per weight", f"{result['bits_per_weight']:.3f} bits"))
    rows.append(("time", f"{output.time_text(result['elapsed_s'])}{rate}"))
    if "worst_tensor" in result:
        mean, worst = 100 * result["mean_relative_rms"], result["worst_tensor"]
        at_worst = f"{100 * worst['relative_rms']:.2f} % at worst ({worst['name']})"
        rows.append(("error", f"{mean:.2f} % of the weights' rms on average, {at_worst}"))
    output.data(f"wrote {result['out']}")
    output.data(output.pairs(rows))
