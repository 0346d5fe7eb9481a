"""convert, quantize, inspect, plan, doctor, bench: what they report, and that the numbers are those of the files."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from oracles.checkpoints import random_weights, tiny_args, write_hf, write_meta, write_npz

from mlx_codellama.api.speed import Speed
from mlx_codellama.cli import output
from mlx_codellama.cli import progress as progress_module
from mlx_codellama.cli.progress import _plain, bytes_progress, line
from mlx_codellama.config import GEOMETRIES, VARIANTS, load_config
from mlx_codellama.kernels import dispatch
from mlx_codellama.memory import GPU, plan, with_bits
from mlx_codellama.placement import place
from mlx_codellama.storage import KVStorage
from mlx_codellama.weights import FileRows, Progress, read_header

from .conftest import Run, document


def test_convert_quantises_reports_sizes_and_verifies(run: Run, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "q4"
    result = run("convert", tiny, out, "-q", "q4", "--group-size", 32, "--verify", "--json")
    assert result.exit_code == 0, result.stderr
    got = document(result)
    payload = sum(info.nbytes for info in read_header(out / "model.safetensors").values())
    assert got["predicted_bytes"] == payload
    assert payload < got["written_bytes"] < payload + 10_000  # the header comes on top
    assert got["bits_per_weight"] == pytest.approx(8 * payload / got["parameters"], abs=1e-3)
    assert got["verify"]["tensors"]
    record = json.loads((out / "run.json").read_text())
    assert "verify" in json.dumps(record)
    assert load_config(out).quantization is not None
    assert run("complete", "def", "-m", out, "-n", 3).exit_code == 0


def test_the_folder_one_stands_in_can_be_replaced_and_verified(
    run: Run, tiny: str, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    assert run("convert", tiny, out).exit_code == 0
    (tmp_path / "source").symlink_to(tiny)
    monkeypatch.chdir(out)
    result = run("convert", "../source", ".", "--dtype", "float16", "--overwrite", "--verify", "--json")
    monkeypatch.chdir(tmp_path)
    assert result.exit_code == 0, result.stderr
    got = document(result)
    assert got["written_bytes"] > got["predicted_bytes"] > 0
    assert got["verify"]["ok"]
    assert got["out"] == "."


@pytest.mark.parametrize("kind", ["a link", "a file", "no model"])
def test_what_cannot_be_replaced_is_refused_before_anything_is_read(
    run: Run, tiny: str, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "a link":
        out.symlink_to(tiny)
    elif kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    result = run("convert", tmp_path / "no-such-source", out, "--overwrite")
    assert result.exit_code == 1
    assert ("is a symbolic link" if kind == "a link" else "is no model folder") in result.stderr
    assert "no-such-source" not in result.stderr


def test_an_interrupted_verification_says_that_the_folder_is_complete(
    run: Run, tiny: str, tmp_path: Path, monkeypatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_codellama.convert.verify.verify", interrupted)
    result = run("convert", tiny, tmp_path / "out", "--verify")
    assert "is complete; it was not verified" in result.stderr
    assert load_config(tmp_path / "out").vocab_size > 0


def test_convert_says_for_people_what_it_wrote(run: Run, tiny: str, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "o", "--dtype", "float16")
    assert result.exit_code == 0, result.stderr
    assert f"wrote {tmp_path / 'o'}" in result.stdout
    assert "16.000 bits" in result.stdout
    assert "to write" in result.stderr


def test_an_existing_output_is_refused_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("convert", tmp_path / "no-such-source", tmp_path / "out")
    assert result.exit_code == 1
    assert "exists" in result.stderr
    assert "hint: pass --overwrite" in result.stderr


def test_overwrite_replaces_the_output(run: Run, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", tiny, out, "--bits", 8).exit_code == 0
    assert run("convert", tiny, out, "--bits", 4, "--overwrite").exit_code == 0
    quantization = load_config(out).quantization
    assert quantization is not None
    assert quantization.default.bits == 4


@pytest.mark.parametrize("extra", [("-q", "q4", "--bits", "4"), ("--group-size", "32")])
def test_contradicting_quantisations_are_wrong_use(run: Run, tiny: str, tmp_path: Path, extra: tuple[str, ...]) -> None:
    assert run("convert", tiny, tmp_path / "out", *extra).exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_source_is_never_overwritten_by_what_is_made_of_it(run: Run, tiny: str, tmp_path: Path, verb: str) -> None:
    source = tmp_path / "model" / "release"
    assert run("convert", tiny, source).exit_code == 0
    (tmp_path / "model" / "config.json").write_bytes((source / "config.json").read_bytes())  # --overwrite takes it
    before = {path: path.read_bytes() for path in source.iterdir()}
    for out in (source, tmp_path / "model", source / ".." / "release"):
        result = run(verb, source, out, "--bits", 4, "--overwrite")
        assert result.exit_code == 1
        assert "would be lost" in result.stderr
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_an_empty_text_is_refused_before_anything_is_written(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    result = run("quantize", tiny, tmp_path / "out", "--bits", 8, "--report", tmp_path / "text")
    assert result.exit_code == 1
    assert "empty" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin", "weights.npz"])
def test_an_unconverted_release_names_the_command_that_converts_it(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for command in (("complete", "x", "-m", tmp_path), ("quantize", tmp_path, tmp_path / "out")):
        result = run(*command)
        assert result.exit_code == 1
        assert f"hint: mlx-codellama convert {tmp_path} OUT" in result.stderr


def test_quantize_measures_kl_and_perplexity_on_a_text(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("def f(a):\n    return a + 1\n" * 20)
    two, eight = (
        document(
            run("quantize", tiny, tmp_path / str(bits), "--bits", bits, "--report", tmp_path / "text.py", "--json")
        )
        for bits in (2, 8)
    )
    assert 0 < eight["report"]["mean_kl"] < two["report"]["mean_kl"]
    assert eight["mean_relative_rms"] < two["mean_relative_rms"]
    assert eight["written_bytes"] > two["written_bytes"]
    assert two["report"]["reference_perplexity"] == eight["report"]["reference_perplexity"]


def test_quantising_twice_is_refused(run: Run, tiny: str, tmp_path: Path) -> None:
    assert run("quantize", tiny, tmp_path / "a").exit_code == 0
    result = run("quantize", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    assert "already quantised" in result.stderr
    assert not (tmp_path / "b").exists()


def test_inspect_tells_dimensions_tensors_and_abilities(run: Run, tiny: str) -> None:
    got = document(run("inspect", tiny, "--json"))
    args = load_config(Path(tiny))
    assert got["parameters"] == args.n_parameters
    assert {t["name"]: tuple(t["shape"]) for t in got["tensors"]} == args.tensor_shapes()
    assert got["bytes"] == 4 * args.n_parameters
    assert got["can"] == {"complete": True, "infill": True, "chat_format": "inst"}
    text = run("inspect", tiny).stdout
    assert "6 query, 3 key-value, 32 wide" in text
    assert "model.layers.*.mlp.down_proj.weight" in text
    assert "model.layers.1.mlp.down_proj.weight" in run("inspect", tiny, "--tensors").stdout


def test_inspect_reads_no_weights(run: Run, tiny: str, tmp_path: Path) -> None:
    """A hole of a terabyte in place of the weights: whoever reads it does not come back."""
    shape = (2**19, 2**19)
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 4 * shape[0] * shape[1])
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TB")
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    result = run("inspect", tmp_path)
    assert result.exit_code == 1  # one tensor that no model has
    assert "error: " in result.stderr


def test_inspect_reads_descriptions_only(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(FileRows, "read", never)
    got = document(run("inspect", tiny, "--json"))
    assert got["bits_per_weight"] == 32


def test_inspect_tells_how_a_model_is_quantised_and_counts_tensors_of_a_kind(
    run: Run, tiny: str, tmp_path: Path
) -> None:
    assert run("convert", tiny, tmp_path / "q", "--bits", 6, "--dtype", "float16").exit_code == 0
    got = document(run("inspect", tmp_path / "q", "--json"))
    assert got["bytes"] == sum(info.nbytes for info in read_header(tmp_path / "q" / "model.safetensors").values())
    assert got["bits_per_weight"] == pytest.approx(8 * got["bytes"] / got["parameters"], abs=1e-4)
    assert 6.5 < got["bits_per_weight"] < 8
    text = run("inspect", tmp_path / "q").stdout
    assert "6 bits, groups of 64, affine; the rest float16; 2 matrices otherwise" in text
    (up,) = [line.split() for line in text.splitlines() if line.startswith("model.layers.*.mlp.up_proj.weight")]
    assert up == ["model.layers.*.mlp.up_proj.weight", "96", "×", "12", "uint32", "2", "9.22", "kB"]


@pytest.mark.parametrize(
    ("infill", "step", "form"), [(False, False, "inst"), (True, False, "inst"), (True, True, "source")]
)
def test_inspect_tells_abilities_by_the_tokenizer(
    run: Run, tmp_path: Path, infill: bool, step: bool, form: str
) -> None:
    from mlx_codellama.tokenizer import Tokenizer, train_tokenizer, with_infill_pieces

    from .conftest import write_checkpoint

    text = Path(__file__).read_text(encoding="utf-8")
    plain = train_tokenizer([text], tmp_path / "tokenizer.model", vocab_size=400, infill=False)
    tokenizer = Tokenizer(with_infill_pieces(plain.model_bytes, step=step)) if infill else plain
    folder = write_checkpoint(tmp_path / "model", tokenizer)
    assert document(run("inspect", folder, "--json"))["can"] == {
        "complete": True,
        "infill": infill,
        "chat_format": form,
    }
    text = run("inspect", folder).stdout
    assert ("no infill pieces" in text) == (not infill)
    assert (", step " in text) == step


def test_inspect_of_a_folder_without_a_tokenizer_says_what_is_missing(run: Run, tiny: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny) / name).read_bytes())
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 1
    assert "has no tokenizer.model" in result.stderr


def test_plan_of_a_variant_is_the_arithmetic_of_memory(run: Run) -> None:
    got = document(run("plan", "--variant", "34b", "--bits", 4, "--context", 5000, "--dtype", "float16", "--json"))
    expected = plan(with_bits(VARIANTS["34b"].args, 4), 5000, runtime=GPU)
    assert got["weights_bytes"] == expected.weights_bytes
    assert got["kv_bytes"] == expected.kv_bytes
    assert got["total_bytes"] == got["weights_bytes"] + got["kv_bytes"] + got["activations_bytes"]
    assert run("plan", "34b", "--context", 5000, "--dtype", "float16", "--json").stdout  # the name alone will do


def test_plan_says_what_would_fit_instead(run: Run) -> None:
    asked = ("plan", "7b", "--bits", 8, "--context", 16384, "--memory", "14GB", "--dtype", "float16")
    got = document(run(*asked, "--json"))
    assert not got["fits"]
    assert 0 < got["largest_context"] < 16384
    assert any(c["fits"] for c in got["choices"])
    assert not all(c["fits"] for c in got["choices"])
    text = run(*asked).stdout
    assert "It does not fit" in text
    assert f"{got['largest_context']:,} tokens of context would fit" in text
    best = max(c["bits"] for c in got["choices"] if c["fits"])
    assert f"At this context {best} bits would fit" in text
    again = document(run(*asked[:4], "--context", got["largest_context"], *asked[6:], "--json"))
    assert again["fits"]


def test_plan_obeys_a_context_beyond_the_models_and_says_so(run: Run) -> None:
    result = run("plan", "7b", "--context", 100_000)
    assert "100,000 tokens of context" in result.stdout
    assert "trained for 16,384" in result.stdout


def test_plan_holds_against_the_budget_of_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "3GB")
    got = document(run("plan", "7b", "--json"))
    assert got["limit_bytes"] == 3 * 10**9
    assert got["limit"] == "MLX_CODELLAMA_MEMORY"
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "plenty")
    result = run("plan", "7b")
    assert result.exit_code == 1
    assert "'plenty' is not an amount of memory" in result.stderr


@pytest.mark.parametrize("native", [True, False])
def test_plan_counts_only_what_this_machines_kernels_write_out(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(dispatch, "backend", lambda: "cpu")
    monkeypatch.setattr(dispatch, "native", lambda: object() if native else None)
    activations = {}
    for bits in (16, 4, 8, 6):
        placement = place(with_bits(VARIANTS["7b"].args, bits))
        runtime = placement.runtime
        assert (runtime.name, runtime.compute_bytes, runtime.fused) == ("cpu", 4, native)
        activations[bits] = placement.plan(256).activations_bytes
    assert all((activations[bits] > activations[16]) == (not native) for bits in (4, 8, 6))  # unpacks weights
    half, plain = (place(with_bits(VARIANTS["7b"].args, bits), dtype="bfloat16") for bits in (4, 16))
    assert half.plan(256).activations_bytes == plain.plan(256).activations_bytes
    assert (half.runtime.fused, half.runtime.unpacked_kv_bytes == 0) == (native, native)


@pytest.mark.skipif(dispatch.native() is None, reason="no native kernels")
def test_plan_says_how_other_widths_are_held_here(run: Run) -> None:
    six, eight = (document(run("plan", "7b", "--bits", bits, "--memory", "64GB", "--json")) for bits in (6, 8))
    assert six["weights_bytes"] == eight["weights_bytes"]
    assert (six["held_wider"], eight["held_wider"]) == (True, None)
    assert "of 5 and 6 as 8" in run("plan", "7b", "--bits", 6, "--memory", "64GB").stdout
    tight = run("plan", "34b", "--bits", 2, "--context", 256, "--memory", "17GB", "--json")
    assert document(tight)["held_wider"] is False
    assert document(tight)["fits"]
    assert "slower" in run("plan", "34b", "--bits", 2, "--context", 256, "--memory", "17GB").stdout


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 2), ("bfloat16", 1)])
def test_plan_says_that_float32_takes_twice_the_16_bits_of_a_file(run: Run, dtype: str, factor: int) -> None:
    asked = ("plan", "7b", "--bits", 16, "--dtype", dtype)
    got = document(run(*asked, "--json"))
    assert got["weights_bytes"] == factor * 2 * got["parameters"]
    assert got["value_bytes"] == 2 * factor
    assert ("takes twice that in memory" in run(*asked).stdout) == (factor == 2)


def test_a_16_bit_checkpoint_that_is_widened_is_said_to_be(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, quantised = tmp_path / "half", tmp_path / "q8"
    assert run("convert", tiny, half, "--dtype", "float16").exit_code == 0
    assert run("convert", tiny, quantised, "--bits", 8, "--dtype", "float16").exit_code == 0
    n = load_config(half).n_parameters
    note = f"the weights are float16, {output.bytes_text(2 * n)}; computing in float32 they take"
    for command in (("complete", "x", "-n", 1, "-m", half), ("bench", half, "--prompt", 2, "--tokens", 2)):
        assert f"{note} {output.bytes_text(4 * n)}" in run(*command, "--dtype", "float32").stderr
        assert "the weights are" not in run(*command, "--dtype", "float16").stderr
    assert "the weights are" not in run("complete", "x", "-n", 1, "-m", quantised, "--dtype", "float32").stderr
    assert "the weights are" not in run("complete", "x", "-n", 1, "-m", tiny, "--dtype", "float32").stderr


def test_plan_reads_a_checkpoints_own_bits(run: Run, tiny: str, tmp_path: Path) -> None:
    got = document(run("plan", tiny, "--json"))
    assert got["bits"] == 16
    assert got["context"] == 96
    assert document(run("plan", tiny, "--bits", 8, "--group-size", 32, "--json"))["bits"] == 8
    assert run("convert", tiny, tmp_path / "mixed", "-q", "mixed").exit_code == 0
    assert document(run("plan", tmp_path / "mixed", "--json"))["bits"] == "mixed"


@pytest.mark.parametrize("layout", ["meta", "bin", "npz"])
def test_plan_takes_a_release_that_is_not_converted_yet(run: Run, tmp_path: Path, layout: str) -> None:
    args = tiny_args(gqa=True, n_layers=2, dtype="float16")
    write = {"meta": write_meta, "bin": partial(write_hf, kind="bin"), "npz": write_npz}[layout]
    folder = write(tmp_path / "release", args, random_weights(args))
    got = document(run("plan", folder, "--context", 50, "--dtype", "float16", "--json"))
    assert got["parameters"] == args.n_parameters
    assert (got["model"], got["bits"]) == (str(folder), 16)
    wanted = place(with_bits(args, 16), dtype="float16").plan(50)
    assert got["total_bytes"] == wanted.total_bytes
    assert "rope_theta" not in run("plan", folder).stderr
    (tmp_path / "empty").mkdir()
    told = run("plan", tmp_path / "empty")
    assert told.exit_code == 1
    assert "hint: expected config.json with" in told.stderr


@pytest.mark.parametrize(("layout", "context"), [("meta", 4096), ("npz", 4096), ("bin", 2048)])
def test_plan_and_inspect_do_without_a_rope_theta_and_say_so(
    run: Run, tmp_path: Path, layout: str, context: int
) -> None:
    """Memory does not depend on it. The context does where no file states that: 1e4 is what Meta's code takes then."""
    args = tiny_args(gqa=True, n_layers=2, dtype="float16")
    write = {"meta": write_meta, "bin": partial(write_hf, kind="bin"), "npz": write_npz}[layout]
    folder = write(tmp_path / "release", args, random_weights(args))
    sums = [document(run("plan", folder, "--context", 50, "--json"))["total_bytes"]]
    path = folder / ("params.json" if layout == "meta" else "config.json")
    data = json.loads(path.read_text())
    del data["rope_theta"]
    path.write_text(json.dumps(data | ({"max_position_embeddings": 2048} if layout == "bin" else {})))
    for asked in (("--context", 50), ()):
        told = run("plan", folder, "--json", *asked)
        assert f"note: {folder} does not state its rope_theta; 10000 is assumed, as in Meta's code" in told.stderr
        assert ("4,096 tokens of context follow from it" in told.stderr) == (context == 4096)
        sums.append(document(told)["total_bytes"])
    assert document(told)["context"] == document(told)["model_context"] == context
    assert sums[0] == sums[1] != sums[2]
    shown = run("inspect", folder)
    assert f"{'2,048 tokens' if layout == 'bin' else 'unknown'}, rope_theta is not stated" in shown.stdout
    assert "--rope-theta" in shown.stderr
    assert document(run("inspect", folder, "--json"))["config"]["rope_theta"] is None
    assert run("convert", folder, tmp_path / "out").exit_code == 1  # there it decides what the model says


