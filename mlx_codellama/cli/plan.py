"""`mlx-codellama plan`: what a model needs in memory at some bits and context, and what would fit this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.config import BITS, GEOMETRIES, VARIANTS, ModelArgs, parameters_text

if TYPE_CHECKING:
    from mlx_codellama.memory import MachineMemory
    from mlx_codellama.placement import Placement

ALL_BITS = (*BITS, 16)


@click.command(name="plan")
@click.argument("model", required=False, type=options.ModelName())
@click.option(
    "--variant", type=click.Choice(list(VARIANTS)), metavar="NAME", help="A released model, such as 13b-instruct."
)
@click.option("--geometry", type=click.Choice(list(GEOMETRIES)), help="Dimensions alone, as in `bench`.")
@click.option(
    "--bits",
    type=click.Choice([*options.BITS, "16"]),
    help="Bits per weight.  [default: the checkpoint's own; 4 for a variant]",
)
@click.option("--group-size", type=click.Choice(options.GROUP_SIZES), default="64", show_default=True)
@click.option(
    "--context",
    "--max-context",
    "context",
    type=options.Tokens(min=1),
    help="Tokens of prompt and answer.  [default: the model's limit]",
)
@options.rope_scaling_option
@options.kv_options
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), help="Compute type.  [default: float32 on a CPU, else 16-bit]"
)
@click.option(
    "--memory",
    type=options.MEMORY,
    metavar="SIZE",
    help="Plan for this much memory, such as 16GB, instead of this machine's.",
)
@options.json_option
def command(
    model: str | None,
    variant: str | None,
    geometry: str | None,
    bits: str | None,
    group_size: str,
    context: int | None,
    rope_scaling: str | None,
    dtype: str | None,
    memory: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Work out what a model needs in memory, and what would fit.

    MODEL is a folder in any layout that `convert` reads, a hub id (only its config.json is fetched) or the name of a
    variant or geometry; without one, the bundled demo. Nothing is loaded. The total is held against
    MLX_CODELLAMA_MEMORY if it is set, else against a Mac's wired limit, else against the memory of the machine
    or of its NVIDIA GPU.
    """
    from mlx_codellama.memory import with_bits
    from mlx_codellama.placement import Machine, place

    name, args = _named(model, variant, geometry)
    if bits or name in VARIANTS or name in GEOMETRIES:
        args = with_bits(args, int(bits or 4), int(group_size))
    args = options.stretched(args, rope_scaling)
    machine, storage = Machine(memory), options.kv_storage(chosen)
    placement = place(args, dtype=dtype, storage=storage, machine=machine)
    limits = machine.memory()
    limit = limits.limit_bytes
    context = context or args.max_position_embeddings
    choices = []
    for width in ALL_BITS:
        other = replace(placement, args=with_bits(args, width, int(group_size)))
        weights = other.plan_within(context, limit).weights_bytes
        choices.append({"bits": width, "weights_bytes": weights, **_verdict(other, context, limit)})
    result = {
        "model": name,
        **_wanted(placement, context, limit),
        "machine_bytes": limits.total_bytes,
        "available_bytes": limits.available_bytes,
        "wired_limit_bytes": limits.wired_limit_bytes,
        "budget_bytes": limits.budget_bytes,
        "limit_bytes": limit,
        "limit": "--memory" if memory else limits.limit_name,
        "choices": choices,
    }
    if as_json:
        output.document(result)
    else:
        _show(result, limits, placement.runtime.native)


def _named(model: str | None, variant: str | None, geometry: str | None) -> tuple[str, ModelArgs]:
    """(name, dimensions) of the one that is given; of the demo if none is."""
    if sum(x is not None for x in (model, variant, geometry)) > 1:
        raise click.UsageError("give one of MODEL, --variant and --geometry")
    if (name := variant or model) in VARIANTS:
        return str(name), VARIANTS[str(name)].args
    if (name := geometry or model) in GEOMETRIES:
        return str(name), GEOMETRIES[str(name)]
    from mlx_codellama.cli.checkpoint import config_of

    return config_of(model)


