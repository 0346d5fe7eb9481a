"""Our model and mlx-lm's, built from Meta's tiny weights without any file: what differs is the maths alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from oracles.meta_reference import Array, Geometry, hf_config, to_hf

from mlx_codellama.config import ModelArgs
from mlx_codellama.model import Model


def our_model(weights: Mapping[str, Array], geometry: Geometry, *, dtype: str = "float32") -> Model:
    """mlx_codellama's model of these weights; every tensor must find its place."""
    model = Model(ModelArgs.from_dict(hf_config(geometry)))
    model.load_weights(_arrays(weights, geometry, dtype), strict=True)
    return model


def mlx_lm_model(weights: Mapping[str, Array], geometry: Geometry, *, dtype: str = "float32") -> Any:
    """mlx-lm's model of these weights."""
    from mlx_lm.models.llama import Model as Peer
    from mlx_lm.models.llama import ModelArgs as PeerArgs

    model = Peer(PeerArgs.from_dict(hf_config(geometry)))
    model.load_weights(_arrays(weights, geometry, dtype), strict=True)
    return model


def logits(model: Any, ids: Any) -> Array:
    """Logits [B, L, V] float64 of token ids [B, L], in one pass without a cache."""
    out = model(mx.array(np.asarray(ids)))
    return np.asarray(np.array(out.astype(mx.float32)), np.float64)


def rms(x: Array) -> float:
    """Root mean square, the size of an error."""
    return float(np.sqrt(np.mean(np.square(x))))


def _arrays(weights: Mapping[str, Array], geometry: Geometry, dtype: str) -> list[tuple[str, mx.array]]:
    return [(name, mx.array(value).astype(getattr(mx, dtype))) for name, value in to_hf(weights, geometry).items()]
