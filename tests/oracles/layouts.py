"""A tiny model as Meta, transformers and mlx-lm themselves write it: torch.save, save_pretrained, mlx_lm.convert.

(tests/oracles/checkpoints.py writes the same layouts without any of them.) Libraries are imported inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from oracles.checkpoints import write_tokenizer
from oracles.meta_reference import Array, Geometry, hf_config
from oracles.transformers_model import transformers_model

# Large enough for a byte-fallback tokenizer, pairwise different, quantisable in groups of 64, two or more shards.
FILED = {
    "mha": Geometry(dim=128, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=384, vocab_size=270, rope_theta=1e6),
    "gqa": Geometry(dim=256, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=704, vocab_size=282, rope_theta=1e6),
}
MULTIPLE_OF = {"mha": 128, "gqa": 64}  # from which Meta's rule gives ffn_dim
CONTEXT = 16384
_AXIS_ONE = ("tok_embeddings", "wo", "w2")


def write_meta(folder: Path, kind: str, weights: Mapping[str, Array], *, shards: int = 1) -> Path:
    """consolidated.NN.pth by torch.save in bfloat16, params.json, tokenizer.model."""
    import torch

    g = FILED[kind]
    folder.mkdir(parents=True)
    params: dict[str, Any] = {
        "dim": g.dim,
        "n_layers": g.n_layers,
        "n_heads": g.n_heads,
        "multiple_of": MULTIPLE_OF[kind],
        "ffn_dim_multiplier": 1.0,
        "norm_eps": g.norm_eps,
        "rope_theta": g.rope_theta,
    }
    if g.n_kv_heads != g.n_heads:
        params["n_kv_heads"] = g.n_kv_heads
    (folder / "params.json").write_text(json.dumps(params))
    write_tokenizer(folder, g.vocab_size)
    for rank in range(shards):
        state = {}
        for name, value in weights.items():
            part = value
            if value.ndim == 2:
                part = np.split(value, shards, axis=int(name.split(".")[-2] in _AXIS_ONE))[rank]
            state[name] = torch.from_numpy(np.ascontiguousarray(part)).to(torch.bfloat16)
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    return folder


def write_transformers(folder: Path, kind: str, weights: Mapping[str, Array], *, shard_bytes: int = 1 << 40) -> Path:
    """save_pretrained of transformers' own model in bfloat16, with tokenizer.model beside it."""
    g = FILED[kind]
    model = transformers_model(weights, g, dtype="bfloat16")
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    write_tokenizer(folder, g.vocab_size)
    return folder


def write_bin(folder: Path, kind: str, weights: Mapping[str, Array], *, shards: int = 1) -> Path:
    """pytorch_model*.bin of transformers' state dict by torch.save, as its older versions did."""
    import torch

    g = FILED[kind]
    folder.mkdir(parents=True)
    config = hf_config(g, max_position_embeddings=CONTEXT) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, g.vocab_size)
    state = transformers_model(weights, g, dtype="bfloat16").state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names, listed = sorted(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[i::shards]
        torch.save({name: state[name] for name in part}, folder / file)
        listed |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def write_hf_tokenizer(folder: Path) -> None:
    """A tokenizer.json that mlx-lm can load; no test reads text with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
