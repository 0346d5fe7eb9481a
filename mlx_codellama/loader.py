"""From a checkpoint folder to a model in memory, or a random model of a given geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_codellama.config import DTYPES, ModelArgs, QuantArgs
from mlx_codellama.errors import CheckpointError, ConfigError, TokenizerError
from mlx_codellama.kernels.dispatch import REINSTALL, backend, check_process, native, native_missing
from mlx_codellama.linear import Linear
from mlx_codellama.memory import has_other_codes, held, keeps_scales, weights_bytes
from mlx_codellama.model import Model
from mlx_codellama.rotary import RopeScaling
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights import Checkpoint, widen_codes

LARGE = 100 * 10**6  # bytes of weights from which on a slow path is worth a word


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer and where they came from."""

    model: Model
    tokenizer: Tokenizer
    path: Path

    @property
    def args(self) -> ModelArgs:
        return self.model.args


def compute_dtype(args: ModelArgs, dtype: str | None = None) -> mx.Dtype:
    """The activations' dtype: as asked, else the checkpoint's, but float32 on a CPU, where 16-bit maths is emulated."""
    name = dtype or ("float32" if backend() == "cpu" else args.dtype)
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", hint=f"known: {', '.join(DTYPES)}")
    result: mx.Dtype = getattr(mx, name)
    return result


def why_slow(args: ModelArgs, wide: bool) -> str:
    """Why this CPU multiplies by the model's packed weights many times slower than it could, and what to do about it;
    empty where it does not, and for a model so small that nobody waits. wide: as `load_model`."""
    if args.quantization is None:
        return ""
    if missing := native_missing():
        large = has_other_codes(args) or weights_bytes(args) >= LARGE
        why = f"no native CPU kernels ({missing}): MLX's own multiply by packed weights, many times slower; {REINSTALL}"
        return why if large else ""
    if native() is not None and not wide and has_other_codes(args):
        return (
            "codes of 2, 3, 5 and 6 bits stay as they are stored, since held as 4 or 8 they would not fit: MLX unpacks "
            "them for every product, many times slower; free memory, or take a model of 4 bits"
        )
    return ""


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
    rope_scaling: RopeScaling | None = None,
    wide: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Loaded:
    """Load a checkpoint folder strictly: every tensor present, none left over, shapes and vocabulary in agreement.

    exact         see kernels/quant_matmul.py
    rope_scaling  stretches positions for more context than the model was trained to read
    wide          hold codes of 2, 3, 5 and 6 bits as 4 or 8, which the native CPU kernels multiply by; without them all
                  codes stay as they are stored
    progress      called with (tensor, bytes read, bytes in all) after each tensor
    Raises CheckpointError, ConfigError or TokenizerError.
    """
    checkpoint = Checkpoint.open(path)
    args = checkpoint.args if rope_scaling is None else checkpoint.args.with_scaling(rope_scaling)
    tokenizer = Tokenizer.load(path)
    check_vocabulary(tokenizer, args)
    read = checkpoint.read if progress is None else _reporting(checkpoint, progress)
    model = _filled(args, read, compute_dtype(args, dtype), exact, wide)
    return Loaded(model, tokenizer, path)


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


def _filled(args: ModelArgs, read: Callable[[str], mx.array], dtype: mx.Dtype, exact: bool, wide: bool = True) -> Model:
    """A model whose every parameter is `read` by name; floating-point ones are cast to dtype.

    Where there are native kernels, scales and biases of packed matrices stay as they are stored, a tenth of the bytes,
    and codes of 2, 3, 5 and 6 bits are laid out in the 4 or 8 that these kernels multiply by, one matrix at a time.
    """
    check_process()
    model = Model(args)
    weights = []
    widened = _widened(model) if wide and native() is not None else {}
    for name, placeholder in model.named_parameters():
        array = read(name)
        if array.shape != placeholder.shape:
            raise CheckpointError(f"{name} has shape {array.shape}, expected {placeholder.shape}")
        if mx.issubdtype(array.dtype, mx.floating) and not _keeps_scale(args, name, wide):
            array = array.astype(dtype)
        mx.eval(array)
        if name in widened:
            layer, stored = widened[name]
            array = widen_codes(array, stored.bits, held(stored).bits)
            layer.widen(held(stored))
        weights.append((name, array))
        del array
    model.load_weights(weights)
    model.set_exact(exact)
    model.eval()
    model.freeze()
    return model


def _widened(model: Model) -> dict[str, tuple[Linear, QuantArgs]]:
    """The matrices whose codes are laid out wider, and how they are stored, by the name of the weight."""
    found = {}
    for path, layer in model.named_modules():
        stored = layer.quant if isinstance(layer, Linear) else None
        if stored is not None and held(stored) != stored:
            found[f"{path}.weight"] = layer, stored
    return found


def _keeps_scale(args: ModelArgs, name: str, wide: bool) -> bool:
    """Whether this is the scale or bias of a matrix that only the native kernels will read."""
    path, _, part = name.rpartition(".")
    quant = args.quant_of(path) if part in ("scales", "biases") else None
    if quant is None or native() is None:
        return False
    return keeps_scales(path, held(quant) if wide else quant)


_MXFP4_SCALE = 127 - 7  # the exponent of 2⁻⁷: codes of ±6 then span ±0.05


def random_model(
    args: ModelArgs, *, seed: int = 0, dtype: str | None = None, exact: bool = False, wide: bool = True
) -> Model:
    """A model of this geometry with small random weights (standard deviation 0.02), quantised as args says."""
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

    return _filled(args, read, compute_dtype(args, dtype), exact, wide)
