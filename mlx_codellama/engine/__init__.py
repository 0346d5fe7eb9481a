"""The engine: requests in token ids, served side by side for one model. Text begins in `api`.

In reading order: `request` says what can be asked and what comes back; `generation` is what a caller holds of it;
`engine` is the owner of the model; `run` is the state of one request there, `choices` what it chooses after a pass,
`admission` what is reserved for it; `prefix` finds what earlier requests read; `reading` gives a text's logits.
"""

from __future__ import annotations

from mlx_codellama.engine.consumers import generate, turns
from mlx_codellama.engine.engine import Engine
from mlx_codellama.engine.exclusive import Exclusive
from mlx_codellama.engine.generation import Generation
from mlx_codellama.engine.reading import read_logits
from mlx_codellama.engine.request import FinishReason, Request, Step, check_context, check_ids, check_logprobs

__all__ = [
    "Engine",
    "Exclusive",
    "FinishReason",
    "Generation",
    "Request",
    "Step",
    "check_context",
    "check_ids",
    "check_logprobs",
    "generate",
    "read_logits",
    "turns",
]
