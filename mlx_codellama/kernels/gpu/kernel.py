"""Building a kernel of metal/ or cuda/ at its first use, and starting it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_codellama.kernels.dispatch import remembered
from mlx_codellama.kernels.gpu.source import kernel_text


def type_name(dtype: mx.Dtype) -> str:
    """mx.float16 → float16."""
    return str(dtype).removeprefix("mlx.core.")


class Kernel(NamedTuple):
    """A kernel by its place and its arguments; the same for both languages."""

    file: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def digest(self, language: str) -> str:
        """Changes with the kernel's text."""
        return kernel_text(language, self.file, self.name).digest

    def __call__(
        self,
        language: str,
        inputs: Sequence[mx.array],
        *,
        template: dict[str, int | mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Start the kernel; `grid` counts threads and is a multiple of `threadgroup`: CUDA would round it up."""
        run = _built(language, self)
        found: list[mx.array] = run(
            inputs=list(inputs),
            template=list(template.items()),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )
        return found


@remembered
def _built(language: str, kernel: Kernel) -> Any:
    """MLX's handle. On a machine without the language's backend, CUDA's raises here and Metal's when it is called.

    MLX keeps what it compiled for CUDA in a folder of the system, by name and template alone: of two versions of a text
    the first would run for ever. So the text's digest is part of the name there.
    """
    make = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    text = kernel_text(language, kernel.file, kernel.name)
    return make(
        name=kernel.name if language == "metal" else f"{kernel.name}_{text.digest}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=text.body,
        header=text.header,
    )


@functools.lru_cache(maxsize=64)
def whole_numbers(*values: int) -> mx.array:
    """A small int32 array, kept for a while: all layers of a step pass the same one."""
    return mx.array(values, mx.int32)


@functools.lru_cache(maxsize=64)
def one_float(value: float) -> mx.array:
    return mx.array([value], mx.float32)
