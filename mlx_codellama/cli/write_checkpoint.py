"""What `convert` and `quantize` share: choose a quantisation, say what it will take, write it, say what it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.progress import bytes_progress
from mlx_codellama.errors import OutputExistsError

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs, Quantization
    from mlx_codellama.weights import Stream

quantisation_options = options.stack(
    click.option(
        "--recipe",
        "-q",
        type=click.Choice(options.RECIPES),
        help="How to quantise; `mixed` keeps embeddings, head and sensitive projections wider.",
    ),
    click.option("--bits", type=click.Choice(options.BITS), help="The same number of bits everywhere."),
    click.option("--group-size", type=click.Choice(options.GROUP_SIZES), help="Input features that share a scale."),
)


def chosen_quantisation(
    args: ModelArgs, recipe: str | None, bits: str | None, group_size: str | None
) -> Quantization | None:
    """None where nothing was asked for. Raises click.UsageError where recipe and bits contradict each other."""
    from mlx_codellama.quant.recipes import recipe as named
    from mlx_codellama.quant.recipes import uniform

    group = int(group_size) if group_size else None
    if recipe:
        return named(recipe, args, group_size=group)
    return uniform(args, int(bits), group_size=group) if bits else None


def check_choice(recipe: str | None, bits: str | None, group_size: str | None) -> None:
    if recipe and bits:
        raise click.UsageError("give --recipe or --bits, not both")
    if group_size and not (recipe or bits):
        raise click.UsageError("--group-size needs --recipe or --bits")


def refuse_existing(out: Path, overwrite: bool, source: str) -> None:
    """Before anything is written. Raises OutputExistsError, also where OUT holds the source or a file of it."""
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists", hint="pass --overwrite to replace it, or name another folder")
    if out.exists() or out.is_symlink():
        from mlx_codellama import weights  # here: it brings MLX

        weights.refuse_source_within(out, Path(source).expanduser())
        weights.refuse_existing(out, overwrite)


def note_left_aside(stream: Stream) -> None:
    """Say which files beside the weights look like weights and were not taken."""
    if aside := list(getattr(stream, "aside", ())):
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        output.note(f"left aside: {', '.join(aside[:3])}{more}")


def write(
    stream: Stream, out: Path, quantization: Quantization | None, *, overwrite: bool, verb: str, run: dict[str, Any]
) -> dict[str, Any]:
    """Write the stream, quantised; returns what there is to report, sizes in bytes."""
    from mlx_codellama.quant.pipeline import apply
    from mlx_codellama.quant.plan import predict
    from mlx_codellama.weights import save

    note_left_aside(stream)
    dtypes = {spec.name: spec.dtype for spec in stream.specs}
    result: dict[str, Any] = {"out": str(out), "parameters": stream.args.n_parameters}
    if stream.args.quantization is None:
        size = predict(stream.args, quantization, dtypes=dtypes)
        predicted, bits_per_weight = size.n_bytes, size.bits_per_weight
    else:
        predicted = sum(spec.nbytes for spec in stream.specs)
        bits_per_weight = 8 * predicted / stream.args.n_parameters
    result |= {"predicted_bytes": predicted, "bits_per_weight": round(bits_per_weight, 4)}
    output.say(
        f"{stream.args.n_parameters:,} parameters, {output.bytes_text(predicted)} to write, "
        f"{bits_per_weight:.3f} bits per weight"
    )
    quantised = apply(quantization, stream)
    begun = time.monotonic()
    with bytes_progress(verb) as progress:
        save(out, quantised, overwrite=overwrite, progress=progress, run=run)
    elapsed = time.monotonic() - begun
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    source = getattr(stream, "total_bytes", predicted)
    result |= {
        "written_bytes": written,
        "source_bytes": source,
        "elapsed_s": round(elapsed, 3),
        "source_bytes_per_s": round(source / elapsed) if elapsed > 0 else None,
        "quantization": quantised.args.quantization.to_dict() if quantised.args.quantization else None,
    }
    if held := _held_bytes(quantised.args):
        result["held_bytes"] = held
    errors = quantised.record.get("quantization", {}).get("tensor_errors")
    if errors:
        worst = max(errors, key=lambda name: float(errors[name]["relative_rms"]))
        result["worst_tensor"] = {"name": worst, "relative_rms": errors[worst]["relative_rms"]}
        result["mean_relative_rms"] = sum(float(e["relative_rms"]) for e in errors.values()) / len(errors)
    return result


def _held_bytes(args: ModelArgs) -> int | None:
    """Bytes of the weights in this machine's memory, where its kernels take codes wider than they are stored."""
    from mlx_codellama.placement import place

    placement = place(args)
    return placement.weights_bytes if placement.held_wider else None


def show(result: dict[str, Any]) -> None:
    size = output.bytes_text
    rate = f", {size(result['source_bytes_per_s'])}/s of source" if result["source_bytes_per_s"] else ""
    output.data(f"wrote {result['out']}")
    output.data(f"size        {size(result['written_bytes'])} (predicted {size(result['predicted_bytes'])})")
    if "held_bytes" in result:
        output.data(f"in memory   {size(result['held_bytes'])} on this CPU (2 and 3 bits held as 4, 5 and 6 as 8)")
    output.data(f"per weight  {result['bits_per_weight']:.3f} bits")
    output.data(f"time        {output.time_text(result['elapsed_s'])}{rate}")
    if "worst_tensor" in result:
        output.data(
            f"error       {100 * result['mean_relative_rms']:.2f} % of the weights' rms on average, "
            f"{100 * result['worst_tensor']['relative_rms']:.2f} % at worst ({result['worst_tensor']['name']})"
        )
