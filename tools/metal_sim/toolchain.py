"""The compiler: clang 19 or newer, from the ziglang wheel or from the system, and a folder of what it has built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SHIM = HERE / "shim"
BUILT = HERE.parents[1] / ".pytest_cache" / "d" / "metal_sim"
KEPT_DAYS = 14
OLDEST_CLANG = 19  # the first whose __bf16 computes

KERNEL_FLAGS = (
    *("-std=c++17", "-x", "c++", "-nostdinc", "-fPIC", "-fsigned-char", "-fno-exceptions", "-fno-rtti"),
    *("-fno-strict-aliasing", "-fno-optimize-sibling-calls", "-fno-finite-loops", "-ffp-contract=off"),
    *("-gline-tables-only", "-ferror-limit=6", "-Wno-everything"),
    *("-Werror=return-type", "-Werror=uninitialized", "-Werror=sometimes-uninitialized"),
    *("-ftrivial-auto-var-init=pattern", "-Xclang", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    f"-I{SHIM}",
)
PLAIN_FLAGS = ("-O2",)
UNDEFINED = "array-bounds,alignment,shift-exponent,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow"
CHECKED_FLAGS = (
    *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write"),
    *("-Xclang", "-fsanitize=thread," + UNDEFINED + ",local-bounds", "-Xclang", "-fsanitize-recover=" + UNDEFINED),
    *("-Xclang", "-fsanitize-trap=local-bounds"),
)
ENGINE_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-g1", "-fno-exceptions", "-fno-rtti", "-nostdinc++", "-Wall", "-Werror")


class MetalError(RuntimeError):
    """A kernel that does not compile, or does what it must not; the message names kernel, line and thread."""


class Unavailable(RuntimeError):
    """This machine cannot run the simulator; the message says what is missing."""


class Toolchain(NamedTuple):
    """Words of commands: for kernels (C++ without any library), for the engine (C headers), to link."""

    name: str
    kernel: tuple[str, ...]
    engine: tuple[str, ...]
    link: tuple[str, ...]


def _zig(machine: str) -> Toolchain | None:
    """The ziglang wheel: a whole clang and lld in one program, no root needed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        return None
    zig = str(Path(found.submodule_search_locations[0]) / "zig")
    target = ("-target", f"{machine}-linux-gnu")
    return Toolchain(
        "zig", (zig, "clang", *target), (zig, "c++", *target, "-fno-sanitize=all"), (zig, "ld.lld", "-shared")
    )


def _clang() -> Toolchain | None:
    """A clang of the system, the newest."""
    for word in (*(f"clang++-{n}" for n in range(30, OLDEST_CLANG - 1, -1)), "clang++"):
        if path := shutil.which(word):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"clang version (\d+)", said)
            if version and "Apple" not in said and int(version[1]) >= OLDEST_CLANG:
                return Toolchain(word, (path,), (path,), (path, "-shared", "-nostdlib"))
    return None


@functools.cache
def compiler() -> Toolchain:
    """What compiles here. Raises Unavailable. METAL_SIM_COMPILER=clang|zig asks for one of the two."""
    machine = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine())
    if platform.system() != "Linux" or machine is None:
        raise Unavailable(f"the simulator runs on Linux (x86-64, aarch64), this is {platform.system()} {machine}")
    wanted = os.environ.get("METAL_SIM_COMPILER", "")
    found = (_zig(machine) if wanted != "clang" else None) or (_clang() if wanted != "zig" else None)
    if found is None:
        raise Unavailable("no clang 19 or newer; `pip install ziglang` brings one (the `test` extra)")
    return found


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    if platform.machine() != "x86_64":
        return ()
    try:
        has_f16c = "f16c" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        has_f16c = False
    return ("-mf16c",) if has_f16c else ()


def run(command: tuple[str, ...], text: str | None = None) -> str:
    """stdout of a compiler; MetalError with its stderr where it fails."""
    scratch = str(_folder())
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": scratch + "/zig", "ZIG_LOCAL_CACHE_DIR": scratch + "/zig"}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise MetalError(done.stderr or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


@functools.cache
def _folder() -> Path:
    try:
        BUILT.mkdir(parents=True, exist_ok=True)
        folder = BUILT
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="metal_sim-"))
    oldest = time.time() - KEPT_DAYS * 86400
    for file in (*folder.glob("*.so"), *folder.glob("*.json")):
        if file.stat().st_mtime < oldest:
            file.unlink(missing_ok=True)
    return folder


@functools.cache
def _own_text() -> str:
    files = sorted([*SHIM.rglob("*.h"), *(HERE / "engine").glob("*")])
    return "\0".join(file.read_text(encoding="utf-8") for file in files)


def _build(text: str, compile_command: tuple[str, ...], suffix: str) -> Path:
    """Compile and link, unless that was done before; several processes may do it at once."""
    tools = compiler()
    key = hashlib.sha256("\0".join([text, *compile_command, *tools.link, _own_text()]).encode()).hexdigest()[:24]
    library = _folder() / f"{key}.so"
    if library.exists():
        os.utime(library)
        return library
    with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
        source, built, linked = (Path(scratch) / f"kernel{end}" for end in (suffix, ".o", ".so"))
        source.write_text(text, encoding="utf-8")
        run((*compile_command, "-c", str(source), "-o", str(built)))
        run((*tools.link, str(built), "-o", str(linked)))
        linked.replace(library)
    return library


def kernel_command(checked: bool) -> tuple[str, ...]:
    return (*compiler().kernel, *KERNEL_FLAGS, *_machine_flags(), *(CHECKED_FLAGS if checked else PLAIN_FLAGS))


def build_kernel(text: str, *, checked: bool) -> Path:
    """A kernel as C++ → its shared library. Raises MetalError with clang's words."""
    return _build(text, kernel_command(checked), ".cpp")


def build_engine() -> Path:
    """The engine's shared library."""
    text = "".join(f'#include "{file}"\n' for file in sorted((HERE / "engine").glob("*.cpp")))
    return _build(text, (*compiler().engine, *ENGINE_FLAGS), ".cpp")


def remembered(text: str, tool: Path, compute: Callable[[], list[str]]) -> list[str]:
    """`compute()`, kept between runs under a hash of `text`, of the shim and of the tool that computes."""
    parts = [text, tool.read_text(encoding="utf-8"), _own_text(), *compiler().kernel, *KERNEL_FLAGS]
    file = _folder() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        kept: list[str] = json.loads(file.read_text(encoding="utf-8"))
        os.utime(file)
        return kept
    result = compute()
    with tempfile.NamedTemporaryFile("w", dir=_folder(), delete=False, encoding="utf-8") as scratch:
        json.dump(result, scratch)
    os.replace(scratch.name, file)
    return result


def dump_tree(text: str) -> str:
    """clang's syntax tree of a kernel, as its text."""
    tree = ("-fsyntax-only", "-Xclang", "-ast-dump", "-fno-color-diagnostics", "-")
    return run((*compiler().kernel, *KERNEL_FLAGS, *_machine_flags(), *tree), text)