def _wanted(placement: Placement, context: int, limit: int) -> dict[str, Any]:
    """What was asked for, held as it fits."""
    plan, chosen = placement.plan_within(context, limit), placement.within(context, limit)
    return {
        "parameters": placement.args.n_parameters,
        **placement.to_dict(),
        "value_bytes": placement.runtime.compute_bytes,
        "held_wider": chosen.held_wider,
        "slow": chosen.why_slow(),
        "context": context,
        "weights_bytes": plan.weights_bytes,
        "kv_bytes": plan.kv_bytes,
        "activations_bytes": plan.activations_bytes,
        **_verdict(placement, context, limit),
        "model_context": placement.args.max_position_embeddings,
    }


def _verdict(placement: Placement, context: int, limit: int) -> dict[str, Any]:
    """Whether it fits, and up to which context."""
    total = placement.plan_within(context, limit).total_bytes
    most = max(context, placement.args.max_position_embeddings)
    return {"total_bytes": total, "fits": total <= limit, "largest_context": placement.largest_context(limit, most)}


def _show(result: dict[str, Any], machine: MachineMemory, native: bool) -> None:
    size = output.bytes_text
    title = f"{result['model']}: {parameters_text(result['parameters'])} parameters, {result['bits']} bits, "
    output.data(
        title + f"{result['context']:,} tokens of context, {result['kv_bits']}-bit KV cache, {result['backend']}\n"
    )
    terms = {"weights": "weights", "KV cache": "kv", "activations": "activations", "total": "total"}
    rows = [(name, size(result[f"{term}_bytes"])) for name, term in terms.items()]
    machine_note = f"{size(machine.total_bytes)}, {size(machine.available_bytes)} of it free now"
    rows.append((machine.name.removesuffix(" memory"), machine_note))
    if machine.wired_limit_bytes is not None:
        kind = "macOS's default, estimated" if machine.wired_limit_is_default else "set by iogpu.wired_limit_mb"
        rows.append(("wired limit", f"{size(machine.wired_limit_bytes)} ({kind})"))
    if machine.budget_bytes is not None:
        rows.append((result["limit"], size(machine.budget_bytes)))
    output.data(output.pairs(rows) + "\n")
    for sentence in _sentences(result, machine):
        output.data(sentence)
    rows_of_choices = [
        (
            c["bits"],
            size(c["weights_bytes"]),
            size(c["total_bytes"]),
            "yes" if c["fits"] else "no",
            f"{c['largest_context']:,}" if c["largest_context"] else "-",
        )
        for c in result["choices"]
    ]
    output.data("\n" + output.table(("bits", "weights", "total", "fits", "largest context"), rows_of_choices))
    if native:
        output.data("\nOn this CPU codes of 2 and 3 bits are held as 4, of 5 and 6 as 8, which its kernels take.")


def _sentences(result: dict[str, Any], machine: MachineMemory) -> Iterator[str]:
    """The verdict, and what would help."""
    size, spare = output.bytes_text, result["limit_bytes"] - result["total_bytes"]
    if result["value_bytes"] == 4:
        yield "It computes in float32: what a checkpoint stores in 16 bits takes twice that in memory."
    if result["slow"]:
        yield f"Slow here: {result['slow']}."
    if result["fits"]:
        yield f"It fits, with {size(spare)} to spare."
        if result["total_bytes"] > result["available_bytes"] and machine.budget_bytes is None:
            yield "But less than that is free now: close other programs first."
    else:
        yield f"It does not fit: {size(-spare)} over the {result['limit']}."
        if result["largest_context"]:
            yield f"At these bits {result['largest_context']:,} tokens of context would fit."
        fitting = [c["bits"] for c in result["choices"] if c["fits"]]
        if fitting:
            yield f"At this context {max(fitting)} bits would fit."
        if machine.wired_limit_bytes is not None and result["total_bytes"] < 0.9 * machine.total_bytes:
            megabytes = -(-result["total_bytes"] // 2**20) + 512
            yield f"Or raise the wired limit: sudo sysctl iogpu.wired_limit_mb={megabytes}"
    if result["context"] > result["model_context"]:
        yield f"The model was trained for {result['model_context']:,} tokens; beyond that it is on its own."
