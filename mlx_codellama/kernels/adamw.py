"""The optimiser's arithmetic: AdamW (arXiv:1711.05101) with bias correction, and the norm that clipping needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import native_float32, record


@dataclass(frozen=True)
class Step:
    """The numbers of one step. `step` counts from 1; gradients count `grad_scale` times."""

    step: int
    rate: float
    betas: tuple[float, float]
    eps: float
    decay: float
    grad_scale: float = 1.0


def reference(p: mx.array, g: mx.array, m: mx.array, v: mx.array, how: Step) -> tuple[mx.array, mx.array, mx.array]:
    """Parameter, gradient, first and second moment, of one shape → the new p, m, v."""
    b1, b2 = how.betas
    g = g * how.grad_scale
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * mx.square(g)
    step = (how.rate / (1 - b1**how.step)) * m / (mx.sqrt(v) / math.sqrt(1 - b2**how.step) + how.eps)
    return p * (1 - how.rate * how.decay) - step, m, v


def adamw(p: mx.array, g: mx.array, m: mx.array, v: mx.array, how: Step) -> tuple[mx.array, mx.array, mx.array]:
    """`reference`, by the fastest path of this machine."""
    if ops := native_float32(p, g, m, v):
        record("adamw", "native")
        b1, b2 = how.betas
        new = ops.adamw(
            p,
            g,
            m,
            v,
            rate=how.rate,
            beta1=b1,
            beta2=b2,
            eps=how.eps,
            decay=how.decay,
            step=how.step,
            grad_scale=how.grad_scale,
        )
        return cast("tuple[mx.array, mx.array, mx.array]", new)
    record("adamw", "mlx")
    return reference(p, g, m, v, how)


def norm(arrays: Sequence[mx.array]) -> mx.array:
    """The square root of the sum of squares of all elements of all arrays, float32 []."""
    if ops := native_float32(*arrays):
        return mx.sqrt(cast(mx.array, ops.sum_squares(arrays)))
    return mx.sqrt(mx.stack([mx.square(a).sum() for a in arrays]).sum())
