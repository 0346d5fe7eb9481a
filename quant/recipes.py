"""Named quantisations. A recipe is a function of the model's dimensions; its result is plain data."""

from __future__ import annotations

from mlx_codellama.config import RECIPES, ModelArgs, QuantArgs, Quantization
from mlx_codellama.errors import ConfigError
from mlx_codellama.quant.plan import check, fit, quantizable


def recipe(name: str, args: ModelArgs, *, group_size: int | None = None) -> Quantization:
    """The quantisation that `name` (a key of config.RECIPES) means for a model of these dimensions.

    group_size  input features per scale: 32, 64 or 128. None means 64, or 32 for those matrices
                whose width 64 does not divide. An explicit size applies everywhere or is refused.
    Raises ConfigError.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", hint=f"known recipes: {', '.join(RECIPES)}")
    if name == "mxfp4":
        if group_size not in (None, 32):
            raise ConfigError("mxfp4 has groups of 32", hint="leave the group size out")
        plan = Quantization(QuantArgs(4, 32, "mxfp4"))
    elif name == "mixed":
        plan = _mixed(args, group_size or 64)
    else:
        plan = Quantization(QuantArgs(int(name[1:]), group_size or 64))
    if group_size is None:
        return fit(args, plan)
    check(args, plan)
    return plan


def uniform(args: ModelArgs, bits: int, *, group_size: int | None = None) -> Quantization:
    """`bits` (2, 3, 4, 5, 6 or 8) for every matrix; the same as the recipe `q<bits>`."""
    return recipe(f"q{QuantArgs(bits).bits}", args, group_size=group_size)


def _mixed(args: ModelArgs, group_size: int) -> Quantization:
    """4 bits, with more bits where errors do most harm.

    embed_tokens, lm_head (8 bits)  Every token passes through one row of the first, and an error there is an error in
        all layers' input; the second's error reaches the logits with no layer after it to average it out. Together
        they are 4 % of a 7B model.
    v_proj (6 bits)  Attention weights sum to one, so the error of a value passes through undamped, while errors of
        queries and keys must first change a softmax. With grouped queries (34B, 70B) eight heads share a value and the
        matrix is small.
    down_proj (6 bits)  Its input is a product of two activations: a few features are far larger than the rest and
        multiply the errors of their weights.
    Only in the first and last eighth of the layers: the first affect everything after them, and the last write
    directly to the logits. Those in between correct each other through the residual sum.
    """
    layers = args.num_hidden_layers
    edge = max(1, layers // 8)
    outer = {i for i in range(layers) if i < edge or i >= layers - edge}
    wide: dict[str, QuantArgs | None] = {}
    for path in quantizable(args):
        if path in ("model.embed_tokens", "lm_head"):
            wide[path] = QuantArgs(8, group_size)
        elif path.endswith(("v_proj", "down_proj")) and int(path.split(".")[2]) in outer:
            wide[path] = QuantArgs(6, group_size)
    return Quantization(QuantArgs(4, group_size), wide)
