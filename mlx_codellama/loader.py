"""From a checkpoint folder to a model in memory, or a random model of a given geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_codellama.config import ModelArgs, QuantArgs
from mlx_codellama.errors import CheckpointError, TokenizerError
from mlx_codellama.kernels.dispatch import check_process
from mlx_codellama.linear import Linear
from mlx_codellama.model import Model
from mlx_codellama.placement import Placement, place
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights import Checkpoint, widen_codes


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer and where they came from."""

    model: Model
    tokenizer: Tokenizer
    path: Path

    @property
    def args(self) -> ModelArgs:
        return self.model.args


def check_vocabulary(tokenizer: Tokenizer, args: ModelArgs) -> None:
    """Raise TokenizerError unless every row of the model's vocabulary is a piece and every piece has a row.

    Fewer pieces than rows would run, and end at the first token that is none: the variants that infill have 32016 rows,
    the others 32000, and their tokenizers are easily mixed up.
    """
    pieces, rows = tokenizer.vocab_size, args.vocab_size
    if pieces == rows:
        return
    more = rows - pieces
    if more > 0 and {pieces, rows} != {32000, 32016}:
        cut = f"cut the embedding and the head to {pieces} rows (transformers: model.resize_token_embeddings({pieces}))"
        if rows % 64 == 0 and more < 1024:
            hint = f"the {more} rows beyond look like padding to a multiple of 64; {cut}"
        else:
            hint = f"a fine-tune seems to have added {more}, such as [PAD], which tokenizer.model does not hold; {cut}"
    else:
        hint = (
            "take tokenizer.model from the model's own release: the variants that infill have 32016 pieces, the "
            "others 32000"
        )
    raise TokenizerError(f"the tokenizer has {pieces} pieces, the model {rows} rows of vocabulary", hint=hint)


def load_model(
    path: Path,
    *,
    dtype: str | None = None,
    exact: bool = False,
    placement: Placement | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Loaded:
    """Load a checkpoint folder strictly: every tensor present, none left over, shapes and vocabulary in agreement.

    dtype, exact  as in `place`
    placement     decided already, of the checkpoint's args, which may be stretched; stands for the two above
    progress      called with (tensor, bytes read, bytes in all) after each tensor
    Raises CheckpointError, ConfigError or TokenizerError.
    """
    checkpoint = Checkpoint.open(path)
    placement = placement or place(checkpoint.args, dtype=dtype, exact=exact)
    tokenizer = Tokenizer.load(path)
    check_vocabulary(tokenizer, placement.args)
    read = checkpoint.read if progress is None else _reporting(checkpoint, progress)
    return Loaded(_filled(placement, read), tokenizer, path)


def _reporting(checkpoint: Checkpoint, progress: Callable[[str, int, int], None]) -> Callable[[str], mx.array]:
    """checkpoint.read, which tells progress how far it is."""
    sizes, done = {spec.name: spec.nbytes for spec in checkpoint.specs}, 0

    def read(name: str) -> mx.array:
        nonlocal done
        array = checkpoint.read(name)
        mx.eval(array)
        done += sizes[name]
        progress(name, done, sum(sizes.values()))
        return array

    return read


def _filled(placement: Placement, read: Callable[[str], mx.array]) -> Model:
    """A model whose every parameter is `read` by name, then cast and laid out as placement says, one at a time."""
    check_process()
    model, dtype = Model(placement.args), getattr(mx, placement.dtype)
    weights, widened = [], _widened(model, placement)
    for name, placeholder in model.named_parameters():
        array = read(name)
        if array.shape != placeholder.shape:
            raise CheckpointError(f"{name} has shape {array.shape}, expected {placeholder.shape}")
        if mx.issubdtype(array.dtype, mx.floating) and not placement.keeps_dtype(name):
            array = array.astype(dtype)
        mx.eval(array)
        if name in widened:
            layer, stored, held = widened[name]
            array = widen_codes(array, stored.bits, held.bits)
            layer.widen(held)
        weights.append((name, array))
        del array
    model.load_weights(weights)
    model.set_exact(placement.exact)
    model.eval()
    model.freeze()
    return model


def _widened(model: Model, placement: Placement) -> dict[str, tuple[Linear, QuantArgs, QuantArgs]]:
    """The matrices whose codes are laid out wider, how they are stored and held, by the name of the weight."""
    found = {}
    for path, layer in model.named_modules():
        stored = layer.quant if isinstance(layer, Linear) else None
        held = placement.held(path)
        if stored is not None and held is not None and held != stored:
            found[f"{path}.weight"] = layer, stored, held
    return found


_MXFP4_SCALE = 127 - 7  # the exponent of 2⁻⁷: codes of ±6 then span ±0.05


def random_model(
    args: ModelArgs,
    *,
    seed: int = 0,
    dtype: str | None = None,
    exact: bool = False,
    placement: Placement | None = None,
) -> Model:
    """A model of this geometry with small random weights (standard deviation 0.02), quantised as args says.

    placement  of these args, decided already; stands for dtype and exact
    """
    placement = placement or place(args, dtype=dtype, exact=exact)
    shapes, rng = args.tensor_shapes(), np.random.default_rng(seed)

    def read(name: str) -> mx.array:
        path, _, part = name.rpartition(".")
        shape = shapes[f"{path}.weight"]
        if len(shape) == 1:
            return mx.ones(shape)
        quant = args.quant_of(path)
        if quant is None:
            return mx.array(rng.standard_normal(shape, np.float32) * np.float32(0.02))
        packed = quant.parts(shape)[part]
        if packed.dtype == "uint32":  # every code equally likely
            return mx.array(rng.integers(0, 1 << 32, packed.shape, np.uint32))
        if packed.dtype == "uint8":
            return mx.full(packed.shape, _MXFP4_SCALE, mx.uint8)
        step = 0.02 * 12**0.5 / 2**quant.bits
        return mx.full(packed.shape, step if part == "scales" else -step * (2**quant.bits - 1) / 2, mx.float16)

    return _filled(placement, read)
