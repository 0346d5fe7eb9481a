"""The layers of a Llama block. Parameter names are those of the checkpoint."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_codellama.cache import Spans
from mlx_codellama.config import ModelArgs
from mlx_codellama.fusion import project
from mlx_codellama.linear import Linear, RMSNorm


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
        """Softmax scale, 1/√head_dim."""
        return float(self._dim**-0.5)

    def __call__(self, x: mx.array, norm: RMSNorm, i: int, spans: Spans) -> mx.array:
        """x + attention(norm(x)), in layer i of the caches. x [1, N, E]"""
        n = x.shape[1]
        q, k, v = project(x, [self.q_proj, self.k_proj, self.v_proj], norm=norm, prompt=spans.prompt)
        q = q.reshape(1, n, self._heads, self._dim).swapaxes(1, 2)  # [1, H, N, D]
        k = k.reshape(1, n, self._kv_heads, self._dim).swapaxes(1, 2)  # [1, K, N, D]
        v = v.reshape(1, n, self._kv_heads, self._dim).swapaxes(1, 2)
        out = spans.attend(i, q, k, v, scale=self.scale).swapaxes(1, 2).reshape(1, n, -1)
        return project(out, [self.o_proj], residual=x, prompt=spans.prompt)[0]


class FeedForward(Module):
    def __init__(self, args: ModelArgs, path: str) -> None:
        super().__init__()
        width, inner = args.hidden_size, args.intermediate_size
        self.gate_proj = Linear(width, inner, args.quant_of(f"{path}.gate_proj"))
        self.up_proj = Linear(width, inner, args.quant_of(f"{path}.up_proj"))
        self.down_proj = Linear(inner, width, args.quant_of(f"{path}.down_proj"))

    def __call__(self, x: mx.array, norm: RMSNorm, *, prompt: bool) -> mx.array:
        """x + down(swiglu(gate(norm(x)), up(norm(x))))."""
        inner = project(x, [self.gate_proj, self.up_proj], norm=norm, gated=True, prompt=prompt)[0]
        return project(inner, [self.down_proj], residual=x, prompt=prompt)[0]


class Block(Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, args: ModelArgs, path: str) -> None:
        super().__init__()
        self.self_attn = Attention(args, f"{path}.self_attn")
        self.mlp = FeedForward(args, f"{path}.mlp")
        self.input_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, x: mx.array, i: int, spans: Spans) -> mx.array:
        x = self.self_attn(x, self.input_layernorm, i, spans)
        return self.mlp(x, self.post_attention_layernorm, prompt=spans.prompt)
