"""`mlx-codellama plan`: what a model needs in memory at some bits and context, and what would fit this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.config import BITS, GEOMETRIES, VARIANTS, ModelArgs, parameters_text

if TYPE_CHECKING:
    from mlx_codellama.memory import MachineMemory, MemoryPlan, Runtime
    from mlx_codellama.storage import KVStorage

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
    MLX_CODELLAMA_MEMORY where it is set, else against a Mac's wired limit, else against the memory of the machine
    or of its NVIDIA GPU.
    """
    from mlx_codellama import memory as memory_plan
    from mlx_codellama.cli.checkpoint import config_of

    if sum(x is not None for x in (model, variant, geometry)) > 1:
        raise click.UsageError("give one of MODEL, --variant and --geometry")
    if model in VARIANTS:
        model, variant = None, model
    elif model in GEOMETRIES:
        model, geometry = None, model
    if variant or geometry:
        name = variant or str(geometry)
        args = VARIANTS[name].args if variant else GEOMETRIES[name]
        args = memory_plan.with_bits(args, int(bits or 4), int(group_size))
    else:
        name, args = config_of(model)
        if bits:
            args = memory_plan.with_bits(args, int(bits), int(group_size))
    args = options.stretched(args, rope_scaling)
    runtime = runtime_here(args, dtype)
    machine = machine_here(memory)
    context = context or args.max_position_embeddings
    storage = options.kv_storage(chosen)

    limit = machine.limit_bytes

    def planned(args: ModelArgs, tokens: int) -> memory_plan.MemoryPlan:
        """With chunks of the prompt as small as need be."""
        here = runtime_here(args, dtype)

        def at_most(chunk: int | None) -> memory_plan.MemoryPlan:
            return memory_plan.plan(args, tokens, storage=storage, runtime=here.limited(chunk))

        found = at_most(memory_plan.chunk_limit(at_most, limit))
        if found.total_bytes > limit and here.native and memory_plan.has_other_codes(args):
            here = runtime_here(args, dtype, wide=False)  # as `load` does then
            found = at_most(memory_plan.chunk_limit(at_most, limit))
        return found

    wanted = planned(args, context)
    most = max(context, args.max_position_embeddings)
    choices = []
    for width in ALL_BITS:
        other = memory_plan.with_bits(args, width, int(group_size))
        largest = memory_plan.largest_context(lambda n, other=other: planned(other, n), limit, most)  # type: ignore[misc]
        at = planned(other, context)
        choices.append(
            {
                "bits": width,
                "weights_bytes": at.weights_bytes,
                "total_bytes": at.total_bytes,
                "fits": at.total_bytes <= limit,
                "largest_context": largest,
            }
        )
    result: dict[str, Any] = {
        "model": name,
        "parameters": args.n_parameters,
        "bits": model_bits(args),
        "context": context,
        "kv_bits": kv_bits(storage, args, dtype),
        "window": storage.window,
        "rope_scaling": args.rope_scaling.to_dict() if args.rope_scaling else None,
        "backend": runtime.name,
        "value_bytes": runtime.compute_bytes,
        "held_wider": (held_wider := _held_wider(args, runtime, wanted)),
        "slow": _slow(args, held_wider is not False),
        "weights_bytes": wanted.weights_bytes,
        "kv_bytes": wanted.kv_bytes,
        "activations_bytes": wanted.activations_bytes,
        "total_bytes": wanted.total_bytes,
        "machine_bytes": machine.total_bytes,
        "available_bytes": machine.available_bytes,
        "wired_limit_bytes": machine.wired_limit_bytes,
        "budget_bytes": machine.budget_bytes,
        "limit_bytes": limit,
        "limit": "--memory" if memory else machine.limit_name,
        "fits": wanted.total_bytes <= limit,
        "largest_context": memory_plan.largest_context(lambda n: planned(args, n), limit, most),
        "model_context": args.max_position_embeddings,
        "choices": choices,
    }
    if as_json:
        output.document(result)
        return
    _show(result, machine, runtime.native)


def _slow(args: ModelArgs, wide: bool) -> str:
    """Why this machine multiplies slower than it could; empty where it does not, or where MLX is absent."""
    try:
        from mlx_codellama.loader import why_slow
    except ImportError:
        return ""
    return why_slow(args, wide)


def _held_wider(args: ModelArgs, runtime: Runtime, wanted: MemoryPlan) -> bool | None:
    """Whether codes that the native CPU kernels do not multiply by are held wider; None where there are none."""
    from mlx_codellama.memory import has_other_codes, weights_bytes

    if not (runtime.native and has_other_codes(args)):
        return None
    return wanted.weights_bytes == weights_bytes(args, compute_bytes=runtime.compute_bytes, native=True)


