"""What this machine is, what MLX makes of it, and which kernels run: as plain data, also if MLX does not work."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from mlx_codellama import __version__, blas, env
from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import CodeLlamaError, missing_mlx
from mlx_codellama.memory import MachineMemory, Readings, with_bits

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


Problem = tuple[str, str]  # a sentence and a hint


def diagnose(
    readings: Readings, memory: MachineMemory, *, kernels: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """(the facts, sizes in bytes; what does not work).

    kernels  compile and try every GPU kernel again
    """
    state = blas.state()
    found: dict[str, Any] = {
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
        "blas": {"active": state.active, "library": state.library, "reason": state.reason},
        "native": None,
        "instruction_set": None,
        "threads": None,
        "paths": {},
    }
    problems: list[Problem] = []
    try:
        _try_mlx(found)
    except CodeLlamaError as error:
        problems.append((str(error), error.hint))
    if kernels:
        problems += _try_kernels(found)
    found["problems"] = [sentence for sentence, _ in problems]
    return found, problems


def _try_mlx(found: dict[str, Any]) -> None:
    """Add what only MLX can tell, and the path that each operation of a tiny model takes. Raises BackendError."""
    try:
        from mlx_codellama.kernels import dispatch
    except ImportError as error:
        raise missing_mlx(error) or error from None
    try:
        found["backend"] = dispatch.backend()
        if found["backend"] == "cpu" and found["os"].partition(" ")[0] != "macOS":
            found["native"] = dispatch.native_state() or "used"
            if ops := dispatch.native():
                found["instruction_set"], found["threads"] = ops.isa(), ops.threads()
        from mlx_codellama.api.speed import measure_speed
        from mlx_codellama.loader import random_model

        dispatch.forget_paths()
        measure_speed(random_model(_probe()), prompt_tokens=16, tokens=2)
    finally:
        found["paths"] = dispatch.paths()


def _try_kernels(found: dict[str, Any]) -> list[Problem]:
    """Add `kernels`: what every GPU kernel of this backend does here."""
    found["kernels"] = []
    if found["backend"] not in ("metal", "cuda"):
        return []
    from mlx_codellama.kernels.gpu import catalogue

    verdicts = list(catalogue.table(found["backend"]))
    found["kernels"] = [verdict._asdict() for verdict in verdicts]
    hint = "report this line and your system; pure MLX runs in its place"
    return [(f"{verdict.kernel}: {verdict.error}", hint) for verdict in verdicts if not verdict.passed]


def _probe() -> ModelArgs:
    """Small, but with the head size and the grouped queries of the released models."""
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
