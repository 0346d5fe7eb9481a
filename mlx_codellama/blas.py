"""A real BLAS under MLX on Linux.

MLX's CPU wheel links netlib's reference BLAS, about 1 % of the machine's speed. `libmlx` imports three BLAS
functions; a library that defines them and is loaded with RTLD_GLOBAL before `mlx.core` is the one it calls. That
library comes with the second distribution (`csrc/`) and forwards to OpenBLAS of the wheel `scipy-openblas32`, which it
loads at the first product.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import PathFinder
from os.path import basename, isfile, join
from typing import TYPE_CHECKING, NamedTuple

from mlx_codellama import env

if TYPE_CHECKING:
    import ctypes

FORWARDER = "libmlx_codellama_cpu.so"
OPENBLAS = "libscipy_openblas.so"


class State(NamedTuple):
    """active: MLX's float32 products go to `library`. reason: why not, or what was done; one sentence."""

    active: bool
    library: str
    reason: str


_state: State | None = None
_library: ctypes.CDLL | None = None


def _find(package: str, *relative: str) -> str | None:
    """The first of these files that an installed package holds; the package is not imported."""
    spec = PathFinder.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in relative:
            if isfile(path := join(folder, name)):
                return path
    return None


def _install() -> State:
    global _library
    if sys.platform != "linux":
        return State(False, "", "not needed on this platform: MLX brings its own")
    if env.get(env.BLAS) == "0":
        return State(False, "", f"switched off by {env.BLAS.name}=0")
    forwarder = _find("mlx_codellama_cpu", FORWARDER)
    if forwarder is None:
        return State(False, "", "the package mlx-codellama-cpu is not installed (pip install ./csrc)")
    openblas = _find("scipy_openblas32", f"lib/{OPENBLAS}", f"lib64/{OPENBLAS}")
    if openblas is None:
        return State(False, "", "the package scipy-openblas32 is not installed")
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx.core was imported before mlx_codellama, so MLX keeps its slow reference BLAS; "
            f"import mlx_codellama first, or set {env.BLAS.name}=0 to silence this",
            RuntimeWarning,
            stacklevel=4,
        )
        return State(False, "", "mlx.core was imported before mlx_codellama; import mlx_codellama first")
    import ctypes

    try:
        library = ctypes.CDLL(forwarder, mode=ctypes.RTLD_GLOBAL)
        library.mcl_blas_use(openblas.encode())
    except (OSError, AttributeError) as e:
        return State(False, "", f"{basename(forwarder)} cannot be loaded: {e}")
    _library = library
    return State(True, openblas, "OpenBLAS, over the thread pool of mlx-codellama-cpu")


def ensure() -> State:
    """Put OpenBLAS under MLX, once per process; must run before `import mlx.core`.

    Does nothing on other systems than Linux, without the native package, or with MLX_CODELLAMA_BLAS=0. Warns
    (RuntimeWarning) when mlx.core is already loaded, for then it is too late.
    """
    global _state
    if _state is None:
        _state = _install()
    return _state


def state() -> State:
    """What `ensure` did, for `doctor`. Loads OpenBLAS, to see whether that works."""
    global _state
    ask = getattr(_library, "mcl_blas_problem", None)
    if _state is not None and _state.active and ask is not None:
        import ctypes

        ask.restype = ctypes.c_char_p
        if problem := ask().decode():
            hint = "pip install --force-reinstall scipy-openblas32"
            _state = State(False, "", f"plain products instead, for OpenBLAS cannot be used: {problem}; {hint}")
    return _state or State(False, "", "not asked for yet")
