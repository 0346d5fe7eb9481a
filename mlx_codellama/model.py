"""The whole model: token ids to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from mlx_codellama.cache import KVCache
from mlx_codellama.config import ModelArgs
from mlx_codellama.kernels.rope import RopeTable
from mlx_codellama.layers import Block, Embedding, Linear, RMSNorm, at_once

_LAUNCH_WEIGHTS = 400_000_000  # of several layers in one launch; larger ones gain nothing, and lost 4 % at 7B


def _weights_of_layer(args: ModelArgs) -> int:
    heads = 2 * (args.num_attention_heads + args.num_key_value_heads) * args.head_dim
    return args.hidden_size * (heads + 3 * args.intermediate_size)


class Decoder(Module):
    """Embedding, blocks, final norm: the part of the checkpoint named `model`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size, args.quant_of("model.embed_tokens"))
        self.layers = [Block(args, f"model.layers.{i}") for i in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self._args = args
        # At least two launches for a token: while one computes, another's caches are free for the token after it.
        half = (args.num_hidden_layers + 1) // 2
        self._at_once = max(1, min(_LAUNCH_WEIGHTS // _weights_of_layer(args), half))
        self._ropes: dict[int, RopeTable] = {}  # by the length of text they are for; 0 where it does not matter

    def __call__(
        self, ids: mx.array, cache: Sequence[KVCache] | None, last_only: bool, starts: mx.array | None
    ) -> mx.array:
        offset = cache[0].offset if cache else 0
        cos, sin = self._rope(cache, offset + ids.shape[1]).rows(offset, ids.shape[1])
        x = self.embed_tokens(ids).astype(self.norm.weight.dtype)  # [B, L, E]; MLX unpacks mxfp4 to bfloat16
        for first in range(0, len(self.layers), self._at_once):
            end = min(first + self._at_once, len(self.layers))
            x = self._layers(x, cos, sin, cache, starts, range(first, end))
        return self.norm(x[:, -1:] if last_only else x)

    def _layers(
        self,
        x: mx.array,
        cos: mx.array,
        sin: mx.array,
        cache: Sequence[KVCache] | None,
        starts: mx.array | None,
        which: range,
    ) -> mx.array:
        """x through some of the layers, in one launch where that can be."""
        if cache and starts is None and len(which) > 1:
            done = at_once([self.layers[i] for i in which], x, cos, sin, [cache[i] for i in which])
            if done is not None:
                return done
        for i in which:
            x = self.layers[i](x, cos, sin, cache[i] if cache else None, starts)
            if cache and self.layers[i].unpacks(x):
                mx.eval(x)  # else MLX unpacks the weights of several layers ahead
        return x

    def _rope(self, cache: Sequence[KVCache] | None, end: int) -> RopeTable:
        """The table for a text that has `end` tokens so far; with a cache it is the one that its first pass took."""
        args, n_tokens = self._args, end
        if args.rope_scaling is not None and cache:
            n_tokens = cache[0].horizon or end
            for layer in cache:
                layer.horizon = n_tokens
        scaling, text_length = args.scaling_over(n_tokens)
        if text_length not in self._ropes:
            self._ropes[text_length] = RopeTable(args.head_dim, args.rope_theta, scaling, text_length=text_length)
        return self._ropes[text_length]


class Model(Module):
    """A Llama-shaped language model."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self._args = args
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = Linear(args.hidden_size, args.vocab_size, args.quant_of("lm_head"))

    @property
    def args(self) -> ModelArgs:
        return self._args

    @property
    def dtype(self) -> mx.Dtype:
        """The activations' dtype."""
        return self.model.norm.weight.dtype

    def set_exact(self, exact: bool) -> None:
        """Keep activations in float32, or let the CPU kernels round them to 15 bits (kernels/quant_matmul.py)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.exact = exact

    def named_parameters(self) -> list[tuple[str, mx.array]]:
        """Every parameter with its name in the checkpoint."""
        return cast("list[tuple[str, mx.array]]", tree_flatten(self.parameters()))

    def __call__(
        self,
        ids: mx.array,
        cache: Sequence[KVCache] | None = None,
        *,
        last_only: bool = False,
        starts: mx.array | None = None,
    ) -> mx.array:
        """Logits of the token after each of ids.

        ids        int [B, L], at positions offset … offset + L - 1, offset = tokens already in the cache
        cache      one KVCache per layer, extended in place; None for a single pass without cache
        last_only  compute only the last position's logits
        starts     int [B, L]: the first position that each token sees, for documents packed into one row
        → float32 [B, L, V], or [B, 1, V]
        """
        x = self.model(ids, cache, last_only, starts)
        logits = self.model.embed_tokens.as_head(x) if self._args.tie_word_embeddings else self.lm_head(x)
        return logits.astype(mx.float32)