def runtime_here(args: ModelArgs, dtype: str | None, *, wide: bool = True) -> Runtime:
    """How this machine would run the model; guessed from the platform where MLX is absent."""
    import platform
    from dataclasses import replace

    from mlx_codellama.memory import CPU, GPU

    on_mac = platform.system() == "Darwin"
    runtime = replace(GPU, name="metal") if on_mac else CPU
    try:
        from mlx_codellama.api.budget import runtime_of
    except ImportError:
        pass
    else:
        return runtime_of(args, dtype, wide=wide)
    return replace(runtime, compute_bytes=4 if dtype == "float32" else 2) if dtype else runtime


def machine_here(budget: str | None) -> MachineMemory:
    """The memory that a plan is held against; the machine's where MLX is absent."""
    from mlx_codellama.memory import machine_memory

    try:
        from mlx_codellama.api import budget as api
    except ImportError:
        return machine_memory(budget=budget)
    return api.machine_here(budget)


def kv_bits(storage: KVStorage, args: ModelArgs, dtype: str | None) -> int | str:
    """Bits of stored keys and values, "8/4" where they differ; without a choice those of the activations here."""
    if storage.bits is None:
        return 8 * runtime_here(args, dtype).compute_bytes
    keys, values = storage.bits
    return keys if keys == values else f"{keys}/{values}"


def model_bits(args: ModelArgs) -> int | str:
    """Bits per weight, or "mixed"."""
    if args.quantization is None:
        return 16
    return "mixed" if any(args.quantization.overrides.values()) else args.quantization.default.bits


def _show(result: dict[str, Any], machine: MachineMemory, native: bool) -> None:
    size = output.bytes_text
    title = f"{result['model']}: {parameters_text(result['parameters'])} parameters, {result['bits']} bits, "
    output.data(
        title + f"{result['context']:,} tokens of context, {result['kv_bits']}-bit KV cache, {result['backend']}\n"
    )
    rows: list[tuple[str, str]] = [
        ("weights", size(result["weights_bytes"])),
        ("KV cache", size(result["kv_bytes"])),
        ("activations", size(result["activations_bytes"])),
        ("total", size(result["total_bytes"])),
    ]
    machine_note = f"{size(machine.total_bytes)}, {size(machine.available_bytes)} of it free now"
    rows.append((machine.name.removesuffix(" memory"), machine_note))
    if machine.wired_limit_bytes is not None:
        kind = "macOS's default, estimated" if machine.wired_limit_is_default else "set by iogpu.wired_limit_mb"
        rows.append(("wired limit", f"{size(machine.wired_limit_bytes)} ({kind})"))
    if machine.budget_bytes is not None:
        rows.append((result["limit"], size(machine.budget_bytes)))
    output.data(output.pairs(rows))
    spare = result["limit_bytes"] - result["total_bytes"]
    output.data("")
    if result["value_bytes"] == 4:
        output.data("It computes in float32: what a checkpoint stores in 16 bits takes twice that in memory.")
    if result["slow"]:
        output.data(f"Slow here: {result['slow']}.")
    if result["fits"]:
        output.data(f"It fits, with {size(spare)} to spare.")
        if result["total_bytes"] > result["available_bytes"] and machine.budget_bytes is None:
            output.data("But less than that is free now: close other programs first.")
    else:
        output.data(f"It does not fit: {size(-spare)} over the {result['limit']}.")
        if result["largest_context"]:
            output.data(f"At these bits {result['largest_context']:,} tokens of context would fit.")
        fitting = [c["bits"] for c in result["choices"] if c["fits"]]
        if fitting:
            output.data(f"At this context {max(fitting)} bits would fit.")
        if machine.wired_limit_bytes is not None and result["total_bytes"] < 0.9 * machine.total_bytes:
            megabytes = -(-result["total_bytes"] // 2**20) + 512
            output.data(f"Or raise the wired limit: sudo sysctl iogpu.wired_limit_mb={megabytes}")
    if result["context"] > result["model_context"]:
        output.data(f"The model was trained for {result['model_context']:,} tokens; beyond that it is on its own.")
    output.data("")
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
    output.data(output.table(("bits", "weights", "total", "fits", "largest context"), rows_of_choices))
    if native:
        output.data("\nOn this CPU codes of 2 and 3 bits are held as 4, of 5 and 6 as 8, which its kernels take.")
