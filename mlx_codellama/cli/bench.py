"""`mlx-codellama bench`: prefill and decode speed, of a checkpoint or of random weights at a known geometry."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.config import GEOMETRIES, ModelArgs

if TYPE_CHECKING:
    from mlx_codellama.api.budget import Budget
    from mlx_codellama.model import Model
    from mlx_codellama.storage import KVStorage


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
    rope_scaling: str | None,
    max_context: int | None,
    dtype: str | None,
    exact: bool,
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
    if max_context is not None and prompt + tokens > max_context:
        raise click.UsageError(f"--prompt and --tokens are {prompt + tokens} tokens, --max-context {max_context}")
    storage = options.kv_storage(chosen)
    from mlx_codellama.cli.checkpoint import name_of
    from mlx_codellama.cli.plan import kv_bits, model_bits
    from mlx_codellama.memory import with_bits

    begun = time.monotonic()
    if geometry:
        args = options.stretched(with_bits(GEOMETRIES[geometry], int(bits), int(group_size)), rope_scaling)
        loaded, budget, limit = _random(args, dtype, exact, prompt + tokens, storage)
    else:
        loaded, budget, limit = _load(model, dtype, exact, rope_scaling, prompt + tokens, storage)
    load_s = time.monotonic() - begun
    from mlx_codellama.api.speed import measure_speed, weights_bytes
    from mlx_codellama.cli.generation import prefill_meter
    from mlx_codellama.kernels import dispatch

    measure_speed(loaded, prompt_tokens=min(prompt, 16), tokens=2, storage=storage)
    dispatch.forget_paths()
    runs = []
    for n in range(repeat):
        run = measure_speed(
            loaded,
            prompt_tokens=prompt,
            tokens=tokens,
            storage=storage,
            seed=n,
            chunk_limit=limit,
            on_prefill=prefill_meter(),
        )
        runs.append(run)
        if repeat > 1:
            output.say(f"run {n + 1}: prefill {runs[-1].prefill_tok_s:.1f}, decode {runs[-1].decode_tok_s:.2f} tok/s")
    weights = weights_bytes(loaded)
    decode = statistics.median(run.decode_tok_s for run in runs)
    result: dict[str, Any] = {
        "model": f"random {geometry}" if geometry else name_of(model),
        "geometry": geometry,
        "bits": model_bits(loaded.args),
        "kv_bits": kv_bits(storage, loaded.args, dtype),
        "window": storage.window,
        "rope_scaling": loaded.args.rope_scaling.to_dict() if loaded.args.rope_scaling else None,
        "exact": exact,
        "prompt": prompt,
        "tokens": tokens,
        "prefill_tok_s": statistics.median(run.prefill_tok_s for run in runs),
        "decode_tok_s": decode,
        "ttft_s": statistics.median(run.ttft_s for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "planned_bytes": budget.plan(prompt + tokens, most=limit).total_bytes,
        "weights_bytes": weights,
        "weights_bytes_per_s": decode * weights,
        "load_s": load_s,
        "backend": dispatch.backend(),
        "paths": dispatch.paths(),
        "runs": [asdict(run) for run in runs],
    }
    if as_json:
        output.document(result)
    else:
        _show(result)


def _load(
    model: str | None, dtype: str | None, exact: bool, scaling: str | None, context: int, storage: KVStorage
) -> tuple[Model, Budget, int | None]:
    from mlx_codellama import load
    from mlx_codellama.api.budget import Budget
    from mlx_codellama.cli.checkpoint import folder_of
    from mlx_codellama.cli.generation import note_widening
    from mlx_codellama.weights import Checkpoint

    folder = folder_of(model)
    note_widening(folder, dtype)
    budget = Budget(options.stretched(Checkpoint.open(folder).args, scaling), storage, dtype)
    limit = budget.check_load(context)
    loaded = load(
        folder,
        dtype=dtype,
        exact=exact,
        max_context=context,
        kv_bits=storage.bits,
        window=storage.window,
        sinks=storage.sinks,
        rope_scaling=scaling,
    )
    return loaded.model, budget, limit


def _random(
    args: ModelArgs, dtype: str | None, exact: bool, context: int, storage: KVStorage
) -> tuple[Model, Budget, int | None]:
    """A random model; says first what it will take. Raises MemoryBudgetError where that is more than there is."""
    from mlx_codellama.api.budget import Budget
    from mlx_codellama.loader import random_model, why_slow

    budget = Budget(args, storage, dtype)
    limit = budget.check_load(context)
    planned = budget.plan(context, most=limit).total_bytes
    if why := why_slow(args, budget.wide):
        output.note(why)
    output.say(f"making random weights: {output.bytes_text(planned)} planned in all")
    return random_model(args, dtype=dtype, exact=exact, wide=budget.wide), budget, limit


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
