"""The tensors that a quantisation produces: names, shapes, dtypes, bytes. Computed before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_codellama.config import GROUP_SIZES, ModelArgs, QuantArgs, Quantization
from mlx_codellama.errors import ConfigError
from mlx_codellama.weights.specs import TensorSpec, packed_specs


@dataclass(frozen=True)
class TensorSize:
    """One weight of the model (path without `.weight`), its storage and its size."""

    path: str
    shape: tuple[int, ...]
    quant: QuantArgs | None
    specs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        return f"{self.path}.weight"

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class SizeReport:
    """The size of a checkpoint on disk: the exact payload of its safetensors files, without their headers."""

    tensors: tuple[TensorSize, ...]

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all weights of the model, norms included."""
        return 8 * self.n_bytes / self.n_weights

    def by_kind(self) -> dict[str, int]:
        """Number of weights by storage, such as {"4-bit/64": 6476005376, "bfloat16": 266240}."""
        kinds: dict[str, int] = {}
        for t in self.tensors:
            kind = describe(t.quant) if t.quant else t.specs[0].dtype
            kinds[kind] = kinds.get(kind, 0) + t.n_weights
        return kinds

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.n_bytes,
            "weights": self.n_weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "kinds": self.by_kind(),
        }


def describe(quant: QuantArgs) -> str:
    """A short name of one matrix's quantisation: `4-bit/64` (bits, group size) or `mxfp4`."""
    return f"{quant.bits}-bit/{quant.group_size}" if quant.mode == "affine" else quant.mode


def quantizable(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """Module path → (out, in) of every weight that can be quantised: embeddings, projections, head; never norms."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in args.tensor_shapes().items()
        if len(shape) == 2
    }


def check(args: ModelArgs, quantization: Quantization) -> None:
    """Raise ConfigError if an override names no weight of the model, or a group size does not divide a width."""
    shapes = quantizable(args)
    unknown = sorted(set(quantization.overrides) - shapes.keys())
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"the quantisation plan names {unknown[0]}{more}, which the model does not have",
            hint="module paths look like model.layers.0.mlp.down_proj, model.embed_tokens, lm_head",
        )
    for path, (_, width) in shapes.items():
        quant = quantization.of(path)
        if quant is not None and width % quant.group_size:
            fitting = [g for g in GROUP_SIZES if width % g == 0]
            advice = (
                f"its {width} input features divide by {' and '.join(map(str, fitting))}: pass such a group size"
                if fitting
                else f"its {width} input features divide by none of {GROUP_SIZES}, so this model stays as it is"
            )
            raise ConfigError(f"{path}: groups of {quant.group_size} do not divide {width}", hint=advice)


def fit(args: ModelArgs, quantization: Quantization) -> Quantization:
    """The same quantisation, with a smaller group size for those matrices whose width it does not divide.

    Raises ConfigError if no supported group size divides the width.
    """
    overrides = dict(quantization.overrides)
    for path, (_, width) in quantizable(args).items():
        quant = quantization.of(path)
        if quant is None or width % quant.group_size == 0 or quant.mode != "affine":
            continue
        smaller = [g for g in GROUP_SIZES if g < quant.group_size and width % g == 0]
        if smaller:
            overrides[path] = replace(quant, group_size=max(smaller))
    fitted = Quantization(quantization.default, overrides)
    check(args, fitted)
    return fitted


def predict(
    args: ModelArgs, quantization: Quantization | None, *, dtypes: Mapping[str, str] | None = None
) -> SizeReport:
    """The size of the checkpoint under this quantisation; None means unquantised.

    dtypes  tensor name → dtype, for tensors of the source whose dtype differs from args.dtype
    Raises ConfigError if the quantisation does not fit the model.
    """
    if quantization is not None:
        check(args, quantization)
    tensors = []
    for name, shape in args.tensor_shapes().items():
        path = name.removesuffix(".weight")
        quant = quantization.of(path) if quantization is not None and len(shape) == 2 else None
        dtype = (dtypes or {}).get(name, args.dtype)
        specs = packed_specs(path, shape, quant, dtype) if quant else [TensorSpec(name, shape, dtype)]
        tensors.append(TensorSize(path, shape, quant, tuple(specs)))
    return SizeReport(tuple(tensors))
