"""`mlx-codellama doctor`: this machine, its MLX, and which kernels run on it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.errors import CodeLlamaError, missing_mlx

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs
    from mlx_codellama.memory import MachineMemory, Readings

PACKAGES = (
    "mlx",
    "mlx-metal",
    "mlx-cpu",
    "mlx-cuda-13",
    "mlx-cuda-12",
    "mlx-codellama-cpu",
    "scipy-openblas32",
    "numpy",
    "sentencepiece",
)


@click.command(name="doctor")
@click.option("--kernels", is_flag=True, help="Compile and try every GPU kernel again, and show what was found.")
@options.json_option
def command(kernels: bool, as_json: bool) -> None:
    """Show this machine, MLX, and which kernels run.

    Runs a tiny 4-bit random model to see which path each operation takes. Exits 1 where MLX does not work, or with
    --kernels where a kernel is wrong.
    """
    from mlx_codellama import __version__, env
    from mlx_codellama.memory import machine_memory, this_machine

    readings = this_machine()
    memory = machine_memory(readings)
    result: dict[str, Any] = {
        "version": __version__,
        "chip": chip(readings),
        "machine": platform.machine(),
        "os": os_name(readings),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "memory_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "wired_limit_bytes": memory.wired_limit_bytes,
        "budget_bytes": memory.budget_bytes,
        "environment": {v.name: env.get(v) for v in env.VARIABLES if env.get(v) != v.default},
        "backend": None,
        "blas": None,
        "native": None,
        "instruction_set": None,
        "threads": None,
        "paths": {},
        "problems": [],
    }
    hints = _try_mlx(result)
    if kernels:
        hints += _try_kernels(result)
    if as_json:
        output.document(result)
    else:
        _show(result, memory)
    for problem, hint in zip(result["problems"], hints, strict=True):
        output.failure(problem, hint)
    if result["problems"]:
        sys.exit(output.EXIT_FAILED)


def _try_mlx(result: dict[str, Any]) -> list[str]:
    """Fill in what only MLX can tell; every failure is noted in `problems`. Returns their hints."""
    hints: list[str] = []

    def problem(error: CodeLlamaError) -> None:
        result["problems"].append(str(error))
        hints.append(error.hint)

    from mlx_codellama.blas import state

    blas = state()
    result["blas"] = {"active": blas.active, "library": blas.library, "reason": blas.reason}
    try:
        from mlx_codellama.kernels import dispatch
    except ImportError as error:
        known = missing_mlx(error)
        if known is None:
            raise
        problem(known)
        return hints
    try:
        result["backend"] = dispatch.backend()
        if result["backend"] == "cpu" and result["os"].partition(" ")[0] != "macOS":
            result["native"] = dispatch.native_state() or "used"
            if ops := dispatch.native():
                result["instruction_set"], result["threads"] = ops.isa(), ops.threads()
        from mlx_codellama.api.speed import measure_speed
        from mlx_codellama.loader import random_model

        dispatch.forget_paths()
        measure_speed(random_model(_probe()), prompt_tokens=16, tokens=2)
    except CodeLlamaError as error:
        problem(error)
    result["paths"] = dispatch.paths()
    return hints


def _try_kernels(result: dict[str, Any]) -> list[str]:
    """Fill in `kernels`: what every GPU kernel of this backend does here. Returns the hints of new problems."""
    result["kernels"] = []
    if result["backend"] not in ("metal", "cuda"):
        return []
    from mlx_codellama.kernels.gpu import catalogue

    for found in catalogue.table(result["backend"]):
        result["kernels"].append(found._asdict())
        if not found.passed:
            result["problems"].append(f"{found.kernel}: {found.error}")
    failed = len([entry for entry in result["kernels"] if not entry["passed"]])
    return ["pure MLX runs in its place; please report this line and the system it is from"] * failed


def _probe() -> ModelArgs:
    """Small, but with the head size and the grouped queries of the released models."""
    from mlx_codellama.config import ModelArgs
    from mlx_codellama.memory import with_bits

    args = ModelArgs(
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        intermediate_size=512,
        vocab_size=64,
        rope_theta=1e6,
        max_position_embeddings=64,
    )
    return with_bits(args, 4)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def chip(readings: Readings) -> str:
    """The processor's own name."""
    if readings.system == "Darwin":
        return (readings.command(["sysctl", "-n", "machdep.cpu.brand_string"]) or "unknown").strip()
    for line in (readings.file("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or "unknown"


def os_name(readings: Readings) -> str:
    if readings.system == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    for line in (readings.file("/etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return f"{line.partition('=')[2].strip().strip(chr(34))}, {platform.system()} {platform.release()}"
    return f"{platform.system()} {platform.release()}"


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
    if result["blas"]:
        blas = result["blas"]
        rows.append(
            ("BLAS", f"{'ours: ' + blas['library'] if blas['active'] else 'MLX' + chr(39) + 's own'}; {blas['reason']}")
        )
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
        return "no GPU here, so there is none to run a kernel on"
    return output.pairs([
        (entry["kernel"], f"ok, {entry['worst']:.0%} of the allowed error" if entry["passed"] else entry["error"])
        for entry in kernels
    ])  # fmt: skip
