"""convert and quantize: every option reaches the work, and what is reported is what was done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from oracles.checkpoints import random_weights, tiny_args, write_hf, write_meta

from mlx_codellama.config import QuantArgs, Quantization, load_config
from mlx_codellama.weights import Checkpoint, read_header

from .conftest import Run, document


def payload(folder: Path) -> int:
    return sum(info.nbytes for path in folder.glob("*.safetensors") for info in read_header(path).values())


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_group_size_is_obeyed_or_refused(run: Run, tiny: str, tmp_path: Path, verb: str) -> None:
    assert run(verb, tiny, tmp_path / "a", "-q", "q4", "--group-size", 32).exit_code == 0
    assert load_config(tmp_path / "a").quantization == Quantization(QuantArgs(4, 32))
    refused = run(verb, tiny, tmp_path / "b", "--bits", 8, "--group-size", 64)  # the feed-forward part is 96 wide
    assert refused.exit_code == 1
    assert "groups of 64 do not divide 96" in refused.stderr
    assert not (tmp_path / "b").exists()


def test_options_for_what_a_meta_folder_does_not_say_are_used(run: Run, tmp_path: Path) -> None:
    args = tiny_args(n_layers=1)
    source = write_meta(tmp_path / "meta", args, random_weights(args))
    params = json.loads((source / "params.json").read_text())
    del params["rope_theta"]
    (source / "params.json").write_text(json.dumps(params))
    silent = run("convert", source, tmp_path / "out")
    assert silent.exit_code == 1
    assert "rope_theta" in silent.stderr
    assert run("convert", source, tmp_path / "out", "--rope-theta", 12345).exit_code == 0
    assert load_config(tmp_path / "out").rope_theta == 12345
    other = run("convert", source, tmp_path / "other", "--rope-theta", 12345, "--variant", "7b")
    assert other.exit_code == 1
    assert "7b" in other.stderr
    assert not (tmp_path / "other").exists()


def test_verify_compares_in_the_dtype_of_the_conversion(run: Run, tiny: str, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "out", "--dtype", "float16", "--verify")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("tensors"))
    assert lines[heading].split() == ["tensors", "stored", "bits", "error", "max", "error", "wrong"]
    assert lines[heading + 1].startswith("model.embed_tokens.weight × 1")
    where = f"every tensor is in {tmp_path / 'out' / 'run.json'}"
    assert lines[-1] == f"verified    every weight is within its error bound; {where}"


def test_a_conversion_that_is_found_wrong_fails(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_codellama.convert import verify as verify_module

    verify = verify_module.verify

    def after_damage(source: Checkpoint, out: Path, **options: object) -> object:
        file = out / "model.safetensors"
        info = read_header(file)["model.layers.1.mlp.up_proj.weight"]
        with file.open("r+b") as raw:
            raw.seek(info.offset)
            raw.write(bytes(info.nbytes))
        return verify(source, out, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verify_module, "verify", after_damage)
    as_json = run("convert", tiny, tmp_path / "json", "--bits", 8, "--verify", "--json")
    assert (as_json.exit_code, document(as_json)["verify"]["ok"]) == (1, False)  # a bad verdict is a document too
    result = run("convert", tiny, tmp_path / "out", "--bits", 8, "--verify")
    assert result.exit_code == 1
    assert "NOT GOOD" in result.stdout
    assert "error: model.layers.1.mlp.up_proj.weight differs from the source" in result.stderr
    assert "hint: convert again" in result.stderr


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_the_run_is_recorded_and_json_stands_alone(
    run: Run, tiny: str, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/mlx-codellama", verb, "a b"])
    result = run(verb, tiny, tmp_path / "out", "--bits", 3, "--json", *(["--verify"] if verb == "convert" else []))
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    got, kept = document(result), json.loads((tmp_path / "out" / "run.json").read_text())
    assert (kept["command"], kept["input"]) == (["mlx-codellama", verb, "a b"], tiny)
    assert (got["out"], got["source"]) == (str(tmp_path / "out"), tiny)
    assert got["source_bytes"] == 4 * got["parameters"]
    assert got["predicted_bytes"] == payload(tmp_path / "out")


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_an_existing_output_is_refused_first_and_replaced_on_request(
    run: Run, tiny: str, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out"
    assert run(verb, tiny, out, "--bits", 8).exit_code == 0
    result = run(verb, tmp_path / "no-such-source", out)
    assert result.exit_code == 1
    assert f"error: {out} exists" in result.stderr
    assert run(verb, tiny, out, "--bits", 4, "--overwrite").exit_code == 0
    quantization = load_config(out).quantization
    assert quantization is not None
    assert quantization.default.bits == 4


def test_quantize_makes_four_bits_unless_told(run: Run, tiny: str, tmp_path: Path) -> None:
    for extra, bits in (((), 4), (("--bits", 6), 6), (("-q", "q3"), 3)):
        out = tmp_path / f"{bits}"
        assert run("quantize", tiny, out, *extra).exit_code == 0
        quantization = load_config(out).quantization
        assert quantization is not None
        assert quantization.default.bits == bits


def test_sizes_are_predicted_from_the_dtype_of_each_tensor_and_errors_are_those_of_run_json(
    run: Run, tmp_path: Path
) -> None:
    args = tiny_args(n_layers=1)
    weights = random_weights(args)
    weights |= {k: v for k, v in random_weights(replace(args, dtype="float32")).items() if "norm" in k}
    source = write_hf(tmp_path / "mixed", args, weights)
    got = document(run("convert", source, tmp_path / "out", "--bits", 5, "--json"))
    assert got["predicted_bytes"] == payload(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["source"]["quantization"]["tensor_errors"]
    errors = {name: entry["relative_rms"] for name, entry in kept.items()}
    assert got["worst_tensor"] == {"name": max(errors, key=errors.__getitem__), "relative_rms": max(errors.values())}
    assert got["mean_relative_rms"] == pytest.approx(sum(errors.values()) / len(errors))
    shown = run("convert", source, tmp_path / "again", "--bits", 5).stdout
    assert f"at worst ({got['worst_tensor']['name']})" in shown
