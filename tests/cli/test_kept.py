"""--cache FILE: the second question costs only its own tokens, and no file but the right one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_codellama import load
from mlx_codellama.tokenizer import Tokenizer

from .conftest import Run, document, write_checkpoint

LONG = "def f(a, b):\n    return a + b\n\n" * 20


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("kept") / "model", small_tokenizer, context=1000))


def test_the_second_question_reads_only_its_own_tokens_and_gets_the_same_answer(
    run: Run, roomy: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.cache"
    first = run("complete", LONG + "x = f(", "-m", roomy, "-n", 4, "--cache", file, "--json", "--stats")
    assert first.exit_code == 0, first.stderr
    assert document(first)["stats"]["cached_tokens"] == 0
    assert f"tokens kept in {file}" in first.stderr
    written = file.read_bytes()
    second = run("complete", LONG + "y = f(2, ", "-m", roomy, "-n", 6, "--cache", file, "--json", "--stats")
    got = document(second)
    n = got["stats"]["prompt_tokens"]
    assert n - 8 <= got["stats"]["cached_tokens"] < n
    assert f"({got['stats']['cached_tokens']} cached)" in second.stderr
    assert got["ids"] == load(roomy).complete(LONG + "y = f(2, ", max_tokens=6).ids
    assert file.read_bytes() == written  # few tokens were new: not worth another writing


def test_the_file_follows_where_much_is_new(run: Run, roomy: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.cache"
    run("complete", "x = 1\n", "-m", roomy, "-n", 2, "--cache", file)
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    got = document(run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file, "--json"))
    assert got["stats"]["cached_tokens"] == got["stats"]["prompt_tokens"] - 1


def test_infill_and_chat_keep_theirs_too(run: Run, roomy: str, tmp_path: Path) -> None:
    source, a, b = tmp_path / "a.py", tmp_path / "a.cache", tmp_path / "b.cache"
    source.write_text(LONG + "x = <FILL_ME>\n")
    run("infill", source, "-m", roomy, "-n", 3, "--cache", a)
    got = document(run("infill", source, "-m", roomy, "-n", 3, "--cache", a, "--json"))
    assert got["stats"]["cached_tokens"] == got["stats"]["prompt_tokens"] - 1
    for _ in range(2):
        result = run("chat", "-m", roomy, "-n", 3, "--cache", b, "--json", input=LONG)
    assert document(result)["stats"]["cached_tokens"] == document(result)["stats"]["prompt_tokens"] - 1


@pytest.mark.parametrize("damage", ["foreign bits", "cut", "text"])
def test_a_file_that_does_not_fit_is_refused_and_kept_unless_it_may_be_rewritten(
    run: Run, roomy: str, tmp_path: Path, damage: str
) -> None:
    file, more = tmp_path / "prompt.cache", ["--kv-bits", "8"] if damage == "foreign bits" else []
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "text":
        file.write_text("my precious notes")
    before = file.read_bytes()
    result = run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file, *more)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "--rewrite-cache" in result.stderr.partition("hint: ")[2]
    assert result.stdout == ""
    assert file.read_bytes() == before
    result = run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file, "--rewrite-cache", *more)
    assert result.exit_code == 0, result.stderr
    got = document(run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file, "--json", *more))
    assert got["stats"]["cached_tokens"] == got["stats"]["prompt_tokens"] - 1


def test_wrong_use_is_said(run: Run, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("complete", "x", "-m", roomy, "--rewrite-cache").exit_code == 2
    file = tmp_path / "prompt.cache"
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    m = load(roomy)
    monkeypatch.setattr(type(file), "stat", lambda self, **k: type("S", (), {"st_size": 10**15, "st_mode": 0o100644})())
    with pytest.raises(Exception, match="more than the"):
        m.load_cache(file)
