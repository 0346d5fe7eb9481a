"""The layers of a Llama block. Parameter names are those of the checkpoint."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_codellama.cache import KVCache
from mlx_codellama.config import ModelArgs, QuantArgs
from mlx_codellama.kernels.decoder_block import MOST_ROWS, Products, Weights, decoder_blocks
from mlx_codellama.kernels.kv_attention import kv_attention
from mlx_codellama.kernels.quant_matmul import Packed, quant_linear, quant_matmul, unpacks
from mlx_codellama.kernels.rms_norm import rms_norm
from mlx_codellama.kernels.rope import rope
from mlx_codellama.kernels.swiglu import swiglu


class Linear(Module):
    """y = x @ weightᵀ, without bias. weight [O, I], or packed with scales and biases where `quant` is given."""

    def __init__(self, n_in: int, n_out: int, quant: QuantArgs | None = None) -> None:
        super().__init__()
        self._quant = quant
        self.exact = True  # see kernels/quant_matmul.py; `Model.set_exact` sets all of them
        if quant is None:
            self.weight = mx.zeros((n_out, n_in))
            return
        self.weight = mx.zeros((n_out, n_in * quant.bits // 32), mx.uint32)
        groups = (n_out, n_in // quant.group_size)
        self.scales = mx.zeros(groups, mx.uint8 if quant.mode == "mxfp4" else mx.float32)
        if quant.mode == "affine":
            self.biases = mx.zeros(groups)

    def __call__(self, x: mx.array) -> mx.array:
        if self._quant is None:
            return x @ self.weight.T
        return quant_matmul(x, *self.packed, **self.settings)

    @property
    def quant(self) -> QuantArgs | None:
        return self._quant

    def hold(self, quant: QuantArgs) -> None:
        """Take codes of another width than the checkpoint's from now on: the kernels multiply by few."""
        rows, words = self.weight.shape
        assert self._quant is not None
        self.weight = mx.zeros((rows, words * quant.bits // self._quant.bits), mx.uint32)
        self._quant = quant

    @property
    def packed(self) -> Packed:
        """Weight, scales and biases as the kernels take them."""
        return self["weight"], self["scales"], self.get("biases")  # not attributes: a token asks hundreds of times

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords of the kernels for this matrix."""
        assert self._quant is not None
        q = self._quant
        return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode, "exact": self.exact}


class Embedding(Linear):
    """Rows of weight [V, E] by id; `as_head` uses the same table for the logits (tied embeddings)."""

    def __init__(self, n_rows: int, width: int, quant: QuantArgs | None = None) -> None:
        super().__init__(width, n_rows, quant)

    def __call__(self, ids: mx.array) -> mx.array:
        if self._quant is None:
            return self.weight[ids]
        q, biases = self._quant, self.get("biases")
        return mx.dequantize(
            self.weight[ids],
            self.scales[ids],
            None if biases is None else biases[ids],
            group_size=q.group_size,
            bits=q.bits,
            mode=q.mode,
        )

    def as_head(self, x: mx.array) -> mx.array:
        return super().__call__(x)


def project(
    x: mx.array,
    linears: Sequence[Linear],
    *,
    norm: RMSNorm | None = None,
    residual: mx.array | None = None,
    gated: bool = False,
) -> list[mx.array]:
    """x through several layers at once: in one launch where all are packed alike, else one after the other.

    norm      applied to x first
    residual  added to the result of the only layer
    gated     the two layers are gate and up of a feed-forward block: the one result is swiglu of theirs
    """
    first = linears[0]
    quant = first.quant
    if quant is not None and all(type(layer) is Linear and layer.quant == quant for layer in linears):
        before = None if norm is None else (norm.weight, norm.eps)
        packed = [layer.packed for layer in linears]
        return quant_linear(x, packed, **first.settings, norm=before, residual=residual, gated=gated)
    if norm is not None:
        x = norm(x)
    ys = [layer(x) for layer in linears]
    if gated:
        ys = [swiglu(*ys)]
    return ys if residual is None else [residual + ys[0]]


class RMSNorm(Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class Attention(Module):
    """Grouped-query self-attention with rotary positions. `path` names the module in the checkpoint."""

    def __init__(self, args: ModelArgs, path: str) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        width, q, kv = args.hidden_size, self._heads * self._dim, self._kv_heads * self._dim
        self.q_proj = Linear(width, q, args.quant_of(f"{path}.q_proj"))
        self.k_proj = Linear(width, kv, args.quant_of(f"{path}.k_proj"))
        self.v_proj = Linear(width, kv, args.quant_of(f"{path}.v_proj"))
        self.o_proj = Linear(q, width, args.quant_of(f"{path}.o_proj"))

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return self._heads, self._kv_heads

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self._dim**-0.5)

    def __call__(
        self,
        x: mx.array,
        norm: RMSNorm,
        cos: mx.array,
        sin: mx.array,
        cache: KVCache | None,
        starts: mx.array | None,
    ) -> mx.array:
        """x + attention(norm(x)). x [B, L, E]; cos, sin [L, D/2] for the positions of x; starts as in kv_attention."""
        b, l, _ = x.shape
        q, k, v = project(x, [self.q_proj, self.k_proj, self.v_proj], norm=norm)
        q = q.reshape(b, l, self._heads, self._dim).swapaxes(1, 2)  # [B, H, L, D]
        k = k.reshape(b, l, self._kv_heads, self._dim).swapaxes(1, 2)  # [B, K, L, D]
        v = v.reshape(b, l, self._kv_heads, self._dim).swapaxes(1, 2)
        if cache is None:
            out = kv_attention(rope(q, cos, sin), rope(k, cos, sin), v, scale=self.scale, offset=0, starts=starts)
        elif starts is None:
            out = cache.attend(q, k, v, cos, sin, scale=self.scale)
        else:
            raise ValueError("documents packed into one row have no cache")
        return project(out.swapaxes(1, 2).reshape(b, l, -1), [self.o_proj], residual=x)[0]


class FeedForward(Module):
    def __init__(self, args: ModelArgs, path: str) -> None:
        super().__init__()
        width, inner = args.hidden_size, args.intermediate_size
        self.gate_proj = Linear(width, inner, args.quant_of(f"{path}.gate_proj"))
        self.up_proj = Linear(width, inner, args.quant_of(f"{path}.up_proj"))
        self.down_proj = Linear(inner, width, args.quant_of(f"{path}.down_proj"))

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """x + down(swiglu(gate(norm(x)), up(norm(x))))."""
        inner = project(x, [self.gate_proj, self.up_proj], norm=norm, gated=True)[0]
        return project(inner, [self.down_proj], residual=x)[0]


class _Kept:
    """What a block found in its matrices at the last pass, and of which arrays and settings. No parameter."""

    def __init__(self) -> None:
        self.made_of: list[Any] = []
        self.weights: Weights | None = None


class Block(Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, args: ModelArgs, path: str) -> None:
        super().__init__()
        self.self_attn = Attention(args, f"{path}.self_attn")
        self.mlp = FeedForward(args, f"{path}.mlp")
        self.input_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self._kept = _Kept()

    def __call__(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        cache: KVCache | None = None,
        starts: mx.array | None = None,
    ) -> mx.array:
        if cache is not None and starts is None and (found := at_once([self], x, cos, sin, [cache])) is not None:
            return found
        x = self.self_attn(x, self.input_layernorm, cos, sin, cache, starts)
        return self.mlp(x, self.post_attention_layernorm)

    def unpacks(self, x: mx.array) -> bool:
        """Whether some matrix is unpacked to be multiplied with x [B, L, E]."""
        if x.shape[1] == 1:
            return False  # in each token's way
        layers = (module for part in (self.self_attn, self.mlp) for module in part.children().values())
        quants = (layer.quant for layer in layers if isinstance(layer, Linear))
        return any(quant is not None and unpacks(x, quant.bits) for quant in quants)

    def weights(self) -> Weights | None:
        """What the kernel of a whole layer takes; None where some matrix is not a plain one with scales and biases.

        Kept as long as every array and setting is the same: a token asks in every layer.
        """
        attention, mlp = self["self_attn"], self["mlp"]
        linears = [attention[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [mlp[n] for n in ("gate_proj", "up_proj", "down_proj")]
        norms = self["input_layernorm"], self["post_attention_layernorm"]
        now: list[Any] = [norm["weight"] for norm in norms]
        for one in linears:
            if type(one) is not Linear or one._quant is None:
                return None
            now += (one["weight"], one.get("scales"), one.get("biases"), one._quant, one.exact)
        kept = self._kept
        if len(now) != len(kept.made_of) or not all(map(operator.is_, now, kept.made_of)):
            kept.made_of, kept.weights = now, _layer_weights(attention, linears, norms)
        return kept.weights


def at_once(
    blocks: Sequence[Block], x: mx.array, cos: mx.array, sin: mx.array, caches: Sequence[KVCache]
) -> mx.array | None:
    """A few tokens through whole layers in one launch, where the kernels do that; else None."""
    n_tokens = x.shape[1]
    if x.shape[0] * n_tokens > MOST_ROWS:
        return None
    layers, held = [], []
    for block, cache in zip(blocks, caches, strict=True):
        if (weights := block.weights()) is None or weights.native is None or (room := cache.room(n_tokens)) is None:
            return None
        layers.append(weights)
        held.append(room)
    done = decoder_blocks(x, layers, cos, sin, held, scale=blocks[0].self_attn.scale)
    if done is None:
        return None
    for cache, arrays in zip(caches, done[1], strict=True):
        cache.took(arrays, n_tokens)
    return done[0]


def _layer_weights(attention: Attention, linears: Sequence[Linear], norms: tuple[RMSNorm, RMSNorm]) -> Weights | None:
    products = []
    for group in (linears[:3], linears[3:4], linears[4:6], linears[6:]):
        quant = group[0].quant
        if quant is None or quant.mode != "affine" or any(one.quant != quant for one in group):
            return None
        packed = [one.packed for one in group]
        products.append(Products(packed, quant.group_size, quant.bits, any(one.exact for one in group)))
    first, second = ((norm.weight, norm.eps) for norm in norms)
    qkv, out, gate_up, down = products
    return Weights(first, qkv, out, second, gate_up, down, *attention.heads)
