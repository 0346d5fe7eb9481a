"""The matrices and norms of a checkpoint as modules. Parameter names are those of the checkpoint."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_codellama.config import QuantArgs
from mlx_codellama.kernels.quant_matmul import Packed, quant_matmul
from mlx_codellama.kernels.rms_norm import rms_norm

_DTYPES = {"uint32": mx.uint32, "uint8": mx.uint8, "float": mx.float32}


class Delta(Module):
    """A low-rank change of a matrix, W + scale · b a. Source: LoRA (arXiv:2106.09685).

    x [..., I] ─┬───── W [O, I] ─────── + ─▶ y [..., O]
                └─ a [R, I] ─ b [O, R] ─┘
    """

    def __init__(self, a: mx.array, b: mx.array, scale: float) -> None:
        """a [R, I], b [O, R]. Raises ValueError where the ranks differ."""
        super().__init__()
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"a of shape {a.shape} and b of shape {b.shape} have no common rank")
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., I] → what is added to the product [..., O], in x's dtype."""
        return (self.scale * ((x @ self.a.T) @ self.b.T)).astype(x.dtype)

    def rows(self, ids: mx.array) -> mx.array:
        """What is added to the rows `ids` of the matrix, [..., I]."""
        return self.scale * (self.b[ids] @ self.a)


class Linear(Module):
    """y = x @ weightᵀ, without bias. weight [O, I], or packed with scales and biases where `quant` is given.

    delta  None, or a Delta that is added to the matrix
    """

    def __init__(self, n_in: int, n_out: int, quant: QuantArgs | None = None) -> None:
        super().__init__()
        self._quant = quant
        self.exact = True  # see kernels/quant_matmul.py; `Model.set_exact` sets all of them
        self.delta: Delta | None = None
        if quant is None:
            self.weight = mx.zeros((n_out, n_in))
            return
        for name, part in quant.parts((n_out, n_in)).items():
            self[name] = mx.zeros(part.shape, _DTYPES[part.dtype])

    def __call__(self, x: mx.array, *, prompt: bool = True) -> mx.array:
        """x [..., I] → [..., O]. prompt: see `settings`."""
        plain = self._quant is None
        y = x @ self.weight.T if plain else quant_matmul(x, *self.packed, **self.settings(prompt))
        return y if self.delta is None else y + self.delta(x)

    @property
    def quant(self) -> QuantArgs | None:
        return self._quant

    def widen(self, quant: QuantArgs) -> None:
        """Switch to a wider code width; the native kernels support only a few."""
        assert self._quant is not None
        rows, words = self.weight.shape
        n_in = words * 32 // self._quant.bits
        self.weight, self._quant = mx.zeros(quant.parts((rows, n_in))["weight"].shape, mx.uint32), quant

    @property
    def packed(self) -> Packed:
        """Weight, scales and biases as the kernels take them."""
        # Indexing avoids Module.__getattr__; this runs hundreds of times per token.
        return self["weight"], self["scales"], self.get("biases")

    def settings(self, prompt: bool) -> dict[str, Any]:
        """The keywords of the kernels for this matrix.

        prompt  which family of kernels computes (kernels/kv_attention_segments.py)
        """
        assert self._quant is not None
        return {**self._quant.to_dict(), "exact": self.exact, "prompt": prompt}


class Embedding(Linear):
    """Rows of weight [V, E] by id; `as_head` uses the same table for the logits (tied embeddings).

    An id outside the table gives a row of NaN: a lazy graph has no place to raise, and MLX would read past the weights.
    """

    def __init__(self, n_rows: int, width: int, quant: QuantArgs | None = None) -> None:
        super().__init__(width, n_rows, quant)

    def __call__(self, ids: mx.array) -> mx.array:  # type: ignore[override]
        """ids [...] → [..., E]."""
        within = (ids >= 0) & (ids < self.weight.shape[0])
        rows = self._rows(mx.where(within, ids, 0))
        return mx.where(within[..., None], rows, mx.array(mx.nan, rows.dtype))

    def _rows(self, ids: mx.array) -> mx.array:
        if self._quant is None:
            rows = self.weight[ids]
        else:
            weight, scales, biases = self.packed
            biases = None if biases is None else biases[ids]
            rows = mx.dequantize(weight[ids], scales[ids], biases, **self._quant.to_dict())
        return rows if self.delta is None else rows + self.delta.rows(ids).astype(rows.dtype)

    def as_head(self, x: mx.array, *, prompt: bool = True) -> mx.array:
        return super().__call__(x, prompt=prompt)


class RMSNorm(Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)
