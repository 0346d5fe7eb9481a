"""The cost of quantisation: errors of the weights, and their effect on the predictions of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_codellama.errors import ConfigError


@dataclass(frozen=True)
class TensorError:
    """relative_rms = sqrt(sum (w' - w)^2 / sum w^2); max_abs = max |w' - w|; over n_weights weights."""

    relative_rms: float
    max_abs: float
    n_weights: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ErrorSums:
    """Partial sums of a TensorError. Sums of disjoint parts of a tensor can be added."""

    squared_error: float = 0.0
    squared: float = 0.0
    max_abs: float = 0.0
    n_weights: int = 0

    def measure(self, truth: mx.array, got: mx.array) -> None:
        """Add the errors of got against truth [rows, columns], any floats. Sums rows in float32, then in float64."""
        truth, got = truth.astype(mx.float32), got.astype(mx.float32)
        difference = got - truth
        by_row = mx.stack([mx.square(difference).sum(-1), mx.square(truth).sum(-1), mx.abs(difference).max(-1)])
        squared_error, squared, max_abs = np.array(by_row).astype(np.float64)
        self.add(ErrorSums(float(squared_error.sum()), float(squared.sum()), float(max_abs.max()), truth.size))

    def add(self, other: ErrorSums) -> None:
        self.squared_error += other.squared_error
        self.squared += other.squared
        self.max_abs = max(self.max_abs, other.max_abs)
        self.n_weights += other.n_weights

    def result(self) -> TensorError:
        """The TensorError. If the truth is all zeros, the relative error is infinite, or 0 if there is no error."""
        if self.squared:
            relative = math.sqrt(self.squared_error / self.squared)
        else:
            relative = math.inf if self.squared_error else 0.0
        return TensorError(relative, self.max_abs, self.n_weights)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text. KL is KL(reference ‖ model) of the next-token distributions, in nats."""

    n_tokens: int
    mean_kl: float
    max_kl: float
    reference_perplexity: float
    model_perplexity: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Logits = Callable[[list[int]], Any]


def compare(
    reference_logits: Logits, model_logits: Logits, ids: Sequence[int], *, window: int = 512, bos: int | None = None
) -> Comparison:
    """Teacher-force both models over ids and compare their next-token distributions.

    reference_logits, model_logits  ids → logits [len(ids), V], NumPy or MLX; row i predicts the token after ids[i]
    ids     the text's tokens, cut into pieces of `window` that are read separately, so memory is window · V floats
    bos     if given, put before every piece (ids must not contain it)
    Perplexity is exp of the mean of -log p(next token) over the predicted tokens. Sums are float64.
    Raises ConfigError if there is nothing to predict or the vocabularies differ.
    """
    lead = [] if bos is None else [bos]
    kls: list[npt.NDArray[np.float64]] = []
    agreed, reference_nll, model_nll = 0, 0.0, 0.0
    for first in range(0, len(ids), window):
        tokens = lead + list(ids[first : first + window])
        if len(tokens) < 2:
            continue
        p, q = _log_softmax(reference_logits(tokens)), _log_softmax(model_logits(tokens))
        if p.shape != q.shape:
            raise ConfigError(f"the models' logits have shapes {p.shape} and {q.shape}: they are not comparable")
        p, q, rows, following = p[:-1], q[:-1], np.arange(len(tokens) - 1), np.array(tokens[1:])
        kls.append((np.exp(p) * (p - q)).sum(-1))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        reference_nll -= float(p[rows, following].sum())
        model_nll -= float(q[rows, following].sum())
    if not kls:
        raise ConfigError("the text is too short to compare models on", hint="give at least two tokens")
    kl = np.concatenate(kls)
    n = len(kl)
    return Comparison(
        n, float(np.mean(kl)), float(np.max(kl)), math.exp(reference_nll / n), math.exp(model_nll / n), agreed / n
    )


def _log_softmax(logits: Any) -> npt.NDArray[np.float64]:
    x: npt.NDArray[np.float64] = np.array(logits, dtype=np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x
