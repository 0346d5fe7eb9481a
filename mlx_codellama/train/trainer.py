"""Training: initialise, step, evaluate, save, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_unflatten

from mlx_codellama import inputs
from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import CheckpointError, TokenizerError
from mlx_codellama.kernels.adamw import norm as gradient_norm
from mlx_codellama.kernels.cross_entropy import IGNORE, cross_entropy
from mlx_codellama.model import Model
from mlx_codellama.snapshot import sampled_digest
from mlx_codellama.train.optimizer import FusedAdamW
from mlx_codellama.train.packing import Batch
from mlx_codellama.weights import read_state, write_state


@dataclass(frozen=True)
class TrainArgs:
    """The settings that determine a run, besides model and data. The schedule counts steps.

    The learning rate rises over `warmup` steps, stays at `peak_lr`, and falls linearly to peak_lr/30 over the last
    `decay` steps. Before the decay nothing depends on the total number of steps, so a run can be extended.
    """

    steps: int
    peak_lr: float = 3e-3
    warmup: int = 100
    decay: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, 2 …"""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = (self.steps - step) / self.decay if self.decay else 1.0
        return self.peak_lr * up * max(1 / 30, min(1.0, left))


def initialise(args: ModelArgs, *, seed: int) -> Model:
    """Random float32 weights: normal, deviation 0.02, divided by sqrt(2 · layers) for residual outputs; norms are 1."""
    model, key = Model(args), mx.random.key(seed)
    residual = 1 / math.sqrt(2 * args.num_hidden_layers)
    weights = []
    for name, shape in args.tensor_shapes().items():
        key, sub = mx.random.split(key)
        if len(shape) == 1:
            weights.append((name, mx.ones(shape)))
        else:
            scale = 0.02 * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            weights.append((name, scale * mx.random.normal(shape, key=sub)))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def check_batch(batch: Batch, args: ModelArgs) -> None:
    """Raise TokenizerError if an id is outside the vocabulary: the tokenizer is not the model's."""
    for ids in (batch.ids, batch.targets[batch.targets != IGNORE]):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < args.vocab_size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise TokenizerError(
                f"the data has token id {wrong}, the model a vocabulary of {args.vocab_size}",
                hint="the tokenizer that made the ids must be the model's",
            )


def mean_loss(model: Model, batch: Batch) -> mx.array:
    """Cross-entropy in nats, averaged over the targets that are not IGNORE."""
    targets = mx.array(batch.targets)
    logits = model(mx.array(batch.ids)[None], [(None, n) for n in batch.lengths])
    return cross_entropy(logits[0], targets).sum() / mx.maximum((targets != IGNORE).sum(), 1)


def evaluate(model: Model, batches: list[Batch]) -> float:
    """Mean loss in nats over fixed batches, each weighted by its number of targets. Raises like `check_batch`."""
    for batch in batches:
        check_batch(batch, model.args)
    total = sum(batch.n_targets * float(mean_loss(model, batch)) for batch in batches)
    return total / sum(batch.n_targets for batch in batches)


def _named(tree: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def _about(path: Path, text: str) -> dict[str, Any]:
    """The description of the run inside a state. Raises CheckpointError if it is missing."""
    try:
        about: dict[str, Any] = inputs.parse_json(text)
        whole = isinstance(about["args"], dict) and all(type(about[n]) is int for n in ("step", "tokens"))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} does not say what run it is of", hint="name another folder")
    return about


