"""What is computed in one launch where the kernels do that: groups of products, and whole layers.

Everything here gives what the same modules give one by one; None, or a path op by op, where the kernels cannot.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_codellama.cache import Spans
from mlx_codellama.config import NATIVE_BITS, ModelArgs
from mlx_codellama.kernels.decoder_block import MOST_ROWS, Held, Products, Span, Weights, decoder_blocks
from mlx_codellama.kernels.dispatch import native
from mlx_codellama.kernels.kv_attention import NATIVE_WIDTH
from mlx_codellama.kernels.quant_matmul import quant_linear, unpacks
from mlx_codellama.kernels.swiglu import swiglu
from mlx_codellama.linear import Embedding, Linear, RMSNorm

LAUNCH_WEIGHTS = 400_000_000  # maximum weights per multi-layer launch; larger ones gain nothing, and lost 4 % at 7B


def project(
    x: mx.array,
    linears: Sequence[Linear],
    *,
    norm: RMSNorm | None = None,
    residual: mx.array | None = None,
    gated: bool = False,
    prompt: bool = True,
) -> list[mx.array]:
    """x through several layers at once: in one launch where all are packed alike, else one after the other.

    norm      applied to x first
    residual  added to the result of the only layer
    gated     the two layers are gate and up of a feed-forward block: the one result is swiglu of theirs
    prompt    which family of kernels computes (kernels/kv_attention_segments.py)
    """
    first = linears[0]
    quant = first.quant
    deltas = any(layer.get("delta") is not None for layer in linears)
    if quant is not None and not deltas and all(type(layer) is Linear and layer.quant == quant for layer in linears):
        before = None if norm is None else (norm.weight, norm.eps)
        packed = [layer.packed for layer in linears]
        return quant_linear(x, packed, **first.settings(prompt), norm=before, residual=residual, gated=gated)
    if norm is not None:
        x = norm(x)
    ys = [layer(x, prompt=prompt) for layer in linears]
    if gated:
        ys = [swiglu(*ys)]
    return ys if residual is None else [residual + ys[0]]


class Launches:
    """Decoder layers in one launch, with a memo of each layer's native weights."""

    def __init__(self, args: ModelArgs) -> None:
        heads = 2 * (args.num_attention_heads + args.num_key_value_heads) * args.head_dim
        weights = args.hidden_size * (heads + 3 * args.intermediate_size)
        # At least two launches for a token: while one computes, another's caches are free for the token after it.
        half = (args.num_hidden_layers + 1) // 2
        self._size = max(1, min(LAUNCH_WEIGHTS // weights, half))
        self._memos = [_Memo() for _ in range(args.num_hidden_layers)]

    def __call__(self, blocks: Sequence[Module], first: int, x: mx.array, spans: Spans) -> tuple[mx.array, int] | None:
        """x [1, N, E] through the layers from `first` on, as many as one launch takes.

        → the result and the layer to go on with; None where the kernels do not do layer `first`.
        """
        if spans.prompt or x.shape[1] > MOST_ROWS or native() is None:
            return None
        if any(sequence is None for sequence, _ in spans.spans):
            return None
        whole = min(first - first % self._size + self._size, len(blocks))
        for end in (whole, first + 1) if whole > first + 1 else (whole,):
            if (done := self._launch(blocks, range(first, end), x, spans)) is not None:
                return done, end
        return None

    def _launch(self, blocks: Sequence[Module], which: range, x: mx.array, spans: Spans) -> mx.array | None:
        weights = []
        for i in which:
            found = self._memos[i].weights(blocks[i])
            if found is None or found.native is None:
                return None
            weights.append(found)
        texts = []
        for sequence, n_tokens in spans.spans:
            assert sequence is not None
            caches: list[Held] = []
            for layer in map(sequence.layer, which):
                if (slot := layer.tail.reserve_slot(n_tokens)) is None:
                    return None
                before = sum(segment.n_tokens for segment in layer.before)
                caches.append(slot._replace(total=slot.total + before, segments=layer.before) if before else slot)
            texts.append(Span(n_tokens, caches))
        scale = blocks[which[0]].self_attn.scale
        done = decoder_blocks(x, weights, spans.cos, spans.sin, texts, scale=scale)
        if done is None:
            return None
        for (sequence, _), tails in zip(spans.spans, done[1], strict=True):
            assert sequence is not None
            for layer, arrays in zip(map(sequence.layer, which), tails, strict=True):
                layer.tail.commit(arrays)
        return done[0]


class _Memo:
    """The native weights of one layer, keyed by the identity of their arrays and settings."""

    def __init__(self) -> None:
        self._made_of: list[Any] = []
        self._weights: Weights | None = None

    def weights(self, block: Module) -> Weights | None:
        """What the kernel of a whole layer takes; None where some matrix is not a plain one with scales and biases."""
        # Indexing avoids Module.__getattr__; this runs in every layer of every token.
        attention, mlp = block["self_attn"], block["mlp"]
        linears = [attention[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [mlp[n] for n in ("gate_proj", "up_proj", "down_proj")]
        norms = block["input_layernorm"], block["post_attention_layernorm"]
        now: list[Any] = [norm["weight"] for norm in norms]
        for one in linears:
            if type(one) is not Linear or one._quant is None or one.get("delta") is not None:
                return None
            now += (one["weight"], one.get("scales"), one.get("biases"), one._quant, one.exact)
        if len(now) != len(self._made_of) or not all(map(operator.is_, now, self._made_of)):
            self._made_of, self._weights = now, _weights(attention.heads, linears, norms)
        return self._weights


def _weights(heads: tuple[int, int], linears: Sequence[Linear], norms: tuple[RMSNorm, RMSNorm]) -> Weights | None:
    products = []
    for group in (linears[:3], linears[3:4], linears[4:6], linears[6:]):
        quant = group[0].quant
        if quant is None or quant.mode != "affine" or any(one.quant != quant for one in group):
            return None
        packed = [one.packed for one in group]
        products.append(Products(packed, quant.group_size, quant.bits, any(one.exact for one in group)))
    first, second = ((norm.weight, norm.eps) for norm in norms)
    qkv, out, gate_up, down = products
    return Weights(first, qkv, out, second, gate_up, down, *heads)


def unpacks_weights(block: Module, x: mx.array) -> bool:
    """Whether some matrix of a layer is unpacked to be multiplied with x [1, N, E]: MLX would unpack those of several
    layers ahead, so whoever has no gradient to take waits for each."""
    if x.shape[1] == 1:
        return False  # waiting would slow down every token
    layers = (module for part in (block.self_attn, block.mlp) for module in part.children().values())
    quants = (layer.quant for layer in layers if isinstance(layer, Linear))
    return any(quant is not None and unpacks(x, quant.bits) for quant in quants)


def rows_are_independent(head_dim: int, dtype: mx.Dtype, linears: Sequence[Linear]) -> bool:
    """Whether the native CPU kernels compute all of a model with these matrices: they keep a token's bits whatever
    other rows a pass has, which BLAS and MLX's own products do not."""
    if native() is None or dtype != mx.float32 or head_dim > NATIVE_WIDTH:
        return False
    return all(
        type(linear) in (Linear, Embedding)
        and linear.quant is not None
        and linear.quant.bits in NATIVE_BITS
        and linear.get("delta") is None
        for linear in linears
    )
