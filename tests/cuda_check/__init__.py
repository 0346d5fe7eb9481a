"""Compiles CUDA kernels with NVRTC, as MLX would, without a GPU: it shows that they compile, not that they work.

NVRTC and CUDA's headers come from PyPI (`nvidia-cuda-nvrtc`, `nvidia-cuda-runtime`: the `test` extra on Linux). The
frame around a kernel is that of mlx/backend/cuda/custom_kernel.cpp; of MLX's own utils.cuh, which only the library of
its CUDA wheel holds, it has the types. (With that text, taken from mlx-cuda-13 0.32.4, NVRTC 13.5 accepts them too.)
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.kernels.gpu.source import KernelText

UTILS = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef int int32_t;
typedef unsigned int uint32_t;
"""
HEADERS = {
    "mlx/backend/cuda/device/utils.cuh": UTILS,
    "cooperative_groups.h": "namespace cooperative_groups {}",  # CUDA's own wants CCCL, and no kernel of ours wants it
}
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "uint32_t",
}


class Unavailable(RuntimeError):
    """No NVRTC in this environment."""


class Built(NamedTuple):
    """A compiled kernel."""

    cubin_bytes: int
    stack_bytes: int  # of a thread, in memory: arrays that are not held in registers, and registers that ran out
    log: str


@cache
def _folder() -> Path:
    """The folder of the `nvidia` packages that holds NVRTC: lib/ and include/. Raises Unavailable."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for folder in sorted(Path(root).glob("cu*"), reverse=True):
            if list(folder.glob("lib/libnvrtc.so.*")) and (folder / "include" / "cuda_fp16.h").exists():
                return folder
    raise Unavailable("no NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime (the `test` extra)")


@cache
def _library() -> ctypes.CDLL:
    (path,) = (file for file in (_folder() / "lib").glob("libnvrtc.so.*") if "alt" not in file.name)
    return ctypes.CDLL(str(path))


def framed(
    text: KernelText,
    inputs: Sequence[tuple[str, mx.Dtype]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Mapping[str, int | mx.Dtype],
) -> str:
    """What MLX would hand to NVRTC."""
    arguments = [f"    const {TYPES[dtype]}* {name}" for name, dtype in inputs]
    arguments += [f"    {TYPES[dtype]}* {name}" for name, dtype in outputs]
    constants = [
        f"  using {name} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"  constexpr int {name} = {value};"
        for name, value in template.items()
    ]
    return "\n".join([
        '#include "mlx/backend/cuda/device/utils.cuh"',
        "#include <cooperative_groups.h>",
        text.header,
        "namespace mlx::core::cu {",
        "namespace cg = cooperative_groups;",
        f"__global__ void {text.name}(",
        ",\n".join(arguments) + ") {",
        *constants,
        text.body,
        "}",
        "} // namespace mlx::core::cu",
    ])  # fmt: skip


def compiled(source: str, arch: str, headers: Mapping[str, str] | None = None) -> Built:
    """Compile for an architecture such as sm_90. Raises RuntimeError with NVRTC's words, Unavailable without it."""
    nvrtc = _library()
    given = HEADERS if headers is None else headers
    texts = (ctypes.c_char_p * len(given))(*(text.encode() for text in given.values()))
    names = (ctypes.c_char_p * len(given))(*(name.encode() for name in given))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", len(given), texts, names)
    try:
        include = _folder() / "include"
        options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{include}", f"-I{include / 'cccl'}"]
        options.append("--ptxas-options=-v")
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), words)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if status:
            raise RuntimeError(log.value.decode())
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        said = log.value.decode()
        (stack,) = re.findall(r"(\d+) bytes stack frame", said)
        return Built(size.value, int(stack), said)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
