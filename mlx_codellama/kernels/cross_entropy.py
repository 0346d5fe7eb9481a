"""Cross-entropy of next-token logits, in natural-log units (nats)."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_codellama.kernels.dispatch import native_float32, record

IGNORE = -1  # a target that carries no loss


def reference(logits: mx.array, targets: mx.array) -> mx.array:
    """logits float32 [N, V], targets int [N] → loss float32 [N]; 0 where the target is IGNORE."""
    kept = targets != IGNORE
    chosen = mx.take_along_axis(logits, mx.where(kept, targets, 0)[:, None], axis=-1)[:, 0]
    return mx.where(kept, mx.logsumexp(logits, axis=-1) - chosen, 0.0)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`reference`, by the fastest path of this machine."""
    if ops := native_float32(logits):
        record("cross_entropy", "native")
        return cast(mx.array, ops.cross_entropy(logits, targets))
    record("cross_entropy", "mlx")
    return reference(logits, targets)
