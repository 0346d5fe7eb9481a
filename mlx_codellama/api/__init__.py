"""The Python face: load a model, complete, infill and chat as text. Everything below speaks token ids."""

from __future__ import annotations

from mlx_codellama.api.codellama import CodeLlama, load
from mlx_codellama.api.results import Completion, Stats, TokenLogprob
from mlx_codellama.api.stopping import StopMatcher
from mlx_codellama.api.stream import TextStream

__all__ = ["CodeLlama", "Completion", "Stats", "StopMatcher", "TextStream", "TokenLogprob", "load"]