@pytest.mark.parametrize(
    ("name", "hint"),
    [("7b-instuct", "did you mean 7b-instruct? Name"), ("1.2b", "did you mean 1.1b? "), ("8b", "Name a folder")],
)
def test_plan_of_a_mistyped_name_says_which_names_there_are(run: Run, name: str, hint: str) -> None:
    told = run("plan", name)
    assert told.exit_code == 1
    assert f"error: {name} is neither a folder nor a released model\nhint: {hint}" in told.stderr
    assert "13b-python" in told.stderr
    for known in ("70b-instruct", "1.1b"):
        assert run("plan", known).exit_code == 0


def test_every_option_of_plan_counts(run: Run) -> None:
    def planned(*options: object) -> dict[str, Any]:
        return document(run("plan", "--geometry", "1.1b", "--dtype", "float16", "--context", 3000, *options, "--json"))

    args = GEOMETRIES["1.1b"]
    for bits, group in ((4, 64), (4, 128), (8, 32)):
        got = planned("--bits", bits, "--group-size", group)
        assert got["weights_bytes"] == plan(with_bits(args, bits, group), 3000, runtime=GPU).weights_bytes
    for kv_bits in (4, 8, 16):
        got = planned("--kv-bits", kv_bits)
        assert got["kv_bytes"] == plan(args, 3000, storage=KVStorage.of(kv_bits), runtime=GPU).kv_bytes
    tight = planned("--memory", "1GB")
    assert [choice["bits"] for choice in tight["choices"]] == [2, 3, 4, 5, 6, 8, 16]
    contexts = [choice["largest_context"] for choice in tight["choices"]]
    assert contexts == sorted(contexts, reverse=True)
    assert contexts[0] > contexts[2] > contexts[-1] == 0  # each from its own bits
    weights = tight["weights_bytes"]  # the weights fit, the whole does not
    assert not planned("--memory", f"{weights + 1000}B")["fits"]
    assert planned("--memory", f"{tight['total_bytes']}B")["fits"]
    for contradiction in (("7b", "--variant", "13b"), ("--variant", "7b", "--geometry", "7b")):
        assert run("plan", *contradiction).exit_code == 2