class Trainer:
    """One run: model, optimiser, step counter, and the batches as a function of the step.

    data  a digest of the data, stored in the state; resuming with other data is refused
    """

    def __init__(self, model: Model, args: TrainArgs, batch_of: Callable[[int], Batch], *, data: str = "") -> None:
        self.model, self.args, self.batch_of, self.data = model, args, batch_of, data
        self.step = self.tokens = self.dropped = 0
        self._optimizer = FusedAdamW(
            args.lr(0), betas=list(args.betas), weight_decay=args.weight_decay, bias_correction=True
        )
        self._optimizer.init(model.trainable_parameters())
        self._gradient = value_and_grad(model, mean_loss)

    def train_step(self) -> tuple[float, float]:
        """Advance by one step; returns loss (nats) and the gradient's norm before clipping.

        Raises FloatingPointError if the loss or the gradient is not finite; the parameters then stay as they were.
        """
        batch = self.batch_of(self.step)
        check_batch(batch, self.model.args)
        result, gradients = self._gradient(self.model, batch)
        length = gradient_norm([g for _, g in _named(gradients)])
        mx.eval(result, length)
        loss, norm = float(result), float(length)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {self.step}: loss {loss}, gradient norm {norm}")
        self._optimizer.grad_scale = min(1.0, self.args.clip_norm / (norm + 1e-6))
        self._optimizer.learning_rate = self.args.lr(self.step)
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self._optimizer.state)
        self.step += 1
        self.tokens += batch.n_targets
        self.dropped += batch.n_dropped
        return loss, norm

    def _base(self) -> str:
        """A fingerprint of the frozen parameters; empty if there are none."""
        trained = {name for name, _ in _named(self.model.trainable_parameters())}
        frozen = [(name, array) for name, array in self.model.named_parameters() if name not in trained]
        return sampled_digest(frozen) if frozen else ""

    def save(self, path: Path) -> None:
        """Write the state to one safetensors file, atomically: trainable parameters, optimiser, counters.

        Of frozen parameters it holds only a fingerprint; `resume` requires a model with the same one.
        """
        arrays = {f"model.{k}": v for k, v in _named(self.model.trainable_parameters())}
        arrays |= {f"optimizer.{k}": v for k, v in _named(self._optimizer.state)}
        about: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "args": asdict(self.args), "data": self.data}
        about["base"] = self._base()
        write_state(path, arrays, {"train": json.dumps(about)})

    def resume(self, path: Path) -> None:
        """Continue from `save`. `steps` and `decay` may differ; any other difference is a CheckpointError."""
        arrays, metadata = read_state(path)
        about = _about(path, metadata["train"])
        fixed = {k: v for k, v in asdict(self.args).items() if k not in ("steps", "decay")}
        was = {k: tuple(v) if isinstance(v, list) else v for k, v in about["args"].items() if k in fixed}
        if was != fixed:
            changed = sorted(k for k in fixed if was.get(k) != fixed[k])
            raise CheckpointError(
                f"{path} was trained with other settings: {', '.join(changed)}", hint="name another folder"
            )
        if self.data and about.get("data") and about["data"] != self.data:
            raise CheckpointError(
                f"{path} was trained on other files", hint="pass the same --sources and Python, or name another folder"
            )
        parts: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, array in arrays.items():
            kind, _, rest = name.partition(".")
            parts[kind].append((rest, array))
        shapes = {name: array.shape for name, array in _named(self.model.trainable_parameters())}
        if {name: array.shape for name, array in parts["model"]} != shapes:
            raise CheckpointError(f"{path} holds the parameters of another model", hint="name another folder")
        if about.get("base", "") != self._base():
            raise CheckpointError(
                f"{path} was trained on top of another model", hint="load the model that the run began with"
            )
        self.model.load_weights(parts["model"], strict=False)
        self._optimizer.state = tree_unflatten(parts["optimizer"])
        mx.eval(self.model.parameters(), self._optimizer.state)
        self.step, self.tokens = about["step"], about["tokens"]


@dataclass(frozen=True)
class Report:
    """One line of a run's log."""

    step: int
    tokens: int
    dropped: int  # tokens for which no batch of this process had room
    loss: float
    lr: float
    gradient_norm: float
    tok_s: float
    held_out_loss: float | None = None


def run(
    trainer: Trainer,
    *,
    held_out: list[Batch],
    state_path: Path,
    on_report: Callable[[Report], None],
    report_every: int = 20,
    evaluate_every: int = 500,
    save_every_s: float = 300.0,
    cancel: Callable[[], bool] = lambda: False,
) -> None:
    """Train to args.steps, reporting, evaluating and saving on the way; `cancel` stops after the current step."""
    args, began, saved, tokens, losses = trainer.args, time.monotonic(), time.monotonic(), trainer.tokens, []
    while trainer.step < args.steps and not cancel():
        loss, norm = trainer.train_step()
        losses.append(loss)
        last = trainer.step == args.steps
        evaluated = last or trainer.step % evaluate_every == 0
        if evaluated or trainer.step % report_every == 0:
            speed = (trainer.tokens - tokens) / max(time.monotonic() - began, 1e-9)
            on_report(
                Report(
                    trainer.step,
                    trainer.tokens,
                    trainer.dropped,
                    sum(losses) / len(losses),
                    args.lr(trainer.step - 1),
                    norm,
                    speed,
                    evaluate(trainer.model, held_out) if evaluated else None,
                )
            )
            began, tokens, losses = time.monotonic(), trainer.tokens, []
        if last or time.monotonic() - saved > save_every_s:
            trainer.save(state_path)
            saved = time.monotonic()
    trainer.save(state_path)
