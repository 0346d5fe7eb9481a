"""MLX's AdamW with the step of `kernels.adamw`: one pass over memory instead of a dozen, same state, same numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW

from mlx_codellama.kernels.adamw import Step, adamw


class FusedAdamW(AdamW):
    """AdamW with bias correction. `grad_scale` multiplies every gradient of the next update (clipping)."""

    grad_scale: float = 1.0

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        self._rate = float(self.learning_rate)
        self._number = int(self.step) + 1
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        b1, b2 = self.betas
        how = Step(self._number, self._rate, (b1, b2), self.eps, self.weight_decay, self.grad_scale)
        new, state["m"], state["v"] = adamw(parameter, gradient, state["m"], state["v"], how)
        return new
