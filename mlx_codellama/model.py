"""The whole model: token ids to logits, for tokens of several sequences at once."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from mlx_codellama.cache import Sequence, Span, Spans
from mlx_codellama.config import ModelArgs
from mlx_codellama.fusion import Launches, rows_are_independent, unpacks_weights
from mlx_codellama.kernels.dispatch import check_process
from mlx_codellama.kernels.rope import RopeTable
from mlx_codellama.layers import Block
from mlx_codellama.linear import Embedding, Linear, RMSNorm


class Decoder(Module):
    """Embedding, blocks, final norm: the part of the checkpoint named `model`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size, args.quant_of("model.embed_tokens"))
        self.layers = [Block(args, f"model.layers.{i}") for i in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self._args, self._launches = args, Launches(args)
        self._ropes: dict[int, RopeTable] = {}  # by the length of text they are for; 0 where it does not matter

    def __call__(self, ids: mx.array, spans: List[Span], prompt: bool) -> mx.array:
        parts = Spans(spans, *self._angles(spans), prompt=prompt)
        if ids.shape != (1, parts.n_tokens):
            raise ValueError(f"spans of {parts.n_tokens} tokens for ids of shape {ids.shape}")
        x = self.embed_tokens(ids).astype(self.norm.weight.dtype)  # [1, N, E]; MLX unpacks mxfp4 to bfloat16
        i = 0
        while i < len(self.layers):
            if (done := self._launches(self.layers, i, x, parts)) is not None:
                x, i = done
                continue
            x = self.layers[i](x, i, parts)
            if parts.cached and unpacks_weights(self.layers[i], x):
                mx.eval(x)
            i += 1
        self._count(parts)
        return self.norm(x)

    def _angles(self, spans: List[Span]) -> tuple[mx.array, mx.array]:
        """cos, sin float32 [N, D/2] of the tokens' positions."""
        parts = []
        for sequence, n_tokens in spans:
            offset = 0 if sequence is None else sequence.offset
            horizon = 0 if sequence is None else sequence.horizon
            parts.append(self._rope(horizon or offset + n_tokens).rows(offset, n_tokens))
        if len(parts) == 1:
            return parts[0]
        cos, sin = (mx.concatenate(list(halves)) for halves in zip(*parts, strict=True))
        return cos, sin

    def _rope(self, n_tokens: int) -> RopeTable:
        """The table for a text of n_tokens."""
        args = self._args
        scaling, text_length = args.scaling_over(n_tokens)
        if text_length not in self._ropes:
            self._ropes[text_length] = RopeTable(args.head_dim, args.rope_theta, scaling, text_length=text_length)
        return self._ropes[text_length]

    def _count(self, parts: Spans) -> None:
        """Every layer holds the new tokens. A text goes on with the angles that its first pass took."""
        if self._args.rope_scaling is not None:
            for sequence, n_tokens in parts.spans:
                if sequence is not None:
                    sequence.horizon = sequence.horizon or sequence.offset + n_tokens
        parts.advance()


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

    @property
    def rows_are_independent(self) -> bool:
        """Whether a token has the same bits alone and among up to 8 rows of a step, and a prompt in any chunks.

        The native CPU kernels hold that for packed weights. BLAS and MLX's own products may sum several rows in
        another order than one.
        """
        head = self.model.embed_tokens if self._args.tie_word_embeddings else self.lm_head
        blocks = [module for block in self.model.layers for module in block.modules() if isinstance(module, Linear)]
        return rows_are_independent(self._args.head_dim, self.dtype, [*blocks, head])

    def set_exact(self, exact: bool) -> None:
        """Keep activations in float32, or let the CPU kernels round them to 15 bits (kernels/quant_matmul.py)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.exact = exact

    def named_parameters(self) -> list[tuple[str, mx.array]]:
        """Every parameter with its name in the checkpoint."""
        return cast("list[tuple[str, mx.array]]", tree_flatten(self.parameters()))

    def hidden(self, ids: mx.array, spans: List[Span], *, prompt: bool = True) -> mx.array:
        """The last layer's output for every token, after the final norm.

        ids     int [1, N], the tokens of one span after the other
        spans   (sequence, n_tokens) of each, N in all: the sequence's next tokens, which it holds afterwards; or
                (None, n_tokens), a document of its own, without cache, with a gradient
        prompt  True to read prompts and documents, False to decode (kernels/kv_attention_segments.py)
        → [1, N, E]. A pass that raises leaves every sequence as it was.
        Raises BackendError in a forked child of a process that had used MLX.
        """
        check_process()
        return self.model(ids, spans, prompt)

    def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
        """Logits of the next token: x [1, n, E] of `hidden` → float32 [1, n, V]."""
        head = self.model.embed_tokens.as_head if self._args.tie_word_embeddings else self.lm_head
        return head(x, prompt=prompt).astype(mx.float32)

    def __call__(self, ids: mx.array, spans: List[Span] | None = None, *, prompt: bool = True) -> mx.array:
        """`head` of `hidden` of every token, float32 [1, N, V]. Without spans ids [B, L] are B documents: [B, L, V]."""
        if spans is not None:
            return self.head(self.hidden(ids, spans, prompt=prompt), prompt=prompt)
        b, l = ids.shape
        documents: list[tuple[Sequence | None, int]] = [(None, l)] * b
        return self(ids.reshape(1, -1), documents, prompt=prompt).reshape(b, l, -1)
