"""Meta's Llama maths in plain numpy, on Meta's tensor names: the definition of right that no library shares with us.

Written from the description of the computation (docs/formats.md), in float64 unless a test asks for a plain float32
twin: RMSNorm, rotary positions on adjacent pairs, grouped-query attention, SwiGLU, and the two-way renaming between
Meta's layout and Hugging Face's. Slow and whole-array on purpose: no cache, no chunks, no fused step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Geometry:
    """Dimensions of a Meta-layout model. The feed-forward width is stated, not derived from multiple_of."""

    dim: int  # E
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K
    ffn_dim: int  # F
    vocab_size: int  # V
    rope_theta: float = 1e6
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Meta tensor name → shape (out, in)."""
        kv = self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for i in range(self.n_layers):
            p = f"layers.{i}."
            shapes |= {
                p + "attention_norm.weight": (self.dim,),
                p + "attention.wq.weight": (self.dim, self.dim),
                p + "attention.wk.weight": (kv, self.dim),
                p + "attention.wv.weight": (kv, self.dim),
                p + "attention.wo.weight": (self.dim, self.dim),
                p + "ffn_norm.weight": (self.dim,),
                p + "feed_forward.w1.weight": (self.ffn_dim, self.dim),
                p + "feed_forward.w2.weight": (self.dim, self.ffn_dim),
                p + "feed_forward.w3.weight": (self.ffn_dim, self.dim),
            }
        return shapes | {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}


# Pairwise different dimensions: a swapped axis cannot pass. Inputs of matrices are multiples of 64: quantisable.
TINY = {
    "mha": Geometry(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=192, vocab_size=101, rope_theta=1e6),
    "gqa": Geometry(dim=128, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=320, vocab_size=107, rope_theta=1e4),
}


def random_weights(geometry: Geometry, *, seed: int) -> Weights:
    """Float32 weights, the same on every machine and numpy (RandomState's stream is frozen).

    Matrices have variance 1 / (input features), embeddings 1, norm weights lie around 1: activations stay of order
    one and attention is neither flat nor one-hot. Every value is exact in bfloat16: 16-bit files lose nothing.
    """
    rng = np.random.RandomState(seed)
    weights: Weights = {}
    for name, shape in geometry.shapes().items():
        noise = rng.standard_normal(shape)
        if len(shape) == 1:
            value = 1.0 + 0.2 * noise
        elif name.startswith("tok_"):
            value = noise
        else:
            value = noise * (1.6 if ".wq" in name or ".wk" in name else 1.0) / np.sqrt(shape[1])
        weights[name] = truncate_to_bfloat16(value.astype(np.float32))
    return weights


