"""Code Llama on your own machine. `load` gives a model; everything else hangs off it.

Importing the package loads neither MLX nor numpy: the public names below are fetched when first used. On Linux it puts
a real BLAS in place (`blas`), which must happen before MLX is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mlx_codellama import blas

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion, load
    from mlx_codellama.errors import CodeLlamaError, NotSupported

__version__ = "0.1.0"

__all__ = ["CodeLlama", "CodeLlamaError", "Completion", "NotSupported", "__version__", "load"]

_HOMES = {
    "CodeLlama": "mlx_codellama.api",
    "CodeLlamaError": "mlx_codellama.errors",
    "Completion": "mlx_codellama.api",
    "NotSupported": "mlx_codellama.errors",
    "load": "mlx_codellama.api",
}

blas.ensure()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        from mlx_codellama.errors import missing_mlx

        raise missing_mlx(error) or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
