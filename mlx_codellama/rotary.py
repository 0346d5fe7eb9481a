"""Rotary scaling, for models that were not trained on long texts. Settings only, no arrays.

Four kinds, named as in the papers, with a factor s over the L tokens of the model's training:

  linear   positions divided by s (position interpolation, Chen et al. 2023, arXiv:2306.15595)
  ntk      theta · s^(D/(D-2)): fast pairs stay, the slowest is divided by s (NTK-aware, bloc97 2023)
  dynamic  ntk with s·l/L - (s - 1) instead of s, for texts of l > L tokens; no scaling for shorter texts
  yarn     fast pairs stay, slow ones are divided by s, with a ramp between; queries and keys are multiplied by
           0.1 ln s + 1 (Peng et al. 2023, arXiv:2309.00071)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_codellama.errors import ConfigError, shown

KINDS = ("linear", "ntk", "dynamic", "yarn")
_KEYS = {
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "rope_theta",  # also in rope_parameters; config reads it
}
_YARN = {"beta_fast", "beta_slow", "attention_factor"}
# Keys without effect at these values: `finetuned` is a note, whole heads are rotated, and the ramp of yarn (other kinds
# have none) begins and ends at whole pairs.
_FIXED = {"finetuned": (True, False, None), "partial_rotary_factor": (1, None), "truncate": (True, None)}
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class RopeScaling:
    """One rotary scaling.

    kind              one of KINDS
    factor            s, at least 1
    original          L, tokens; None for the model's max_position_embeddings
    beta_fast, _slow  yarn: pairs that rotate more than beta_fast times in L tokens stay; below beta_slow: divided
    attention_factor  yarn: factor of cosines and sines; None for 0.1 ln s + 1
    Raises ConfigError for values out of range.
    """

    kind: str
    factor: float
    original: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown rotary scaling {str(self.kind)[:40]!r}", hint=f"known: {', '.join(KINDS)}")
        for name in ("factor", "beta_fast", "beta_slow"):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(
                    f"{name} of the rotary scaling is {shown(getattr(self, name))}; expected a number from 1e-9 to 1e9"
                )
        if not 1 <= self.factor <= MAX_FACTOR:
            raise ConfigError(f"the rotary scaling has the factor {self.factor!r}; expected 1 to {MAX_FACTOR:,.0f}")
        if self.beta_slow > self.beta_fast:
            raise ConfigError(f"beta_slow {self.beta_slow!r} is above beta_fast {self.beta_fast!r}")
        if self.attention_factor is not None and not _is_positive(self.attention_factor):
            raise ConfigError(f"attention_factor is {shown(self.attention_factor)}; expected a number from 1e-9 to 1e9")
        if self.original is not None and not (type(self.original) is int and 0 < self.original < 1 << 40):
            raise ConfigError(
                f"original_max_position_embeddings is {shown(self.original)}; expected a positive integer"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RopeScaling | None:
        """Read Hugging Face's `rope_scaling` or `rope_parameters` strictly; None for the type "default".

        Raises ConfigError for an unknown type or key, and for keys that belong to another type.
        """
        kinds = {str(data[key]) for key in ("rope_type", "type") if data.get(key) is not None}
        for key, allowed in _FIXED.items():
            if (
                key in data
                and not any(data[key] == value for value in allowed)
                and (key != "truncate" or "yarn" in kinds)
            ):
                raise ConfigError(f"the rotary settings have {key} = {shown(data[key])}, which is not supported")
        data = {key: value for key, value in data.items() if key not in _FIXED}
        if len(kinds) != 1:
            if not kinds and data.keys() <= {"rope_theta"}:
                return None
            raise ConfigError(f"rotary scaling of type {sorted(kinds)!r}", hint=f"known: {', '.join(KINDS)}")
        kind = kinds.pop()
        if kind == "default":
            return None
        unknown = data.keys() - (_KEYS if kind == "yarn" else _KEYS - _YARN)
        if unknown:
            raise ConfigError(f"unknown keys for rotary scaling {kind[:40]!r}: {', '.join(sorted(map(str, unknown)))}")
        given = {key: data[key] for key in ("factor", *_YARN) if data.get(key) is not None}
        if kind in KINDS and "factor" not in given:
            raise ConfigError(f"rotary scaling {kind!r} lacks its factor")
        return cls(kind, given.pop("factor", 1.0), data.get("original_max_position_embeddings"), **given)

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """`linear:4`, `ntk:2`, `dynamic:2`, `yarn:8`, as written on a command line. Raises ConfigError."""
        kind, _, factor = text.partition(":")
        try:
            return cls(kind, float(factor))
        except ValueError:
            raise ConfigError(f"{text!r} is not a rotary scaling", hint="write it like yarn:4") from None

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.original is not None:
            data["original_max_position_embeddings"] = self.original
        if self.kind == "yarn":
            data |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
            if self.attention_factor is not None:
                data["attention_factor"] = self.attention_factor
        return data

    def over(self, n_tokens: int, context: int) -> tuple[RopeScaling, int]:
        """This scaling with L set, and the l of `dynamic`, for a text of n_tokens.

        l is a multiple of L, so that calls of similar length can share a cache; 0 for other kinds and short texts.
        context: the model's max_position_embeddings.
        """
        trained = self.original or context
        length = trained * max(1, math.ceil(n_tokens / trained)) if self.kind == "dynamic" else 0
        return replace(self, original=trained), length


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 1e-9 <= value <= 1e9  # type: ignore[operator]
