"""`mlx-codellama doctor`: this machine, its MLX, and which kernels run on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output

if TYPE_CHECKING:
    from mlx_codellama.memory import MachineMemory


@click.command(name="doctor")
@click.option("--kernels", is_flag=True, help="Compile and try every GPU kernel again, and show the results.")
@options.json_option
def command(kernels: bool, as_json: bool) -> None:
    """Show this machine, MLX, and which kernels run.

    Runs a tiny 4-bit random model to see which path each operation takes. Exits with 1 if MLX does not work or, with
    --kernels, if a kernel is wrong.
    """
    from mlx_codellama.diagnosis import diagnose
    from mlx_codellama.memory import machine_memory, this_machine

    readings = this_machine()
    memory = machine_memory(readings)
    result, problems = diagnose(readings, memory, kernels=kernels)
    if as_json:
        output.document(result)
    else:
        _show(result, memory)
    for problem, hint in problems:
        output.failure(problem, hint)
    if problems:
        sys.exit(output.EXIT_FAILED)


def _show(result: dict[str, Any], memory: MachineMemory) -> None:
    size = output.bytes_text
    rows = [
        ("mlx-codellama", result["version"]),
        ("chip", f"{result['chip']} ({result['machine']})"),
        ("system", result["os"]),
        ("python", result["python"]),
        *result["packages"].items(),
        ("memory", f"{size(memory.total_bytes)}, {size(memory.available_bytes)} free now"),
    ]
    if memory.wired_limit_bytes is not None:
        kind = "estimated default" if memory.wired_limit_is_default else "iogpu.wired_limit_mb"
        rows.append(("wired limit", f"{size(memory.wired_limit_bytes)} ({kind})"))
    rows += list(result["environment"].items())
    rows.append(("backend", result["backend"] or "none"))
    blas = result["blas"]
    rows.append(("BLAS", f"{'ours: ' + blas['library'] if blas['active'] else 'that of MLX'}; {blas['reason']}"))
    if result["native"]:
        kept = f"used: {result['instruction_set']}, threads: {result['threads']}"
        rows.append(("native kernels", kept if result["instruction_set"] else f"not used: {result['native']}"))
    rows += [(f"  {op}", path) for op, path in result["paths"].items()]
    output.data(output.pairs(rows))
    if "kernels" in result:
        output.data(_kernel_table(result["kernels"]))


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    """One line per kernel; the error of one that passed as a share of what is allowed."""
    if not kernels:
        return "there is no GPU here to run a kernel on"
    return output.pairs([
        (entry["kernel"], f"ok, {entry['worst']:.0%} of the allowed error" if entry["passed"] else entry["error"])
        for entry in kernels
    ])  # fmt: skip
