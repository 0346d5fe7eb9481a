"""A kernel is trusted once it has been compared with its reference on this device.

The first use compiles it and runs it on small fixed inputs (`selftest`). The verdict is kept in the user's cache folder
by device, versions, specialisation and source text, so that this happens once. If a kernel does not compile or is
wrong, callers take the pure MLX path and one warning says so; MLX_CODELLAMA_REQUIRE turns that into an error. Any other
failure, such as a lack of memory, is not kept: this process tries again after a while, and the next one at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_codellama import __version__, env, inputs
from mlx_codellama.errors import BackendError, OutputError
from mlx_codellama.kernels.dispatch import KernelWarning as KernelWarning
from mlx_codellama.kernels.dispatch import remembered
from mlx_codellama.kernels.gpu.kernel import Kernel
from mlx_codellama.staging import write_file

REPORT = "mlx-codellama doctor --kernels"
PAUSE = (
    64  # calls until a self-test that failed for another reason than the kernel is repeated: two tokens of 32 layers
)
_LOCK = threading.RLock()

# What compilers and launches say of a kernel that will not run on this device tomorrow either.
_LASTING = re.compile(
    r":\d+: error:|\(\d+\): error|maximum allowed threads per threadgroup|too many resources requested|no kernel image"
)


class Planned(Protocol):
    """What a verdict depends on of a way to run. Plans are hashable."""

    @property
    def language(self) -> str: ...
    @property
    def kernels(self) -> tuple[Kernel, ...]: ...
    @property
    def label(self) -> str: ...
    @property
    def template(self) -> Mapping[str, int | mx.Dtype]: ...


class Verdict(NamedTuple):
    """What was found about one compiled kernel; `worst` is its error as a multiple of what is allowed."""

    kernel: str
    device: str
    mlx: str
    passed: bool
    worst: float | None
    error: str


def trusted(plan: Planned, selftest: Callable[[], float]) -> bool:
    """Whether the plan's kernels may run here. `selftest` compiles them and returns their error.

    Raises BackendError where they may not and MLX_CODELLAMA_REQUIRE asks for their language.
    """
    settled = _settled().get(plan)
    if settled is not None and settled.passed:
        return True  # twice a layer and token: without a lock, and without a look at source texts
    with _LOCK:
        found = _found(plan, selftest)
        if found.passed:
            return True
        how = " for now" if plan in _pauses() else ""
        message = f"the {plan.language} kernel {found.kernel} is left aside{how}: {found.error}"
        refuse(plan.language, message)
        name = plan.kernels[0].name
        if name not in _warned():
            _warned().add(name)
            warnings.warn(
                f"{message}. Pure MLX runs instead, slower. `{REPORT}` tries all kernels again and shows what they do.",
                KernelWarning,
                stacklevel=4,
            )
        return False


def known_good(plan: Planned, selftest: Callable[[], float]) -> bool:
    """As `trusted`, without a word where it is not: for a kernel that another one stands in for."""
    with _LOCK:
        return _found(plan, selftest).passed


def _found(plan: Planned, selftest: Callable[[], float]) -> Verdict:
    """What this process knows of the plan, or the file, or what a self-test finds now."""
    found = _settled().get(plan)
    if found is None:
        found = _settled()[plan] = _known().get(_key(plan)) or verdict(plan, selftest)
    elif plan in _pauses():
        _pauses()[plan].calls_left -= 1
        if _pauses()[plan].calls_left <= 0:
            return verdict(plan, selftest)
    return found


def verdict(plan: Planned, selftest: Callable[[], float]) -> Verdict:
    """Try the kernels now, whatever is known, and keep what was found, unless the failure may pass."""
    worst, error, lasting = None, "", True
    try:
        worst = selftest()
    except Exception as failure:  # whatever the compiler or the driver has to say
        error, lasting = _short(failure), bool(_LASTING.search(str(failure)))
    if worst is not None and not worst <= 1:
        error = f"it differs from the reference, by {worst:.3g} times what is allowed"
    device, version = _machine()
    if worst is not None and not math.isfinite(worst):
        worst = None  # JSON has no word for it
    found = Verdict(plan.label, device, version, not error, worst, error)
    with _LOCK:
        _settled()[plan] = found
        if lasting:
            _pauses().pop(plan, None)
            _known()[_key(plan)] = found
            _keep(_key(plan), found)
        else:
            before = _pauses().get(plan)
            _pauses()[plan] = _Pause(PAUSE if before is None else 2 * before.calls)
    return found


def refuse(language: str, message: str) -> None:
    """Raise BackendError where MLX_CODELLAMA_REQUIRE asks for this language's kernels."""
    if env.get(env.REQUIRE) == language:
        raise BackendError(message, hint=f"see `{REPORT}`")


def verdict_file() -> Path:
    """Where verdicts are kept."""
    return Path(env.cache_folder()) / "kernels.json"


@dataclass
class _Pause:
    """Until a self-test is repeated: `calls` in all, longer each time."""

    calls: int
    calls_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.calls_left = self.calls


@remembered
def _settled() -> dict[Planned, Verdict]:
    """Verdicts of this process."""
    return {}


@remembered
def _pauses() -> dict[Planned, _Pause]:
    """Plans whose self-test will be repeated."""
    return {}


@remembered
def _known() -> dict[str, Verdict]:
    """Verdicts by key: those of the file, then those of this process."""
    return {key: found for key, entry in _read().items() if (found := _parsed(entry))}


@remembered
def _warned() -> set[str]:
    return set()


@remembered
def _machine() -> tuple[str, str]:
    """The device with the system that brings its compiler, and MLX's version."""
    info = mx.device_info()
    system = platform.mac_ver()[0] or platform.release()
    return (
        f"{info.get('device_name', '?')}, {info.get('architecture', '?')}, {platform.system()} {system}",
        metadata.version("mlx"),
    )


def _key(plan: Planned) -> str:
    texts = [kernel.digest(plan.language) for kernel in plan.kernels]
    template = [f"{name}={value}" for name, value in plan.template.items()]
    words = [__version__, plan.language, plan.label, *template, *_machine(), *texts]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]


def _parsed(entry: Any) -> Verdict | None:
    """A verdict of the file, or None for anything that is none."""
    try:
        found = Verdict(**entry)
    except TypeError:
        return None
    return found if isinstance(found.passed, bool) and isinstance(found.error, str) else None


def _read() -> dict[str, Any]:
    try:
        entries = inputs.read_json(verdict_file())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _keep(key: str, found: Verdict) -> None:
    """Add a verdict to the file, whole or not at all. A folder that cannot be written costs a self-test per process."""
    path = verdict_file()
    entries = _read() | {key: found._asdict()}
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(entries, indent=1).encode())


def _short(failure: Exception) -> str:
    """The line that says what is wrong, of messages that quote whole kernels."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    line = next((line for line in lines if "error:" in line), lines[0]).rstrip(".")
    return line if len(line) <= 300 else line[:299] + "…"
