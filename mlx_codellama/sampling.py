"""Choose the next token from logits, in MLX operations that do not wait for the device.

The order is fixed: repetition penalty; then, at temperature 0, only the argmax. Otherwise: division by the temperature,
top-k, top-p over the tokens that top-k left, min-p relative to the most likely token, and one draw.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """The settings of sampling. The defaults are greedy.

    temperature         0 takes the most likely token; Meta's examples use 0.2 for completion and 0 for infilling
    top_p               keep a token if all more likely tokens have a probability of at most top_p; 1 keeps all
    top_k               keep the k most likely tokens; 0 keeps all
    min_p               keep tokens at least min_p times as likely as the most likely; 0 keeps all
    repetition_penalty  divide positive and multiply negative logits of recent tokens by this; 1 changes nothing
    repetition_window   number of recent tokens, including the prompt
    seed                the same seed, prompt and parameters give the same tokens; None draws a new seed
    Raises ConfigError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("top_p", 0, 1),
            ("top_k", 0, math.inf),
            ("min_p", 0, 1),
            ("repetition_window", 1, math.inf),
            ("seed", 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            whole = name in ("top_k", "repetition_window", "seed")
            if not _is_number(value, whole) or not low <= value <= high or value == math.inf:
                kind = "a whole number" if whole else "a number"
                span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ConfigError(f"{name} is {value!r}; expected {kind} {span}")
        penalty = self.repetition_penalty
        if not _is_number(penalty, False) or not 0 < penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {penalty!r}; expected a number above 0")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _is_number(value: object, whole: bool) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if whole else (int, float))


class SamplerState(NamedTuple):
    """The random key (uint32 [2]) and the recent tokens (int32 [n]); None if the parameters do not need them."""

    key: mx.array | None
    recent: mx.array | None


class Sampler:
    """The choices of one request. Its random key and its recent tokens stay on the device."""

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        """prompt  ids before the first choice; the last repetition_window of them count as recent"""
        self.params = params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._key = None if params.greedy else mx.random.key(seed)
        penal = params.repetition_penalty != 1
        self._recent = mx.array(prompt[-params.repetition_window :], mx.int32) if penal and prompt else None

    @property
    def state(self) -> SamplerState:
        """What the next choice depends on, besides the logits. Set it to rewind the sampler."""
        return SamplerState(self._key, self._recent)

    @state.setter
    def state(self, state: SamplerState) -> None:
        self._key, self._recent = state

    def __call__(self, logits: mx.array) -> mx.array:
        """Choose one token. logits float32 [V] → int32 []."""
        params = self.params
        if self._recent is not None:
            logits = penalise(logits, self._recent, params.repetition_penalty)
        if self._key is None:
            token = mx.argmax(logits).astype(mx.int32)
        else:
            self._key, key = mx.random.split(self._key)
            token = draw(logits, params, key)
        if self._recent is not None:
            self._recent = mx.concatenate([self._recent, token[None]])[-params.repetition_window :]
        return token


def penalise(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Make recent tokens less likely (CTRL, arXiv:1909.05858 §4.1, extended to negative logits).

    logits float32 [V], recent int32 [n] (repeats count once) → float32 [V].
    """
    at = logits[recent]
    return mx.put_along_axis(logits, recent, mx.where(at > 0, at / penalty, at * penalty), axis=0)


def draw(logits: mx.array, params: SamplingParams, key: mx.array) -> mx.array:
    """Draw from the softmax of logits / temperature, limited by top-k, top-p and min-p. float32 [V] → int32 []."""
    logits = (logits - mx.max(logits)) / params.temperature  # the largest is 0, so no temperature overflows
    order = None
    if 0 < params.top_k < logits.size:
        order = mx.argpartition(-logits, params.top_k - 1)[: params.top_k]
        order = order[mx.argsort(-logits[order])]
    elif params.top_p < 1:
        order = mx.argsort(-logits)
    if order is not None:
        logits = logits[order]  # [V] or [k], most likely first
    keep = None
    if params.top_p < 1 or params.min_p > 0:
        probs = mx.softmax(logits)
        keep = probs >= params.min_p * mx.max(probs)
        if params.top_p < 1:
            keep = keep & top_p_keep(probs, params.top_p)
    if keep is not None:
        logits = mx.where(keep, logits, -mx.inf)
    choice = mx.random.categorical(logits, key=key)
    return (choice if order is None else order[choice]).astype(mx.int32)


def top_p_keep(probs: mx.array, top_p: float) -> mx.array:
    """Meta's rule: keep a token if all more likely ones together have a probability of at most top_p.

    probs float32 [n], largest first → bool [n]; the first is always kept. Source: sample_top_p of Meta's generation.py.
    """
    return mx.cumsum(probs, inclusive=False) <= top_p
