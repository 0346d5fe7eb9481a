"""--kv-bits, --kv-bits-k, --kv-bits-v, --window and --max-context reach the cache, in every command that has one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_codellama import load
from mlx_codellama.kernels import dispatch

from .conftest import Run, document

PROMPT = "def add(a, b):\n    return a +"


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        (["--kv-bits", "8"], 8),
        (["--kv-bits", "8", "--kv-bits-v", "4"], (8, 4)),
        (["--kv-bits-k", "16", "--kv-bits-v", "8"], (16, 8)),
        (["--kv-bits", "16"], 16),
    ],
    ids=str,
)
def test_complete_generates_what_the_api_does(run: Run, tiny: str, words: list, bits: object) -> None:
    expected = load(tiny, kv_bits=bits).complete(PROMPT, max_tokens=12, logprobs=1)
    got = document(run("complete", PROMPT, "-m", tiny, "-n", 12, "--json", "--logprobs", 1, *words))
    assert got["ids"] == expected.ids
    assert [entry["logprob"] for entry in got["logprobs"]] == [entry.logprob for entry in expected.logprobs]
    plain = load(tiny).complete(PROMPT, max_tokens=12, logprobs=1)
    assert [entry.logprob for entry in plain.logprobs] != [entry.logprob for entry in expected.logprobs]


def test_infill_and_chat_take_the_options_too(run: Run, tiny: str) -> None:
    for args in (("infill", "-"), ("chat", "--plain")):
        dispatch.forget_paths()
        result = run(*args, "-m", tiny, "-n", 3, "--kv-bits", 4, input="a = <FILL_ME>\n")
        assert result.exit_code == 0, result.stderr
        assert "kv_attention_rows" in dispatch.paths()


def test_a_window_is_reported_with_what_it_dropped(run: Run, tiny: str) -> None:
    args = ("complete", PROMPT, "-m", tiny, "-n", 20, "--window", 9, "--sinks", 2)
    stats = document(run(*args, "--json"))["stats"]
    total = stats["prompt_tokens"] + stats["generated_tokens"] - 1  # the last is not read
    assert stats["dropped_tokens"] == total - 11
    assert f"{total - 11} tokens dropped" in run(*args, "--stats").stderr
    forgotten = run(*args).stderr
    assert f"note: --window has forgotten {total - 11} of {total + 1} tokens\n" in forgotten
    assert "dropped" not in run("complete", PROMPT, "-m", tiny, "-n", 2, "--stats").stderr


def test_keys_without_values_are_wrong_use(run: Run, tiny: str) -> None:
    result = run("complete", "x", "-m", tiny, "--kv-bits-k", 8)
    assert result.exit_code == 2
    assert "--kv-bits-v" in result.stderr


def test_the_context_has_two_names(run: Run, tiny: str) -> None:
    for name in ("--max-context", "--context"):
        assert run("complete", "x", "-m", tiny, "-n", 8, name, 12).exit_code == 0
        assert run("complete", "x", "-m", tiny, "-n", 8, name, 7).exit_code == 1


@pytest.mark.parametrize(
    ("words", "bits"), [([], 32), (["--kv-bits", 8], 8), (["--kv-bits", 8, "--kv-bits-v", 4], "8/4")], ids=str
)
def test_plan_and_bench_say_and_count_the_bits(run: Run, tiny: str, words: list, bits: object) -> None:
    planned = document(run("plan", tiny, "--dtype", "float32", "--json", *words))
    row = {32: 2 * 32 * 4, 8: 2 * (32 + 4), "8/4": 32 + 16 + 2 * 4}[bits]
    assert planned["kv_bits"] == bits
    assert planned["kv_bytes"] == 2 * 3 * 128 * row  # 96 tokens, in steps of 64
    bench = document(run("bench", tiny, "--dtype", "float32", "--prompt", 20, "--tokens", 3, "--json", *words))
    assert bench["kv_bits"] == bits
    assert ("kv_attention_rows" in bench["paths"]) or bits == 32


def test_rope_scaling_stretches_the_context_and_refuses_what_it_does_not_know(run: Run, tiny: str) -> None:
    long = "x = 1\n" * 40  # more than the 96 tokens that the model reads
    args = ("complete", long, "-m", tiny, "-n", 4, "--json")
    assert "longer than the context" in run(*args).stderr
    stretched = run(*args, "--rope-scaling", "yarn:4")
    assert "longer than the context" not in stretched.stderr
    got = document(stretched)
    assert got["ids"] == load(tiny, rope_scaling="yarn:4").complete(long, max_tokens=4).ids
    wrong = run(*args, "--rope-scaling", "su:4")
    assert wrong.exit_code == 2
    assert "linear, ntk, dynamic, yarn" in wrong.stderr


def test_rope_scaling_reaches_plan_and_bench(run: Run, tiny: str, tmp_path: Path) -> None:
    """Each is given a model that has a scaling of its own as well, which cannot be scaled again."""
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    stretch = ("--rope-scaling", "ntk:4")
    for command in (("plan",), ("bench", "--prompt", 9, "--tokens", 2)):
        got = document(run(*command, tiny, *stretch, "--json"))
        assert got["rope_scaling"]["rope_type"] == "ntk"
        assert run(*command, own, *stretch).exit_code == 1
        assert document(run(*command, own, "--json"))["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert document(run("plan", tiny, *stretch, "--json"))["model_context"] == 4 * 96
    assert run("bench", "--geometry", "1.1b", "--rope-scaling", "su:2").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [("plan", "7b", "--context"), ("bench", "--tokens", 2, "--prompt"), ("complete", "x", "-n", 1, "--max-context")],
    ids=lambda words: words[0],
)
def test_a_context_of_400_digits_is_wrong_use(run: Run, words: tuple) -> None:
    result = run(*words, "9" * 400)
    assert result.exit_code == 2
    assert "more tokens than any machine holds" in result.stderr
    assert len(result.stderr) < 400
