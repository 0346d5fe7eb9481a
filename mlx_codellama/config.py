"""The description of a model: dimensions, rotary settings, quantisation, and the twelve released variants.

Field names are those of Hugging Face's `config.json`. We guess nothing: a missing rope_theta, an unknown key or a
contradiction is an error with a hint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_codellama import inputs
from mlx_codellama.config_keys import FIXED, INERT
from mlx_codellama.errors import ConfigError, MissingThetaError, shown
from mlx_codellama.rotary import RopeScaling

BITS = (2, 3, 4, 5, 6, 8)
NATIVE_BITS = (4, 8)  # code widths that the native CPU kernels support; other codes are widened or unpacked
GROUP_SIZES = (32, 64, 128)
MODES = ("affine", "mxfp4")
# The cost in quality depends on the model; `quantize --report` measures it on a text.
RECIPES = {
    "q2": "2 bits everywhere",
    "q3": "3 bits everywhere",
    "q4": "4 bits everywhere (the default of `quantize`)",
    "q5": "5 bits everywhere",
    "q6": "6 bits everywhere",
    "q8": "8 bits everywhere",
    "mxfp4": "4-bit floating point with power-of-two scales in groups of 32",
    "mixed": "4 bits, but 8 for embeddings and head and 6 for the most sensitive projections",
}
DTYPES = ("float16", "bfloat16", "float32")
MAX_TOKENS = {"complete": 128, "infill": 128, "chat": 512}  # default number of new tokens of a call
_MLX_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4)}  # group size and bits
DEMO = Path(__file__).resolve().parent / "demo"  # the bundled model
MOST_TOKENS = 1 << 40  # of a context; no memory holds more, even at one byte per token and layer
MAX_LAYERS = 1000  # a file that claims more is damaged, and listing its tensors would take too long


def parameters_text(n: int) -> str:
    """A readable number of parameters: 6.74 billion, 8.64 million."""
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"


class Part(NamedTuple):
    """One array of a packed matrix. dtype "float" means the float type in which scales and biases are stored."""

    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class QuantArgs:
    """The quantisation of one weight matrix. group_size is the number of input features that share a scale."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"unknown quantisation mode {self.mode!r}", hint=f"known modes: {', '.join(MODES)}")
        if self.mode == "mxfp4" and (self.bits, self.group_size) != (4, 32):
            raise ConfigError("mxfp4 is 4 bits in groups of 32", hint="pass bits=4, group_size=32")
        if self.bits not in BITS:
            raise ConfigError(f"cannot quantise to {self.bits} bits", hint=f"choose one of {BITS}")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"unknown group size {self.group_size}", hint=f"choose one of {GROUP_SIZES}")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight with 16-bit scale and bias (affine) or an 8-bit shared scale (mxfp4)."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the arrays of a packed matrix, in the order of files."""
        return ("weight", "scales") if self.mode == "mxfp4" else ("weight", "scales", "biases")

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The arrays of a packed matrix [O, I], in the layout of mx.quantize: codes in whole words, scales by group.

        This works for any I, but packing needs whole groups and words (`weights.packed_specs`).
        """
        rows, columns = shape
        codes = Part((rows, math.ceil(columns * self.bits / 32)), "uint32")
        group = Part((rows, math.ceil(columns / self.group_size)), "uint8" if self.mode == "mxfp4" else "float")
        return dict(zip(self.part_names, (codes, group, group), strict=False))

    def to_dict(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantArgs:
        unknown = set(data) - {"group_size", "bits", "mode"}
        if unknown:
            raise ConfigError(f"unknown quantisation keys: {', '.join(sorted(unknown))}")
        for key in ("bits", "group_size"):
            if key not in data:
                raise ConfigError(f"quantization lacks {key!r}")
            if not _is_natural(data[key]):
                raise ConfigError(f"quantization has {key} = {shown(data[key])}; expected a whole number")
        return cls(data["bits"], data["group_size"], str(data.get("mode", "affine")))


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a checkpoint: a default, and overrides by module path (None = not quantised).

    Module paths are MLX's, such as `model.layers.0.mlp.down_proj`, `model.embed_tokens`, `lm_head`.
    """

    default: QuantArgs
    overrides: Mapping[str, QuantArgs | None] = field(default_factory=dict)

    def of(self, path: str) -> QuantArgs | None:
        return self.overrides.get(path, self.default)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization` of config.json in MLX's format."""
        return self.default.to_dict() | {
            path: args.to_dict() if args else False for path, args in sorted(self.overrides.items())
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantization:
        """Read MLX's format: for a module path false (not quantised), true (the default), or an override.

        Missing settings of an override have MLX's defaults for its mode (`to_quantized` in mlx.nn), not those of the
        checkpoint.
        """
        top = {k: v for k, v in data.items() if not isinstance(v, (Mapping, bool)) and k != "quant_method"}
        overrides: dict[str, QuantArgs | None] = {}
        for path, value in data.items():
            if isinstance(value, Mapping):
                group_size, bits = _MLX_DEFAULTS.get(str(value.get("mode", "affine")), (64, 4))
                overrides[path] = QuantArgs.from_dict({"group_size": group_size, "bits": bits, **value})
            elif value is False:
                overrides[path] = None
        return cls(QuantArgs.from_dict(top), overrides)


@dataclass(frozen=True)
class ModelArgs:
    """The dimensions of a Llama model. The letters in comments are the shape letters of all docstrings."""

    hidden_size: int  # E
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    intermediate_size: int  # F
    vocab_size: int  # V
    rope_theta: float
    max_position_embeddings: int  # context length of training, in tokens
    rms_norm_eps: float = 1e-5
    head_dim: int = 0  # D; 0 means hidden_size // num_attention_heads
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not _is_natural(value) or value < 1:
                raise ConfigError(f"{name} is {shown(value)}; expected a positive integer")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers is {self.num_hidden_layers}; expected at most {MAX_LAYERS}")
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", ends)):
            if not ids or not all(map(_is_natural, ids)):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; expected a token id")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings is {shown(self.tie_word_embeddings)}; expected true or false")
        if not _is_natural(self.head_dim):
            raise ConfigError(f"head_dim is {shown(self.head_dim)}; expected an even number")
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads",
                    hint="state head_dim in config.json",
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads do not divide over {self.num_key_value_heads} key-value heads"
            )
        if not (_is_number(self.rope_theta) and 1 < self.rope_theta <= MAX_THETA):
            raise ConfigError(f"rope_theta is {shown(self.rope_theta)}; expected a number above 1, at most 1e30")
        if not (_is_number(self.rms_norm_eps) and 0 < self.rms_norm_eps < 1):
            raise ConfigError(f"rms_norm_eps is {shown(self.rms_norm_eps)}; expected a small positive number")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}", hint=f"known: {', '.join(DTYPES)}")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token adds to a 16-bit cache."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the unquantised model, name → shape (out, in), in the order checkpoints are written."""
        e, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, e)}
        for i in range(self.num_hidden_layers):
            p = f"model.layers.{i}"
            shapes |= {
                f"{p}.input_layernorm.weight": (e,),
                f"{p}.self_attn.q_proj.weight": (q, e),
                f"{p}.self_attn.k_proj.weight": (kv, e),
                f"{p}.self_attn.v_proj.weight": (kv, e),
                f"{p}.self_attn.o_proj.weight": (e, q),
                f"{p}.post_attention_layernorm.weight": (e,),
                f"{p}.mlp.gate_proj.weight": (f, e),
                f"{p}.mlp.up_proj.weight": (f, e),
                f"{p}.mlp.down_proj.weight": (e, f),
            }
        shapes["model.norm.weight"] = (e,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, e)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Hugging Face's `config.json`, with MLX's `quantization` if there is one."""
        data: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": False,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict(),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "vocab_size": self.vocab_size,
        }
        if self.quantization:
            data["quantization"] = self.quantization.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, rope_theta: float | None = None) -> ModelArgs:
        """Read Hugging Face's `config.json`, strictly.

        rope_theta  for a file that has none; it is an error if the file has a different one.
        Raises ConfigError for an unknown key, a missing one, a bias, another architecture, or unknown rotary scaling.
        """
        unknown = set(data) - _FIELDS - FIXED.keys() - INERT
        if unknown:
            raise ConfigError(
                f"unknown config keys: {', '.join(sorted(unknown))}",
                hint="this runtime reads Llama-shaped models; a key it does not know may change the model's meaning",
            )
        for key, allowed in FIXED.items():
            if key in data and not any(data[key] == value for value in allowed):
                raise ConfigError(f"config has {key} = {shown(data[key])}, which Code Llama does not use")
        dtypes = {str(data[k]) for k in ("torch_dtype", "dtype") if data.get(k) is not None}
        if len(dtypes) > 1:
            raise ConfigError(f"torch_dtype and dtype disagree: {sorted(dtypes)}")
        theta = _theta(data, rope_theta)
        scaling = _scaling(data)
        missing = [name for name in _REQUIRED if data.get(name) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        values = {k: data[k] for k in _FIELDS & data.keys() if data[k] is not None and k not in _SPECIAL}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if (eos := data.get("eos_token_id")) is not None:
            values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else eos
        stated = [q for q in (_mapping(data, "quantization"), _mapping(data, "quantization_config")) if q is not None]
        for quantization in stated:
            method = quantization.get("quant_method", "mlx" if "bits" in quantization else "an unknown method")
            if method != "mlx":
                raise ConfigError(
                    f"cannot read a checkpoint quantised by {shown(method)}",
                    hint="convert the unquantised release, or an mlx-community checkpoint",
                )
        plans = [Quantization.from_dict(quantization) for quantization in stated]
        if len(plans) == 2 and plans[0] != plans[1]:
            raise ConfigError("quantization and quantization_config disagree")
        return cls(
            **values,
            rope_theta=theta,
            dtype=dtypes.pop().removeprefix("torch.") if dtypes else "bfloat16",
            quantization=plans[0] if plans else None,
            rope_scaling=scaling,
        )

    @classmethod
    def from_params(
        cls, params: Mapping[str, Any], *, vocab_size: int, rope_theta: float | None = None, variant: str | None = None
    ) -> ModelArgs:
        """Read Meta's `params.json`. It states no vocabulary and, for two variants, no rope_theta.

        vocab_size  rows of `output.weight`; the file may have -1 or nothing
        variant     a key of VARIANTS; the 70B Python and Instruct variants may omit rope_theta (then 1e4)
        """
        known = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
        unknown = set(params) - known - {"rope_theta", "vocab_size", "max_seq_len", "max_batch_size"}
        if unknown:
            raise ConfigError(f"unknown keys in params.json: {', '.join(sorted(unknown))}")
        missing = {"dim", "n_layers", "n_heads", "multiple_of", "norm_eps"} - set(params)
        if missing:
            raise ConfigError(f"params.json lacks {', '.join(sorted(missing))}")
        stated = params.get("vocab_size", -1)
        if stated not in (-1, vocab_size):
            raise ConfigError(f"params.json says vocab_size {stated}, the weights have {vocab_size} rows")
        defaults: dict[str, Any] = {}
        if variant is not None:
            released = VARIANTS.get(variant)
            if released is None:
                raise ConfigError(f"unknown variant {variant!r}", hint=f"known: {', '.join(VARIANTS)}")
            defaults["max_position_embeddings"] = released.args.max_position_embeddings
            if params.get("rope_theta") is None and variant in ("70b-python", "70b-instruct"):
                defaults["rope_theta"] = released.args.rope_theta
        theta = _theta({**defaults, **{k: v for k, v in params.items() if v is not None}}, rope_theta)
        return cls(
            hidden_size=params["dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
            intermediate_size=ffn_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")),
            vocab_size=vocab_size,
            rope_theta=theta,
            max_position_embeddings=defaults.get("max_position_embeddings", 16384 if theta > 1e4 else 4096),
            rms_norm_eps=params["norm_eps"],
        )

    def quant_of(self, path: str) -> QuantArgs | None:
        """The quantisation of the matrix at module `path`; None if it is not quantised."""
        return self.quantization.of(path) if self.quantization else None

    def with_scaling(self, scaling: RopeScaling) -> ModelArgs:
        """The same model with rotary scaling: L is its trained context, and the new context is s times L.

        Raises ConfigError if the model already has a scaling.
        """
        if self.rope_scaling is not None:
            raise ConfigError(
                "the model's positions are scaled by its own config already", hint="leave out the scaling"
            )
        trained = self.max_position_embeddings
        scaling = replace(scaling, original=trained)
        return replace(self, rope_scaling=scaling, max_position_embeddings=int(trained * scaling.factor))

    def scaling_over(self, n_tokens: int) -> tuple[RopeScaling | None, int]:
        """`RopeScaling.over` for a text of n_tokens; (None, 0) if positions are not scaled."""
        return self.rope_scaling.over(n_tokens, self.max_position_embeddings) if self.rope_scaling else (None, 0)

    def with_quantization(self, quantization: Quantization | None) -> ModelArgs:
        return replace(self, quantization=quantization)


_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_SPECIAL = {"rope_theta", "dtype", "torch_dtype", "quantization", "quantization_config", "eos_token_id"}
_SPECIAL |= {"rope_scaling", "rope_parameters"}
_FIELDS = {
    *_REQUIRED,
    *_SPECIAL,
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "bos_token_id",
}
MAX_THETA = 1e30  # far above any model's, far below overflow


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: object) -> bool:
    """Whether arithmetic with value is safe: neither NaN nor infinite, nor an integer too large for a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """data[key], or None if it is absent or null. Raises ConfigError if it is not an object."""
    value = data.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {shown(value)}; expected an object")
    return value


def _theta(data: Mapping[str, Any], given: float | None) -> float:
    """The rope_theta on which file and caller agree."""
    parameters = _mapping(data, "rope_parameters") or {}
    values = [v for v in (data.get("rope_theta"), parameters.get("rope_theta"), given) if v is not None]
    for value in values:
        if not _is_number(value):
            raise ConfigError(f"rope_theta is {shown(value)}; expected a number above 1")
    stated = set(map(float, values))
    if not stated:
        raise MissingThetaError(
            "the model does not say its rope_theta",
            hint='add "rope_theta": 1000000 to config.json, or convert with --rope-theta 1000000 '
            "(all Code Llama models except 70B Python and Instruct, which use 10000)",
        )
    if len(stated) > 1:
        raise ConfigError(f"contradicting values of rope_theta: {', '.join(f'{v:g}' for v in sorted(stated))}")
    return stated.pop()


def _scaling(data: Mapping[str, Any]) -> RopeScaling | None:
    """The rotary scaling on which rope_scaling and rope_parameters agree."""
    stated = [
        RopeScaling.from_dict(d) for d in (_mapping(data, "rope_scaling"), _mapping(data, "rope_parameters")) if d
    ]
    if len(set(stated)) > 1:
        raise ConfigError("rope_scaling and rope_parameters disagree")
    scaling = stated[0] if stated else None
    if scaling is not None and scaling.kind == "dynamic":
        # transformers uses max_position_embeddings as L, whatever the block says (modeling_rope_utils.py, 4.36 to 5).
        return replace(scaling, original=None)
    return scaling


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward block by Meta's rule (llama/model.py): 2/3 of 4·dim, scaled, rounded up."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def read_object(path: Path, *, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError; `hint` is for a missing or unreadable file."""
    try:
        data = inputs.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not readable JSON: {error}", hint="fetch the file again, or put right what it says"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold an object")
    return data


def load_config(path: Path, *, rope_theta: float | None = None) -> ModelArgs:
    """Read and check `config.json` (a file, or the folder that holds it).

    For a folder, the ends of sequence in generation_config.json are added.
    """
    folder = path if path.is_dir() else None
    path = path / "config.json" if folder else path
    data = read_object(path, hint="a model folder holds config.json")
    try:
        args = ModelArgs.from_dict(data, rope_theta=rope_theta)
    except ConfigError as error:
        error.hint = error.hint or f"compare {path} with config.json of the released model"
        raise
    return args if folder is None else _with_ends(args, folder / "generation_config.json")


def _with_ends(args: ModelArgs, path: Path) -> ModelArgs:
    """args with the ends of sequence of generation_config.json, if there is one, after its own."""
    try:
        stated = read_object(path, hint="").get("eos_token_id")
    except ConfigError:
        if path.exists():
            raise
        return args
    more = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(map(_is_natural, more)):
        raise ConfigError(f"{path} has eos_token_id = {shown(stated)}; expected a token id, or several")
    own = args.eos_token_id if isinstance(args.eos_token_id, tuple) else (args.eos_token_id,)
    ends = tuple(dict.fromkeys((*own, *more)))
    return args if ends == own else replace(args, eos_token_id=ends)


@dataclass(frozen=True)
class Variant:
    """One released model: its dimensions and abilities (Meta's model card and code, see docs/formats.md)."""

    name: str
    args: ModelArgs
    infill: bool | None  # None: sources contradict each other, so the tokenizer decides
    meta_shards: int
    chat: str = ""  # "" (no dialogs), "inst" or "source"


def _released() -> dict[str, Variant]:
    sizes = {
        "7b": (4096, 32, 32, 32, 11008, 1),
        "13b": (5120, 40, 40, 40, 13824, 2),
        "34b": (8192, 48, 64, 8, 22016, 4),
        "70b": (8192, 80, 64, 8, 28672, 8),
    }
    variants = {}
    for size, (e, layers, h, k, f, shards) in sizes.items():
        for flavour in ("", "-python", "-instruct"):
            short = size == "70b" and flavour != ""  # not fine-tuned for long context
            infill: bool | None = size in ("7b", "13b") and flavour != "-python"
            if size == "70b" and flavour != "-python":
                infill = None
            args = ModelArgs(
                hidden_size=e,
                num_hidden_layers=layers,
                num_attention_heads=h,
                num_key_value_heads=k,
                intermediate_size=f,
                vocab_size=32016 if infill or size == "70b" else 32000,
                rope_theta=1e4 if short else 1e6,
                max_position_embeddings=4096 if short else 16384,
                eos_token_id=(2, 32015) if size + flavour == "70b-instruct" else 2,
            )
            chat = "" if flavour != "-instruct" else "source" if size == "70b" else "inst"
            variants[size + flavour] = Variant(size + flavour, args, infill, shards, chat)
    return variants


VARIANTS = _released()
UNSTATED_THETA = 1e4  # Meta's default if params.json has none; right only for 70B Python and Instruct

# Geometries for benchmarks and memory plans. "1.1b" has Code Llama's head size, but no such weights exist.
GEOMETRIES: dict[str, ModelArgs] = {
    "1.1b": ModelArgs(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32016,
        rope_theta=1e6,
        max_position_embeddings=16384,
    ),
    **{size: VARIANTS[size].args for size in ("7b", "13b", "34b", "70b")},
}
