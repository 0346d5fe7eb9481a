"""`mlx-codellama bench`: prefill and decode speed, of a checkpoint or of random weights at a known geometry."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.config import GEOMETRIES, ModelArgs

if TYPE_CHECKING:
    from mlx_codellama.api.speed import Speed
    from mlx_codellama.model import Model
    from mlx_codellama.placement import Placement


@click.command(name="bench")
@click.argument("model", required=False, type=options.ModelName())
@click.option(
    "--geometry", type=click.Choice(list(GEOMETRIES)), help="Random weights with these dimensions: no files needed."
)
@click.option(
    "--bits", type=click.Choice([*options.BITS, "16"]), default="4", show_default=True, help="Of a geometry's weights."
)
@click.option("--group-size", type=click.Choice(options.GROUP_SIZES), default="64", show_default=True)
@options.rope_scaling_option
@options.kv_options
@options.max_context_option
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), help="Compute type.  [default: float32 on a CPU, else 16-bit]"
)
@options.exact_option
@click.option("--prompt", type=options.Tokens(min=1), default=512, show_default=True, help="Tokens to read.")
@click.option("--tokens", type=options.Tokens(min=2), default=64, show_default=True, help="Tokens to write.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Runs; medians are reported.")
@options.json_option
def command(
    model: str | None,
    geometry: str | None,
    bits: str,
    group_size: str,
    prompt: int,
    tokens: int,
    repeat: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Measure prefill and decode speed.

    MODEL is a checkpoint folder or a hub id; without it and without --geometry, the bundled demo. A short run before
    the measured ones warms everything up.
    """
    if model is not None and geometry is not None:
        raise click.UsageError("give MODEL or --geometry, not both")
    context, allowed = prompt + tokens, chosen["max_context"]
    if allowed is not None and context > allowed:
        raise click.UsageError(f"--prompt and --tokens are {context} tokens, --max-context {allowed}")
    from mlx_codellama.cli.checkpoint import name_of
    from mlx_codellama.cli.generation import open_model

    begun = time.monotonic()
    if geometry:
        from mlx_codellama.memory import with_bits

        opened, placement = _random(with_bits(GEOMETRIES[geometry], int(bits), int(group_size)), context, chosen)
    else:
        loaded = open_model({**chosen, "model": model, "max_context": context})
        assert loaded.placement is not None  # `load` decides one
        opened, placement = loaded.model, loaded.placement
    load_s = time.monotonic() - begun
    limit = placement.check_call(context, 0)
    runs = _measured(opened, placement, prompt, tokens, repeat, limit)
    from mlx_codellama.api.speed import median_speed, weights_bytes
    from mlx_codellama.kernels import dispatch

    speed, weights = median_speed(runs), weights_bytes(opened)
    result = {
        "model": f"random {geometry}" if geometry else name_of(model),
        "geometry": geometry,
        **placement.to_dict(),
        "exact": placement.exact,
        "prompt": prompt,
        "tokens": tokens,
        **asdict(speed),
        "planned_bytes": placement.plan(context, most=limit).total_bytes,
        "weights_bytes": weights,
        "weights_bytes_per_s": speed.decode_tok_s * weights,
        "load_s": load_s,
        "paths": dispatch.paths(),
        "runs": [asdict(run) for run in runs],
    }
    if as_json:
        output.document(result)
    else:
        _show(result)


def _random(args: ModelArgs, context: int, chosen: dict[str, Any]) -> tuple[Model, Placement]:
    """A random model; says first what it will take. Raises MemoryBudgetError if that is more than there is."""
    from mlx_codellama.loader import random_model
    from mlx_codellama.placement import place

    storage, args = options.kv_storage(chosen), options.stretched(args, chosen["rope_scaling"])
    placement = place(args, dtype=chosen["dtype"], exact=chosen["exact"], storage=storage).for_loading(context)
    if why := placement.why_slow():
        output.note(why)
    planned = placement.plan_within(context, placement.machine.room_bytes()).total_bytes
    output.say(f"making random weights: {output.bytes_text(planned)} planned in all")
    return random_model(args, placement=placement), placement


def _measured(
    model: Model, placement: Placement, prompt: int, tokens: int, repeat: int, limit: int | None
) -> list[Speed]:
    """The runs, after a short one that warms everything up. limit: tokens of a chunk at most."""
    from mlx_codellama.api.speed import measure_speed
    from mlx_codellama.cli.generation import prefill_meter
    from mlx_codellama.kernels import dispatch

    storage, runs = placement.storage, []
    measure_speed(model, prompt_tokens=min(prompt, 16), tokens=2, storage=storage)
    dispatch.forget_paths()
    for n in range(repeat):
        run = measure_speed(
            model,
            prompt_tokens=prompt,
            tokens=tokens,
            storage=storage,
            seed=n,
            chunk_limit=limit,
            on_prefill=prefill_meter(),
        )
        runs.append(run)
        if repeat > 1:
            output.say(f"run {n + 1}: prefill {run.prefill_tok_s:.1f}, decode {run.decode_tok_s:.2f} tok/s")
    return runs


def _show(result: dict[str, Any]) -> None:
    size = output.bytes_text
    paths = ", ".join(f"{op} {path}" for op, path in result["paths"].items())
    for name, value in (
        ("model", f"{result['model']}, {result['bits']} bits, {size(result['weights_bytes'])} of weights"),
        ("cache", f"{result['kv_bits']} bits"),
        ("prefill", f"{result['prefill_tok_s']:.1f} tok/s ({result['prompt']} tokens, {result['ttft_s']:.2f} s)"),
        ("decode", f"{result['decode_tok_s']:.2f} tok/s, {size(result['weights_bytes_per_s'])}/s of weights"),
        ("peak", f"{size(result['peak_bytes'])} (planned {size(result['planned_bytes'])})"),
        ("backend", f"{result['backend']}: {paths}"),
    ):
        output.data(f"{name.ljust(8)} {value}")
