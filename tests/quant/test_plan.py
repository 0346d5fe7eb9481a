from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlx_codellama.config import VARIANTS, ModelArgs, QuantArgs, Quantization
from mlx_codellama.errors import ConfigError
from mlx_codellama.quant import RECIPES, fit, predict, recipe, uniform
from mlx_codellama.quant.plan import check, quantizable


def test_every_recipe_fits_every_released_model() -> None:
    for variant in VARIANTS.values():
        for name in RECIPES:
            report = predict(variant.args, recipe(name, variant.args))
            assert report.n_weights == variant.args.n_parameters


def test_four_bits_take_four_and_a_half_bits_per_weight() -> None:
    args = VARIANTS["7b"].args
    report = predict(args, recipe("q4", args))
    norms = (2 * 32 + 1) * 4096
    expected = (args.n_parameters - norms) * 4.5 / 8 + norms * 2  # 4 bits and two 16-bit numbers per 64 weights
    assert report.n_bytes == expected
    assert 4.5 < report.bits_per_weight < 4.501


def test_mixed_is_wider_exactly_where_it_says() -> None:
    args = VARIANTS["7b"].args
    plan = recipe("mixed", args)
    bits = {path: plan.of(path).bits for path in quantizable(args)}  # type: ignore[union-attr]
    assert bits["model.embed_tokens"] == bits["lm_head"] == 8
    six = {path for path, b in bits.items() if b == 6}
    layers = [0, 1, 2, 3, 28, 29, 30, 31]
    assert six == {f"model.layers.{i}.{m}" for i in layers for m in ("self_attn.v_proj", "mlp.down_proj")}
    q4, mixed, q5 = (predict(args, recipe(n, args)).n_bytes for n in ("q4", "mixed", "q5"))
    assert q4 < mixed < q5


def test_a_width_that_64_does_not_divide_falls_back_to_32(args: ModelArgs) -> None:
    odd = replace(args, intermediate_size=352)  # 11 · 32
    plan = recipe("q4", odd)
    assert plan.of("model.layers.1.mlp.down_proj") == QuantArgs(4, 32)
    assert plan.of("model.layers.1.mlp.up_proj") == QuantArgs(4, 64)


def test_a_stated_group_size_is_obeyed_or_refused(args: ModelArgs) -> None:
    assert recipe("q4", replace(args, intermediate_size=704), group_size=64).overrides == {}
    with pytest.raises(ConfigError, match=r"down_proj: groups of 64 do not divide 352") as caught:
        recipe("q4", replace(args, intermediate_size=352), group_size=64)
    assert "32" in caught.value.hint


@pytest.mark.parametrize("group_size", [None, 64])
def test_a_width_that_nothing_divides_is_an_error_that_says_so(args: ModelArgs, group_size: int | None) -> None:
    with pytest.raises(ConfigError, match="do not divide 688") as caught:
        recipe("q4", replace(args, intermediate_size=688), group_size=group_size)
    assert "stays as it is" in caught.value.hint


def test_mixed_keeps_its_edges_in_a_shallow_model_and_obeys_a_group_size(args: ModelArgs) -> None:
    plan = recipe("mixed", args, group_size=32)
    wide = {path for path, quant in plan.overrides.items() if quant and quant.bits == 6}
    assert wide == {f"model.layers.{i}.{m}" for i in (0, 2) for m in ("self_attn.v_proj", "mlp.down_proj")}
    assert {plan.of(path).group_size for path in quantizable(args)} == {32}  # type: ignore[union-attr]


def test_uniform_is_the_recipe_of_its_bits_in_groups_and_all(args: ModelArgs) -> None:
    for group_size in (None, 32, 64):
        assert uniform(args, 6, group_size=group_size) == recipe("q6", args, group_size=group_size)
    assert uniform(args, 6, group_size=32).default == QuantArgs(6, 32)


def test_fit_takes_the_largest_group_that_divides_and_keeps_what_is_planned(args: ModelArgs) -> None:
    planned = Quantization(QuantArgs(4, 128), {"lm_head": None, "model.embed_tokens": QuantArgs(8, 32)})
    fitted = fit(args, planned)  # widths 192, 384 and 320
    assert fitted.of("lm_head") is None
    assert fitted.of("model.embed_tokens") == QuantArgs(8, 32)
    assert fitted.of("model.layers.1.mlp.up_proj") == QuantArgs(4, 64)
    assert fitted.of("model.layers.1.self_attn.o_proj") == QuantArgs(4, 128)


def test_a_prediction_goes_by_the_dtype_of_each_tensor(args: ModelArgs) -> None:
    head, norm = "lm_head.weight", "model.norm.weight"
    plain, mixed = (predict(args, None, dtypes=dtypes) for dtypes in (None, {head: "float32", norm: "float32"}))
    assert mixed.n_bytes - plain.n_bytes == 2 * (259 * 192 + 192)
    quantised = predict(args, recipe("q4", args), dtypes={head: "float32"})
    size = next(t for t in quantised.tensors if t.name == head)
    assert [spec.dtype for spec in size.specs] == ["uint32", "float32", "float32"]
    assert size.bits_per_weight == 4 + 2 * 32 / 64
    assert quantised.by_kind() == {"4-bit/64": args.n_parameters - 7 * 192, "bfloat16": 7 * 192}


def test_a_module_can_be_left_unquantised(args: ModelArgs) -> None:
    plan = Quantization(QuantArgs(8, 32), {"lm_head": None})
    report = predict(args, plan)
    head = next(t for t in report.tensors if t.path == "lm_head")
    assert head.quant is None
    assert head.n_bytes == 259 * 192 * 2
    assert report.by_kind()["bfloat16"] == 259 * 192 + (2 * 3 + 1) * 192


def test_a_plan_for_another_model_is_refused(args: ModelArgs) -> None:
    with pytest.raises(ConfigError, match=r"names model\.layers\.3"):
        check(args, Quantization(QuantArgs(), {"model.layers.3.mlp.up_proj": QuantArgs(8)}))


def test_unknown_recipes_and_bits_are_refused(args: ModelArgs) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'q7'") as caught:
        recipe("q7", args)
    assert "mixed" in caught.value.hint
    with pytest.raises(ConfigError, match="7 bits"):
        uniform(args, 7)
    with pytest.raises(ConfigError, match="groups of 32"):
        recipe("mxfp4", args, group_size=64)


def test_a_plan_survives_config_json(args: ModelArgs) -> None:
    for name in RECIPES:
        plan = recipe(name, args)
        written = json.loads(json.dumps(args.with_quantization(plan).to_dict()))
        assert ModelArgs.from_dict(written).quantization == plan
