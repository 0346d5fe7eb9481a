"""Storage to be filled later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import native


def reference(like: mx.array, shape: Sequence[int]) -> mx.array:
    """Zeros of this shape, in the dtype of `like`."""
    return mx.zeros(tuple(shape), like.dtype)


def zeros_like(like: mx.array, shape: Sequence[int]) -> mx.array:
    """`reference`. On a CPU all threads of the native pool touch the new memory: MLX does so on one, which took a sixth
    of the time that a first prompt of 512 tokens takes at the 7B geometry. Not recorded: the result has no error."""
    if ops := native():
        return cast(mx.array, ops.zeros_like(like, list(shape)))
    return reference(like, shape)
