"""Other projects' names for the tensors of a Llama model. They appear in this file only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IGNORED = frozenset({"rope.freqs"})  # a buffer in some of Meta's files; the model computes it


@dataclass(frozen=True)
class MetaTensor:
    """How Meta stores one of our tensors.

    name   in consolidated.NN.pth
    axis   axis along which shards are joined; None if every shard holds the whole tensor
    heads  which rows are in Meta's rotary order: "q" (num_attention_heads), "k" (num_key_value_heads), or "" (none)

    Axes: fairscale's ColumnParallelLinear splits rows (0), RowParallelLinear and ParallelEmbedding columns (1).
    """

    name: str
    axis: int | None
    heads: Literal["", "q", "k"] = ""


EMBEDDING = MetaTensor("tok_embeddings.weight", 1)
OUTPUT = MetaTensor("output.weight", 0)
_LAYER = {
    "input_layernorm": MetaTensor("attention_norm", None),
    "self_attn.q_proj": MetaTensor("attention.wq", 0, "q"),
    "self_attn.k_proj": MetaTensor("attention.wk", 0, "k"),
    "self_attn.v_proj": MetaTensor("attention.wv", 0),
    "self_attn.o_proj": MetaTensor("attention.wo", 1),
    "post_attention_layernorm": MetaTensor("ffn_norm", None),
    "mlp.gate_proj": MetaTensor("feed_forward.w1", 0),
    "mlp.up_proj": MetaTensor("feed_forward.w3", 0),
    "mlp.down_proj": MetaTensor("feed_forward.w2", 1),
}


def meta_tensors(n_layers: int) -> dict[str, MetaTensor]:
    """Our name → Meta's, for a model of n_layers."""
    table = {"model.embed_tokens.weight": EMBEDDING}
    for i in range(n_layers):
        for ours, meta in _LAYER.items():
            table[f"model.layers.{i}.{ours}.weight"] = MetaTensor(
                f"layers.{i}.{meta.name}.weight", meta.axis, meta.heads
            )
    table["model.norm.weight"] = MetaTensor("norm.weight", None)
    table["lm_head.weight"] = OUTPUT
    return table
