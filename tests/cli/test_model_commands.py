"""convert, quantize, inspect, plan, doctor, bench: what they report, and that the numbers are those of the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_codellama import cache, memory, prompts
from mlx_codellama.api.codellama import DEMO
from mlx_codellama.cli import cursor, options, output
from mlx_codellama.cli.checkpoint import demo_folder
from mlx_codellama.cli.group import VERBS
from mlx_codellama.cli.pages import markdown
from mlx_codellama.cli.plan import runtime_here
from mlx_codellama.cli.progress import _plain, line
from mlx_codellama.config import VARIANTS, load_config
from mlx_codellama.kernels import dispatch
from mlx_codellama.memory import GPU, plan, with_bits
from mlx_codellama.quant import RECIPES
from mlx_codellama.weights import Progress, read_header

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
    for bits, unpacks in ((4, not native), (8, not native), (6, True)):
        runtime = runtime_here(with_bits(VARIANTS["7b"].args, bits), None)
        assert (runtime.name, runtime.compute_bytes, runtime.fused) == ("cpu", 4, native)
        assert runtime.unpacks == unpacks
    assert not runtime_here(with_bits(VARIANTS["7b"].args, 4), "bfloat16").fused


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


def test_plan_reads_a_checkpoints_own_bits(run: Run, tiny: str) -> None:
    got = document(run("plan", tiny, "--json"))
    assert got["bits"] == 16
    assert got["context"] == 96


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


def test_bench_refuses_what_it_cannot_do(run: Run, tiny: str) -> None:
    assert run("bench", tiny, "--geometry", "7b").exit_code == 2
    assert run("bench", "--geometry", "70x").exit_code == 2
    assert run("bench", "--kv-bits", 8).exit_code == 2


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


def test_what_the_commands_keep_apart_from_mlx_says_the_same() -> None:
    assert set(options.RECIPES) == set(RECIPES)
    assert cursor.FILL_ME == prompts.FILL_ME
    assert demo_folder() == DEMO
    assert memory.KV_STEP == cache.STEP


def test_the_page_of_commands_holds_every_verb_and_no_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    page = markdown()
    assert all(f"## mlx-codellama {verb}" in page for verb in VERBS)
    monkeypatch.setenv("COLUMNS", "40")
    assert markdown() == page


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


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (13_476_839_424, "13.5 GB"), (412e6, "412 MB"), (-2e9, "-2.00 GB")],
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
