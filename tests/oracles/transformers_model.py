"""The same tiny model as transformers builds it. torch is imported inside: collection needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from oracles.meta_reference import Array, Geometry, hf_config, to_hf


def transformers_model(weights: Mapping[str, Array], geometry: Geometry, *, dtype: str = "float32") -> Any:
    """LlamaForCausalLM with eager attention that holds Meta's `weights`; every tensor must find its place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{k: v for k, v in hf_config(geometry).items() if k not in ("torch_dtype", "architectures", "model_type")}
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    state = {
        name: torch.from_numpy(np.array(value)).to(getattr(torch, dtype))
        for name, value in to_hf(weights, geometry).items()
    }
    model.load_state_dict(state, strict=True)
    assert model.model.rotary_emb.config.rope_parameters["rope_theta"] == geometry.rope_theta
    return model


def transformers_logits(model: Any, ids: Any) -> Array:
    """Logits [B, L, V] float64 of token ids [B, L]."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor(np.asarray(ids))).logits.double().numpy())


def transformers_greedy(model: Any, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Greedy continuation by transformers' own generate, not stopping at the end-of-text id."""
    import torch

    with torch.no_grad():
        out = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(i) for i in out[0, len(prompt) :]]