def truncate_to_bfloat16(x: Array) -> Array:
    """Float32 values with the low 16 bits cleared: exact in bfloat16."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    scale = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=x.dtype) + x.dtype.type(eps))
    return x / scale * weight


def rope_angles(positions: Array, head_dim: int, theta: float) -> Array:
    """Angle of pair i at each position, float64 [L, D/2]: position · theta^(-2i/D)."""
    frequency = np.float64(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return np.asarray(np.outer(np.asarray(positions, np.float64), frequency))


def rotate_pairs(x: Array, angles: Array) -> Array:
    """Rotate the plane of each adjacent pair (x[2i], x[2i+1]) by angle i.   x [B, L, heads, D], angles [L, D/2]."""
    cos = np.cos(angles).astype(x.dtype)[None, :, None, :]
    sin = np.sin(angles).astype(x.dtype)[None, :, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal grouped-query attention; head h reads kv head h // (H // K).

    q [B, L, H, D], k and v [B, L, K, D] → [B, L, H, D]
    """
    _, length, n_heads, head_dim = q.shape
    repeat = n_heads // k.shape[2]
    out = np.empty_like(q)
    hidden = np.triu(np.ones((length, length), bool), 1)
    for h in range(n_heads):
        scores = q[:, :, h] @ k[:, :, h // repeat].transpose(0, 2, 1) / q.dtype.type(np.sqrt(head_dim))  # [B, L, L]
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v[:, :, h // repeat]
    return out


def feed_forward(x: Array, w1: Array, w2: Array, w3: Array) -> Array:
    """SwiGLU: w2 (silu(w1 x) · w3 x).   x [B, L, E]."""
    gate = x @ w1.T
    return np.asarray((gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T)


def forward(
    weights: Mapping[str, Array], geometry: Geometry, ids: Any, *, dtype: Any = np.float64, start: int = 0
) -> Array:
    """Logits [B, L, V] of token ids [B, L], computed in `dtype` throughout.

    dtype  np.float64 is the truth; np.float32 is the plain implementation whose error sets a tolerance
    start  position of the first token
    """
    ids = np.asarray(ids)
    w = {name: np.asarray(value).astype(dtype) for name, value in weights.items()}
    batch, length = ids.shape
    d = geometry.head_dim
    angles = rope_angles(np.arange(start, start + length), d, geometry.rope_theta)
    x = w["tok_embeddings.weight"][ids]  # [B, L, E]
    for i in range(geometry.n_layers):
        p = f"layers.{i}."
        h = rms_norm(x, w[p + "attention_norm.weight"], geometry.norm_eps)
        q = (h @ w[p + "attention.wq.weight"].T).reshape(batch, length, geometry.n_heads, d)
        k = (h @ w[p + "attention.wk.weight"].T).reshape(batch, length, geometry.n_kv_heads, d)
        v = (h @ w[p + "attention.wv.weight"].T).reshape(batch, length, geometry.n_kv_heads, d)
        mixed = attention(rotate_pairs(q, angles), rotate_pairs(k, angles), v)
        x = x + mixed.reshape(batch, length, -1) @ w[p + "attention.wo.weight"].T
        h = rms_norm(x, w[p + "ffn_norm.weight"], geometry.norm_eps)
        x = x + feed_forward(h, *(w[f"{p}feed_forward.w{n}.weight"] for n in (1, 2, 3)))
    return np.asarray(rms_norm(x, w["norm.weight"], geometry.norm_eps) @ w["output.weight"].T)


def greedy(weights: Mapping[str, Array], geometry: Geometry, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The n_tokens most likely ids after `prompt`, one full pass each, in float64."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(forward(weights, geometry, [ids])[0, -1].argmax()))
    return ids[len(prompt) :]


# Meta's part of a name → Hugging Face's.
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str:
    """Hugging Face's name of a Meta tensor."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return _TOP[stem] + ".weight"
    _, index, part = stem.split(".", 2)
    return f"model.layers.{index}.{_PARTS[part]}.weight"


def halves_from_pairs(head_dim: int) -> list[int]:
    """Row of Meta's head that becomes each row of Hugging Face's: first all even rows, then all odd ones."""
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]


def to_hf(weights: Mapping[str, Array], geometry: Geometry) -> Weights:
    """Rename, and reorder the rows of wq and wk head by head from adjacent pairs to halves."""
    order = halves_from_pairs(geometry.head_dim)
    out: Weights = {}
    for name, value in weights.items():
        if ".wq." in name or ".wk." in name:
            value = value.reshape(-1, geometry.head_dim, value.shape[1])[:, order].reshape(value.shape)
        out[hf_name(name)] = value
    return out


def from_hf(weights: Mapping[str, Array], geometry: Geometry) -> Weights:
    """The inverse of to_hf."""
    order = np.argsort(halves_from_pairs(geometry.head_dim))
    out: Weights = {}
    for name in geometry.shapes():
        value = weights[hf_name(name)]
        if ".wq." in name or ".wk." in name:
            value = value.reshape(-1, geometry.head_dim, value.shape[1])[:, order].reshape(value.shape)
        out[name] = value
    return out


def hf_config(geometry: Geometry, *, max_position_embeddings: int = 512) -> dict[str, Any]:
    """config.json of the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": geometry.dim,
        "intermediate_size": geometry.ffn_dim,
        "num_hidden_layers": geometry.n_layers,
        "num_attention_heads": geometry.n_heads,
        "num_key_value_heads": geometry.n_kv_heads,
        "vocab_size": geometry.vocab_size,
        "rms_norm_eps": geometry.norm_eps,
        "rope_theta": geometry.rope_theta,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
