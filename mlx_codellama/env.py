"""Every environment variable the package reads, in one place. `docs/env.md` is generated from this table."""

from __future__ import annotations

import os
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
BLAS = Variable("MLX_CODELLAMA_BLAS", "1", "0 leaves MLX's own BLAS in place on Linux")
NATIVE = Variable("MLX_CODELLAMA_NATIVE", "1", "0 leaves the native CPU kernels of mlx-codellama-cpu aside")
ISA = Variable(
    "MLX_CODELLAMA_ISA",
    "",
    "avx512vnni, avx512, avx2 or portable: instruction set of the native kernels; default: the best",
)
THREADS = Variable("MLX_CODELLAMA_THREADS", "", "threads of the native CPU kernels; default: physical cores")
MEMORY = Variable(
    "MLX_CODELLAMA_MEMORY",
    "",
    "memory budget that `plan` holds against, such as 12GB; default: what the machine has",
)

VARIABLES = (REQUIRE, BLAS, NATIVE, ISA, THREADS, MEMORY)


def get(variable: Variable) -> str:
    """The variable's value, or its default where it is unset."""
    return os.environ.get(variable.name, variable.default)


def put(variable: Variable, value: str) -> None:
    """Set a variable for this process and its children."""
    os.environ[variable.name] = value
