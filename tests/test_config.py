"""Configurations: the released variants, and strictness towards what files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_codellama.config import (
    BITS,
    GROUP_SIZES,
    VARIANTS,
    ModelArgs,
    QuantArgs,
    Quantization,
    ffn_size,
    load_config,
)
from mlx_codellama.errors import ConfigError
from mlx_codellama.rotary import RopeScaling

# Published facts, typed in a second time: parameters, heads, kv heads, FFN width, shards; then per flavour
# (vocabulary, theta, context, infilling; None: sources contradict each other).
SIZES = {
    "7b": (6_738_546_688, 32, 32, 11008, 1),
    "13b": (13_016_028_160, 40, 40, 13824, 2),
    "34b": (33_743_970_304, 64, 8, 22016, 4),
    "70b": (68_976_910_336, 64, 8, 28672, 8),
}
FLAVOURS = {
    "7b": (32016, 1e6, 16384, True),
    "7b-python": (32000, 1e6, 16384, False),
    "7b-instruct": (32016, 1e6, 16384, True),
    "13b": (32016, 1e6, 16384, True),
    "13b-python": (32000, 1e6, 16384, False),
    "13b-instruct": (32016, 1e6, 16384, True),
    "34b": (32000, 1e6, 16384, False),
    "34b-python": (32000, 1e6, 16384, False),
    "34b-instruct": (32000, 1e6, 16384, False),
    "70b": (32016, 1e6, 16384, None),
    "70b-python": (32016, 1e4, 4096, False),
    "70b-instruct": (32016, 1e4, 4096, None),
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 288,
    "vocab_size": 272,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
}
PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "rope_theta": 1000000,
}


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_released_variants_are_as_published(name: str) -> None:
    size, variant = name.partition("-")[0], VARIANTS[name]
    parameters, heads, kv_heads, width, shards = SIZES[size]
    args = variant.args
    assert (args.vocab_size, args.rope_theta, args.max_position_embeddings, variant.infill) == FLAVOURS[name]
    assert (args.num_attention_heads, args.num_key_value_heads, args.head_dim) == (heads, kv_heads, 128)
    assert (args.intermediate_size, variant.meta_shards) == (width, shards)
    base = VARIANTS[size].args
    assert args.n_parameters == parameters - 2 * (base.vocab_size - args.vocab_size) * args.hidden_size
    assert not args.tie_word_embeddings
    assert args.rms_norm_eps == 1e-5


def test_all_twelve_variants_are_there() -> None:
    assert VARIANTS.keys() == FLAVOURS.keys()
    assert len(VARIANTS) == 12


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [(4096, 256, 1.0, 11008), (5120, 256, 1.0, 13824), (8192, 256, 1.0, 22016), (8192, 4096, 1.3, 28672)],
)
def test_the_feed_forward_width_follows_metas_rule(dim: int, multiple_of: int, multiplier: float, width: int) -> None:
    assert ffn_size(dim, multiple_of, multiplier) == width


def test_params_of_the_7b_release_give_the_variant() -> None:
    assert ModelArgs.from_params(PARAMS, vocab_size=32016) == VARIANTS["7b"].args


@pytest.mark.parametrize("variant", [None, *FLAVOURS])
def test_a_missing_rope_theta_is_guessed_for_two_variants_only(variant: str | None) -> None:
    params = {k: v for k, v in PARAMS.items() if k != "rope_theta"}
    if variant in ("70b-python", "70b-instruct"):
        args = ModelArgs.from_params(params, vocab_size=32016, variant=variant)
        assert (args.rope_theta, args.max_position_embeddings) == (1e4, 4096)
        return
    with pytest.raises(ConfigError) as caught:
        ModelArgs.from_params(params, vocab_size=32016, variant=variant)
    assert "--rope-theta" in caught.value.hint
    assert ModelArgs.from_params(params, vocab_size=32016, variant=variant, rope_theta=1e6).rope_theta == 1e6


def test_a_contradicted_rope_theta_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradicting"):
        ModelArgs.from_dict(CONFIG, rope_theta=1e4)
    with pytest.raises(ConfigError, match="contradicting"):
        ModelArgs.from_dict({**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})


def test_a_config_survives_the_round_trip() -> None:
    plan = Quantization(QuantArgs(4, 32), {"lm_head": QuantArgs(8, 32), "model.embed_tokens": None})
    args = ModelArgs.from_dict({**CONFIG, "eos_token_id": [2, 7]}).with_quantization(plan)
    assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def test_the_stated_end_of_sequence_counts() -> None:
    assert ModelArgs.from_dict({**CONFIG, "eos_token_id": 5}).eos_token_id == 5  # 2 is the default
    assert ModelArgs.from_dict({**CONFIG, "eos_token_id": [5, 6]}).eos_token_id == (5, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_scaling": {"type": "llama3", "factor": 2}},
        {"rope_scaling": {"factor": 2}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}},  # of another type
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "surprise": 1}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 9}},
        {"rope_scaling": {"type": "yarn", "factor": float("nan")}},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        {"rope_scaling": []},
        {"hidden_size": None},
        {"hidden_size": "96"},
        {"hidden_size": True},
        {"hidden_size": 10**30},
        {"num_hidden_layers": 10**7},  # seven million tensors to list, if it were believed
        {"num_key_value_heads": 3},
        {"head_dim": "x"},
        {"head_dim": 6.0},
        {"head_dim": 5},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": "abc"},
        {"rope_theta": []},
        {"rope_theta": True},
        {"rope_theta": float("inf")},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_theta": "z"}},
        {"rope_parameters": {"rope_type": ["a"]}},
        {"eos_token_id": "x"},
        {"eos_token_id": []},
        {"eos_token_id": [2, "a"]},
        {"eos_token_id": {}},
        {"bos_token_id": "1"},
        {"tie_word_embeddings": "yes"},
        {"torch_dtype": []},
        {"torch_dtype": "int8"},
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"quantization": []},
        {"quantization": {"bits": 4}},
        {"quantization": {"bits": "a", "group_size": 64}},
        {"quantization": {"bits": None, "group_size": 64}},
        {"quantization": {"bits": 7, "group_size": 64}},
        {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 8, "group_size": 64}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": [1]},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_config_with_a_wrong_value_is_refused(change: dict[str, Any]) -> None:
    ModelArgs.from_dict(CONFIG)  # it is the change that is refused
    with pytest.raises(ConfigError):
        ModelArgs.from_dict({**CONFIG, **change})


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_refused_config_says_what_to_compare_it_with(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_act": "gelu"}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in caught.value.hint


# ── what trainers, transformers and MLX write beside the model ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "bookkeeping",
    [
        {"_flash_attn_2_enabled": True, "_attn_implementation_autoset": True, "use_flash_attention_2": False},
        {"unsloth_fixed": True, "unsloth_version": "2024.9", "neftune_noise_alpha": 5},
        {"max_sequence_length": 2048, "sliding_window": None, "auto_map": {"AutoModel": "x.Y"}},
        {"return_dict": True, "torchscript": False, "id2label": {"0": "LABEL_0"}, "pruned_heads": {}},
        {"is_encoder_decoder": False, "add_cross_attention": False, "temperature": 1.0, "top_k": 50},
        {"attention_dropout": 0.1, "partial_rotary_factor": 1.0, "mlp_bias": None},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_that_change_nothing_are_no_error(bookkeeping: dict[str, Any]) -> None:
    assert ModelArgs.from_dict({**CONFIG, **bookkeeping}) == ModelArgs.from_dict(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4096},
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"partial_rotary_factor": 0.5},
        {"rope_interleaved": True},
        {"embedding_multiplier": 2.0},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_that_change_the_numbers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelArgs.from_dict({**CONFIG, **change})


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(CONFIG)
    (tmp_path / "config.json").write_text(text[:-1] + ', "rope_theta": 10000.0}')
    with pytest.raises(ConfigError, match="names 'rope_theta' twice"):
        load_config(tmp_path)


HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": HUGE}, "rope_theta"),
        ({"rope_theta": 1e300}, "rope_theta"),  # its powers overflow
        ({"rope_theta": 10**5000}, "rope_theta"),  # more digits than Python writes out
        ({"rms_norm_eps": HUGE}, "rms_norm_eps"),
        ({"hidden_size": HUGE}, "hidden_size"),
        ({"eos_token_id": HUGE}, "eos_token_id"),
        ({"head_dim": HUGE}, "head_dim"),
        ({"rope_scaling": {"type": "linear", "factor": HUGE}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": HUGE}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 1e-320}}, "beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": HUGE}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": HUGE}}, "original"),
        ({"quantization": {"bits": HUGE, "group_size": 64}}, "bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_without_measure_are_one_clear_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        ModelArgs.from_dict({**CONFIG, **change})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["yarn:1e308", "linear:" + "9" * 400, "ntk:inf", "dynamic:nan", "yarn:0"])
def test_a_scaling_without_measure_is_refused_on_the_command_line_too(text: str) -> None:
    with pytest.raises(ConfigError):
        RopeScaling.parse(text)


def test_a_context_beyond_all_measure_is_refused() -> None:
    args = ModelArgs.from_dict({**CONFIG, "max_position_embeddings": 1 << 61})
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        args.with_scaling(RopeScaling("linear", 1e6))


# ── rotary blocks ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("extra", [{"finetuned": True}, {"truncate": True}, {"partial_rotary_factor": 1.0}])
def test_rotary_keys_that_change_nothing_are_no_error(extra: dict[str, Any]) -> None:
    block = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    read = ModelArgs.from_dict({**CONFIG, "rope_scaling": {**block, **extra}})
    assert read == ModelArgs.from_dict({**CONFIG, "rope_scaling": block})
    assert ModelArgs.from_dict({**CONFIG, "rope_parameters": {"rope_type": "default", **extra}}).rope_scaling is None


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("yarn", {"truncate": False}),
        ("yarn", {"mscale": 0.7}),
        ("yarn", {"partial_rotary_factor": 0.5}),
        ("default", {"partial_rotary_factor": 0.5}),  # the kind without settings was read no further
    ],
)
def test_rotary_keys_that_change_the_angles_are_refused(extra: dict[str, Any], kind: str) -> None:
    with pytest.raises(ConfigError, match=next(iter(extra))):
        ModelArgs.from_dict({**CONFIG, "rope_scaling": {"rope_type": kind, "factor": 2.0, **extra}})


def test_dynamic_scaling_of_a_file_begins_at_the_models_context() -> None:
    # As in transformers (4.36 to 5.24), whose dynamic NTK never looks at original_max_position_embeddings.
    block = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 256}
    args = ModelArgs.from_dict({**CONFIG, "max_position_embeddings": 1024, "rope_scaling": block})
    scaling, length = args.scaling_over(1024)
    assert scaling is not None
    assert (scaling.original, length) == (1024, 1024)  # as trained up to there: with 256 it would be stretched by 13
    assert args.scaling_over(1025)[1] == 2048


# ── MLX's quantization ──────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides_may_be_booleans() -> None:
    said = {"bits": 4, "group_size": 64, "model.embed_tokens": True, "lm_head": False, "model.norm": False}
    plan = ModelArgs.from_dict({**CONFIG, "quantization": said}).quantization
    assert plan is not None
    assert plan.of("model.embed_tokens") == QuantArgs(4, 64)
    assert plan.of("lm_head") is None


def test_an_override_means_mlxs_defaults_where_it_says_nothing() -> None:
    # mlx.nn: to_quantized(group_size=None, bits=None, mode="affine") takes 64 and 4, or 32 and 4 for mxfp4.
    said = {
        "bits": 4,
        "group_size": 32,
        "mode": "mxfp4",
        "lm_head": {"bits": 8},
        "model.embed_tokens": {"mode": "mxfp4"},
    }
    plan = ModelArgs.from_dict({**CONFIG, "quantization": said}).quantization
    assert plan is not None
    assert plan.of("lm_head") == QuantArgs(8, 64, "affine")
    assert plan.of("model.embed_tokens") == QuantArgs(4, 32, "mxfp4")


def test_mlx_may_name_itself() -> None:
    said = {"bits": 4, "group_size": 64, "mode": "affine"}
    named = {**said, "quant_method": "mlx"}
    plan = ModelArgs.from_dict({**CONFIG, "quantization": said, "quantization_config": named}).quantization
    assert plan == Quantization(QuantArgs(4, 64))


# ── ends of sequence ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [
        (2, {"eos_token_id": [2, 7]}, (2, 7)),
        (2, {"eos_token_id": 7}, (2, 7)),
        (2, {"eos_token_id": 2}, 2),
        ([5, 2], {"eos_token_id": [7, 2]}, (5, 2, 7)),
        (2, {"eos_token_id": None, "temperature": 0.2}, 2),
        (2, {}, 2),
        (2, None, 2),
    ],
)
def test_ends_of_generation_config_are_ends(tmp_path: Path, own: Any, generation: Any, ends: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": own}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).eos_token_id == ends


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [2, -1]}', "[]", "{"])
def test_a_generation_config_that_says_no_end_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_parts_of_a_packed_matrix_are_those_of_mlx(mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    kinds = [(4, 32)] if mode == "mxfp4" else [(bits, group) for bits in BITS for group in GROUP_SIZES]
    for bits, group in kinds:
        quant = QuantArgs(bits, group, mode)
        arrays = mx.quantize(mx.zeros((3, 768)), group_size=group, bits=bits, mode=mode)
        parts = quant.parts((3, 768))
        assert [array.shape for array in arrays] == [part.shape for part in parts.values()]
        dtypes = [str(array.dtype).removeprefix("mlx.core.").replace("float32", "float") for array in arrays]
        assert dtypes == [part.dtype for part in parts.values()]
