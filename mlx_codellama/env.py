"""All environment variables that the package reads. `docs/env.md` is generated from this table."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple


class Variable(NamedTuple):  # not a dataclass: this is read at every import, and `dataclasses` costs 5 ms
    name: str
    default: str
    meaning: str


REQUIRE = Variable(
    "MLX_CODELLAMA_REQUIRE",
    "",
    "metal, cuda or cpu: run only on this backend and turn any fallback from a kernel into an error",
)
BLAS = Variable("MLX_CODELLAMA_BLAS", "1", "0 keeps MLX's own BLAS on Linux")
NATIVE = Variable("MLX_CODELLAMA_NATIVE", "1", "0 turns off the native CPU kernels of mlx-codellama-cpu")
ISA = Variable(
    "MLX_CODELLAMA_ISA",
    "",
    "avx512vnni, avx512, avx2, neondot or portable: instruction set of the native kernels; default: the best",
)
THREADS = Variable(
    "MLX_CODELLAMA_THREADS",
    "",
    "threads of the native CPU kernels, 1 to 1024; default: the physical cores that this process may use",
)
MEMORY = Variable(
    "MLX_CODELLAMA_MEMORY",
    "",
    "memory budget, such as 12GB: `plan` compares with it, and loads and calls that need more are refused; default: a "
    "Mac's wired limit, else what is free on the machine or its NVIDIA GPU",
)

CACHE = Variable(
    "MLX_CODELLAMA_CACHE",
    "",
    "folder for results that can be recomputed, such as which GPU kernels passed; default: in the user's cache folder",
)

VARIABLES = (REQUIRE, BLAS, NATIVE, ISA, THREADS, MEMORY, CACHE)


def get(variable: Variable) -> str:
    """The variable's value, or its default if it is unset."""
    return os.environ.get(variable.name, variable.default)


def cache_folder() -> str:
    """The folder of CACHE: its value, or `mlx_codellama` where this system keeps a user's caches."""
    if chosen := get(CACHE):
        return os.path.expanduser(chosen)
    mac = os.path.join("~", "Library", "Caches")
    base = mac if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(base), "mlx_codellama")


def state_folder() -> str:
    """The system's folder for user state, such as the lines typed in `chat`."""
    mac = os.path.join("~", "Library", "Application Support")
    base = mac if sys.platform == "darwin" else os.environ.get("XDG_STATE_HOME") or os.path.join("~", ".local", "state")
    return os.path.join(os.path.expanduser(base), "mlx_codellama")


def terminal_type() -> str:
    """TERM, the type of the terminal; "dumb" if it is unset."""
    return os.environ.get("TERM") or "dumb"


def config_folder() -> str:
    """The folder of the user's settings: XDG_CONFIG_HOME, else `~/.config`."""
    return os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")


def git_config_paths() -> list[str]:
    """The machine's and the user's git configuration, the strongest last, as git finds them. They need not exist."""
    paths = [] if os.environ.get("GIT_CONFIG_NOSYSTEM") else [os.environ.get("GIT_CONFIG_SYSTEM") or "/etc/gitconfig"]
    chosen = os.environ.get("GIT_CONFIG_GLOBAL")
    if chosen is not None:
        return [*paths, chosen]
    return [*paths, os.path.join(config_folder(), "git", "config"), os.path.join(os.path.expanduser("~"), ".gitconfig")]


def put(variable: Variable, value: str) -> None:
    """Set a variable for this process and its children."""
    os.environ[variable.name] = value