def test_bench_reports_the_promised_keys(run: Run, tiny: str) -> None:
    got = document(run("bench", tiny, "--prompt", 20, "--tokens", 4, "--repeat", 2, "--json"))
    for key in ("prefill_tok_s", "decode_tok_s", "peak_bytes", "planned_bytes", "weights_bytes"):
        assert got[key] > 0, key
    assert len(got["runs"]) == 2
    assert got["backend"] in ("metal", "cuda", "cpu")
    assert {"kv_attention", "rms_norm", "rope", "swiglu"} <= set(got["paths"])
    shown = run("bench", tiny, "--prompt", 5, "--tokens", 2).stdout
    assert "decode" in shown
    assert re.search(r"^peak +\d[\d.]* [kMG]?B \(planned \d[\d.]* [kMG]?B\)$", shown, flags=re.MULTILINE)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What bench asks to be measured; the answers are made up, the n-th faster than the one before by n squared."""
    calls: list[dict[str, Any]] = []

    def speed(model: Any, **how: Any) -> Speed:
        calls.append({"args": model.args, "dtype": str(model.model.norm.weight.dtype), **how})
        n = len(calls)
        return Speed(10.0 * n**2, 3.0 * n**2, 1 / n, 1000 * n)

    monkeypatch.setattr("mlx_codellama.api.speed.measure_speed", speed)
    return calls


def test_bench_measures_what_it_is_asked_to(run: Run, tiny: str, measured: list[dict[str, Any]]) -> None:
    got = document(run("bench", tiny, "--prompt", 50, "--tokens", 7, "--repeat", 3, "--dtype", "float16", "--json"))
    warm_up, *runs = measured
    assert warm_up["prompt_tokens"] <= 16
    assert [(one["prompt_tokens"], one["tokens"], one["seed"]) for one in runs] == [(50, 7, n) for n in range(3)]
    assert {one["dtype"] for one in measured} == {"mlx.core.float16"}
    assert (got["prefill_tok_s"], got["decode_tok_s"]) == (90, 27)  # the medians of 40 90 160, 12 27 48
    assert (got["ttft_s"], got["peak_bytes"]) == (1 / 3, 4000)
    n_weights = load_config(Path(tiny)).n_parameters
    assert (got["weights_bytes"], got["weights_bytes_per_s"]) == (2 * n_weights, 27 * 2 * n_weights)
    asked = ("plan", tiny, "--context", 57, "--dtype", "float16", "--json")
    assert got["planned_bytes"] == document(run(*asked))["total_bytes"]


def test_bench_of_a_geometry_has_its_dimensions_bits_and_groups(
    run: Run, tiny: str, measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(load_config(Path(tiny)), intermediate_size=128)
    monkeypatch.setitem(GEOMETRIES, "34b", small)
    got = document(run("bench", "--geometry", "34b", "--bits", 8, "--group-size", 32, "--json"))
    assert measured[-1]["args"] == with_bits(small, 8, 32)
    assert (got["model"], got["bits"]) == ("random 34b", 8)
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "1kB")
    assert "MLX_CODELLAMA_MEMORY allows" in run("bench", "--geometry", "34b").stderr


def test_bench_refuses_what_it_cannot_do(run: Run, tiny: str) -> None:
    assert run("bench", tiny, "--geometry", "7b").exit_code == 2
    assert run("bench", "--geometry", "70x").exit_code == 2
    assert run("bench", "--kv-bits", 5).exit_code == 2
    assert run("bench", "--kv-bits-k", 8).exit_code == 2  # and the values?
    assert run("bench", "--prompt", 9, "--tokens", 2, "--max-context", 10).exit_code == 2


def test_doctor_names_the_machine_and_the_paths(run: Run) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    got = document(result)
    assert got["problems"] == []
    assert got["backend"] in ("metal", "cuda", "cpu")
    assert got["memory_bytes"] > 10**8
    assert got["packages"]["mlx"]
    assert "kv_attention" in got["paths"]
    assert got["chip"]
    text = run("doctor").stdout
    assert "backend" in text
    assert "BLAS" in text


def test_doctor_tells_a_required_backend_that_is_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_codellama.errors import BackendError
    from mlx_codellama.kernels import dispatch

    def wrong() -> str:
        raise BackendError("metal is required, but MLX runs on cpu here", hint="see `mlx-codellama doctor`")

    monkeypatch.setattr(dispatch, "backend", wrong)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert document(result)["problems"] == ["metal is required, but MLX runs on cpu here"]
    assert "error: metal is required" in result.stderr
    assert "hint: see `mlx-codellama doctor`" in result.stderr


def test_doctor_shows_the_variables_that_are_set(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_CODELLAMA_REQUIRE", "MLX_CODELLAMA_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_CODELLAMA_MEMORY", "7GB")
    got = document(run("doctor", "--json"))
    assert got["environment"]["MLX_CODELLAMA_MEMORY"] == "7GB"
    assert "MLX_CODELLAMA_NATIVE" not in got["environment"]
    assert got["budget_bytes"] == 7 * 10**9
    assert re.search(r"^MLX_CODELLAMA_MEMORY +7GB$", run("doctor").stdout, flags=re.MULTILINE)


def test_doctor_hides_no_error_that_is_not_about_mlx(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mlx_codellama.kernels.dispatch")
    monkeypatch.setitem(sys.modules, "mlx_codellama.kernels.dispatch", None)
    assert isinstance(run("doctor").exception, ImportError)


def test_progress_shows_bytes_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    at = Progress(3_200_000_000, 13_500_000_000, "x", 8.0)
    assert line(at) == "3.20 GB of 13.5 GB, 24 %, 400 MB/s, 26 s left"
    now = iter([0.0, 3.0, 11.0, 11.0, 12.0])
    show = _plain("convert", lambda: next(now))
    show(at)
    assert capsys.readouterr().err == ""
    show(at)
    assert capsys.readouterr().err == f"convert: {line(at)}\n"
    show(at)
    assert capsys.readouterr().err == ""


def test_progress_goes_in_lines_to_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "EVERY_S", 0.0)
    at = Progress(1, 2, "x", 1.0)
    with bytes_progress("convert") as show:
        show(at)
    got = capsys.readouterr()
    assert (got.out, got.err) == ("", f"convert: {line(at)}\n")


def test_tables_set_numbers_to_the_right_and_are_as_wide_as_their_cells() -> None:
    table = output.table(("name", "size", "n"), [("a", "1.5 GB", 12), ("longer one", "820 MB", "-")])
    assert table.splitlines() == ["name          size   n", "a           1.5 GB  12", "longer one  820 MB   -"]
    assert output.pairs([("a", 1), ("bcd", "x")]) == "a    1\nbcd  x"


def test_what_went_wrong_is_told_and_bugs_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("[malloc] Unable to allocate 9 bytes")):
        told = output.explain(error)
        assert told is not None
        assert told[0].startswith("out of memory")
        assert "plan" in told[1]
    assert output.explain(OSError(28, "No space left on device", "/x")) == ("/x: No space left on device", "")
    assert output.explain(RuntimeError("something else")) is None
    assert output.explain(ImportError("no", name="numpy")) is None
    monkeypatch.setattr("mlx_codellama.placement.machine_memory", lambda **_: 1 / 0)
    assert isinstance(run("plan", "7b").exception, ZeroDivisionError)


def test_text_that_is_not_unicode_is_written_all_the_same(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.data("a\udcffb")
    assert capfdbinary.readouterr().out == b"a?b\n"


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (13_476_839_424, "13.5 GB"),
        (412e6, "412 MB"),
        (1e8, "100 MB"),
        (1e10, "10.0 GB"),
        (-2e9, "-2.00 GB"),
    ],
)
def test_sizes_for_people(n: float, text: str) -> None:
    assert output.bytes_text(n) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3780, "1 h 03 min"), (float("inf"), "?")]
)
def test_times_for_people(s: float, text: str) -> None:
    assert output.time_text(s) == text


def test_json_has_no_nan_and_keeps_unicode(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.document({"a": float("nan"), "b": [1.5, float("inf")], "c": "é", "p": Path("x")})
    assert capfdbinary.readouterr().out == '{"a":null,"b":[1.5,null],"c":"é","p":"x"}\n'.encode()


def test_a_small_model_has_millions_of_parameters(run: Run) -> None:
    assert "demo: 6.52 million parameters" in run("plan").stdout
    assert "7b: 6.74 billion parameters" in run("plan", "7b").stdout


def test_a_float32_checkpoint_is_planned_in_float32_on_a_gpu_too(run: Run, tmp_path: Path) -> None:
    """As `load` holds it: without --dtype the activations have the checkpoint's own type there."""
    args = tiny_args(gqa=True, n_layers=2, dtype="float32")
    folder = write_meta(tmp_path / "release", args, random_weights(args))
    with dispatch.simulate("metal"):
        got = document(run("plan", folder, "--json"))
    assert (got["backend"], got["value_bytes"], got["kv_bits"]) == ("metal", 4, 32)
    assert got["weights_bytes"] == 4 * args.n_parameters
