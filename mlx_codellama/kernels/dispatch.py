"""Which backend runs, which path each op took, and whether falling back is allowed."""

from __future__ import annotations

import functools
import sys

import mlx.core as mx

from mlx_codellama import env
from mlx_codellama.errors import BackendError

_PATHS: dict[str, str] = {}


@functools.lru_cache(maxsize=1)
def backend() -> str:
    """The backend that MLX computes on: metal, cuda or cpu. MLX_CODELLAMA_REQUIRE turns any other into an error."""
    gpu = "metal" if sys.platform == "darwin" else "cuda"
    name = "cpu" if mx.default_device() == mx.Device(mx.cpu) else gpu
    required = env.get(env.REQUIRE)
    if required not in ("", "metal", "cuda", "cpu"):
        raise BackendError(f"{env.REQUIRE.name} is {required!r}", hint="use metal, cuda or cpu")
    if required == "cpu" and name != "cpu":
        mx.set_default_device(mx.Device(mx.cpu))
        name = "cpu"
    if required and required != name:
        raise BackendError(f"{required} is required, but MLX runs on {name} here", hint="see `mlx-codellama doctor`")
    return name


def record(op: str, path: str) -> None:
    """Note the path an op takes, at trace time. Paths read `mlx`, `mlx.fast`, `native`, `metal`, `cuda`."""
    _PATHS[op] = path


def paths() -> dict[str, str]:
    """op → the path it took last, for every op that has run in this process."""
    return dict(sorted(_PATHS.items()))
