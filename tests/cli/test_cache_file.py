"""--cache FILE: the second question costs only its own tokens, and no file but the right one is taken."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_codellama import load
from mlx_codellama.cli import generation
from mlx_codellama.placement import Placement
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


@pytest.mark.parametrize("damage", ["foreign bits", "cut", "empty"])
def test_a_file_that_does_not_fit_is_refused_and_kept_unless_it_may_be_rewritten(
    run: Run, roomy: str, tmp_path: Path, damage: str
) -> None:
    file, more = tmp_path / "prompt.cache", ["--kv-bits", "8"] if damage == "foreign bits" else []
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "empty":
        file.write_bytes(b"")
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


@pytest.mark.parametrize("options", [(), ("--rewrite-cache",)])
@pytest.mark.parametrize("kind", ["source", "weights"])
def test_a_file_that_never_was_a_cache_is_not_replaced(
    run: Run, roomy: str, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    file = tmp_path / "b.py"
    file.write_bytes(b"x = 1\n" * 9 if kind == "source" else (Path(roomy) / "model.safetensors").read_bytes())
    before = file.read_bytes()
    result = run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {file} is not a saved key-value cache" in result.stderr
    assert "hint: name another file" in result.stderr
    assert "--rewrite-cache" not in result.stderr
    assert file.read_bytes() == before


def test_a_file_that_came_while_the_prompt_was_read_is_not_replaced(
    run: Run, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "b.py"

    def meter() -> Callable[[int, int], None]:
        return lambda done, total: file.write_text("x = 1\n") and None

    monkeypatch.setattr(generation, "prefill_meter", meter)
    result = run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    assert result.exit_code == 1
    assert result.stdout
    assert "not a saved key-value cache" in result.stderr
    assert file.read_text() == "x = 1\n"


def test_wrong_use_is_said(run: Run, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("complete", "x", "-m", roomy, "--rewrite-cache").exit_code == 2
    nowhere = run("complete", "x", "-m", roomy, "--cache", tmp_path / "no" / "file")
    assert (nowhere.exit_code, nowhere.stdout) == (1, "")  # before the prompt is read
    assert f"error: {tmp_path / 'no'} is no folder\nhint: make it first" in nowhere.stderr
    file = tmp_path / "prompt.cache"
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    m = load(roomy)
    monkeypatch.setattr(type(file), "stat", lambda self, **k: type("S", (), {"st_size": 10**15, "st_mode": 0o100644})())
    with pytest.raises(Exception, match="more than the"):
        m.load_cache(file)


# ── Ctrl-C ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Prompts are read 50 tokens at a time, and Ctrl-C comes after so many parts, as often as asked."""
    monkeypatch.setattr(Placement, "chunk_tokens", lambda *args, **how: 50)

    def press(after: int, times: int = 1) -> None:
        seen = []

        def meter() -> Callable[[int, int], None]:
            def show(done: int, total: int) -> None:
                seen.append(done)
                if len(seen) == after:
                    for _ in range(times):
                        os.kill(os.getpid(), signal.SIGINT)

            return show

        monkeypatch.setattr(generation, "prefill_meter", meter)

    return press


@pytest.mark.parametrize("kv", [[], ["--kv-bits", "8"], ["--window", "60"]], ids=str)
def test_what_was_read_until_ctrl_c_is_kept_and_the_next_run_reads_on(
    run: Run, roomy: str, tmp_path: Path, pressed: Callable[..., None], kv: list[str]
) -> None:
    file, whole = tmp_path / "prompt.cache", ("complete", LONG, "-m", roomy, "-n", 5, *kv)
    truth = document(run(*whole, "--json"))
    total = truth["stats"]["prompt_tokens"]
    pressed(3)
    first = run(*whole, "--cache", file, "--json")
    assert (first.exit_code, first.stdout) == (130, "")
    assert f"150 of {total} tokens kept in {file}; the same command continues" in first.stderr
    assert "Ctrl-C again" in first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.cache"]
    pressed(2)
    second = run(*whole, "--cache", file)
    assert f"250 of {total} tokens kept" in second.stderr
    pressed(0)
    third = document(run(*whole, "--cache", file, "--json"))
    assert third["stats"]["cached_tokens"] == 250
    assert third["ids"] == truth["ids"]


def test_ctrl_c_never_leaves_less_than_there_was(
    run: Run, roomy: str, tmp_path: Path, pressed: Callable[..., None]
) -> None:
    """Not of a prompt that shares less with the file, not at the second Ctrl-C, and never half a file."""
    file = tmp_path / "prompt.cache"
    run("complete", LONG, "-m", roomy, "-n", 2, "--cache", file)
    before = file.read_bytes()
    pressed(2)
    other = run("complete", "x = 1\n" + LONG, "-m", roomy, "--cache", file)
    pressed(1, times=2)
    twice = run("complete", "x = 1\n" + LONG, "-m", roomy, "--cache", file)
    assert (other.exit_code, twice.exit_code) == (130, 130)
    assert "kept" not in other.stderr + twice.stderr
    assert file.read_bytes() == before
    new = tmp_path / "new.cache"
    pressed(1, times=2)
    assert run("complete", LONG, "-m", roomy, "--cache", new).exit_code == 130
    assert not new.exists()
    pressed(1)
    assert run("complete", LONG, "-m", roomy).exit_code == 130  # without a file at once, as ever


def test_a_file_is_not_filled_by_half_after_ctrl_c(
    run: Run, roomy: str, tmp_path: Path, pressed: Callable[..., None]
) -> None:
    source, file = tmp_path / "a.py", tmp_path / "a.cache"
    source.write_text(LONG + "x = <FILL_ME>\n")
    pressed(2)
    stopped = run("infill", source, "-m", roomy, "-n", 3, "--in-place", "--cache", file)
    assert stopped.exit_code == 130
    assert source.read_text() == LONG + "x = <FILL_ME>\n"
    pressed(0)
    got = document(run("infill", source, "-m", roomy, "-n", 3, "--cache", file, "--json"))
    assert got["stats"]["cached_tokens"] == 100
