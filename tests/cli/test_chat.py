"""chat: what is typed, what is kept of it, and what happens when the context is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_codellama import load
from mlx_codellama.cli.call import Call
from mlx_codellama.cli.chat import Session
from mlx_codellama.cli.line_reader import is_command, read_message
from mlx_codellama.conversation import Conversation
from mlx_codellama.errors import CodeLlamaError, ContextOverflowError, OutputExistsError, PromptError

from .conftest import Run, document


def test_chat_takes_piped_stdin_as_one_question(run: Run, tiny: str) -> None:
    expected = load(tiny).chat([{"role": "user", "content": "hi"}], max_tokens=6).text
    assert run("chat", "-m", tiny, "-n", 6, input="hi").stdout == expected
    assert document(run("chat", "-m", tiny, "-n", 6, "--json", input="hi"))["text"] == expected
    system = load(tiny).chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], max_tokens=6
    )
    assert run("chat", "-m", tiny, "-n", 6, "--system", "Be brief.", input="hi").stdout == system.text


def test_plain_chat_continues_the_text(run: Run, tiny: str) -> None:
    expected = load(tiny).complete("def f(", max_tokens=6).text
    assert run("chat", "-m", tiny, "-n", 6, "--plain", input="def f(").stdout == expected


def test_an_answer_to_one_question_ends_where_the_context_does(run: Run, tiny: str) -> None:
    result = run("chat", "-m", tiny, "--json", input="hi")
    assert result.exit_code == 0, result.stderr
    assert 0 < document(result)["stats"]["generated_tokens"] < 96
    assert run("chat", input="def f(x):").exit_code == 0  # the demo reads no more than 512 tokens


def test_chat_with_nothing_on_stdin_is_wrong_use(run: Run, tiny: str) -> None:
    assert run("chat", "-m", tiny, input=" \n").exit_code == 2


def lines(*given: str):  # type: ignore[no-untyped-def]
    waiting = list(given)

    def read(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("one",), "one"),
        (("one \\", "two"), "one \ntwo"),
        (("a\\", "b\\", "c"), "a\nb\nc"),
        (('"""', "a", "", "b", '"""'), "a\n\nb"),
        (('"""a', 'b"""'), "a\nb"),
        (('"""a"""',), "a"),
        (("",), ""),
    ],
)
def test_messages_of_several_lines(typed: tuple[str, ...], message: str) -> None:
    assert read_message(lines(*typed)) == message


def test_a_block_that_never_ends_is_the_end_of_input() -> None:
    with pytest.raises(EOFError):
        read_message(lines('"""', "a"))


def test_a_session_keeps_answers_and_drops_what_failed(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talking(tiny)
    chat.run(lines("hi", "", "x " * 300))
    assert [turn["content"] for turn in chat.conversation.turns][:1] == ["hi"]
    assert [turn["role"] for turn in chat.conversation.turns] == ["user", "assistant"]  # without the long question
    chat.run(lines("/system Be kind.", "again"))  # begins anew
    assert [turn["role"] for turn in chat.conversation.turns] == ["user", "assistant"]
    assert chat.conversation.turns[0]["content"] == "again"
    assert chat.conversation.turns[1]["content"]
    got = capsys.readouterr()
    assert "error: the question has " in got.err
    assert got.err.count("stopped after 4 tokens") == 2
    chat.run(lines("/quit", "never read"))
    assert len(chat.conversation.turns) == 2


SAMPLING = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None}


def talking(tiny: str, conversation: Conversation | None = None, **sampling: Any) -> Session:
    return Session(Call(load(tiny), {**SAMPLING, **sampling}), conversation or Conversation())


def test_slash_commands_change_the_conversation(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talking(tiny)
    talk = chat.conversation
    talk.ask("q")
    talk.answered("a")
    assert chat.command(f"/save {tmp_path / 't.md'}")
    assert (tmp_path / "t.md").read_text() == "## user\n\nq\n\n## assistant\n\na\n"
    with pytest.raises(OutputExistsError):
        chat.command(f"/save {tmp_path / 't.md'}")
    assert chat.command("/system Be kind.")
    assert talk.messages() == [{"role": "system", "content": "Be kind."}]
    talk.ask("q2")
    assert chat.command(f"/save {tmp_path / 't.json'}")
    assert '"q2"' in (tmp_path / "t.json").read_text()
    assert chat.command("/reset")
    assert talk.messages() == [{"role": "system", "content": "Be kind."}]
    assert chat.command("/help")
    assert "/retry" in capsys.readouterr().err
    assert not chat.command("/quit")
    with pytest.raises(PromptError, match="unknown command /usr"):
        chat.command("/usr/bin")


def test_a_file_goes_before_the_next_message_and_only_there(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1")
    chat = talking(tiny)
    chat.run(lines(f"/file {file}", "Why?", "And?"))
    asked = [turn["content"] for turn in chat.conversation.turns if turn["role"] == "user"]
    assert asked == ["a.py:\n```\nx = 1\n```\n\nWhy?", "And?"]
    for wrong in ("/file", f"/file {tmp_path}", f"/file {tmp_path / 'none'}"):
        with pytest.raises(CodeLlamaError):
            chat.command(wrong)


def test_retry_answers_the_last_question_again(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talking(tiny)
    with pytest.raises(PromptError, match="no answer yet"):
        chat.command("/retry")
    chat.run(lines("hi", "/retry"))
    assert "the answer will be the same" in capsys.readouterr().err
    first = list(chat.conversation.turns)
    chat.run(lines("/set temperature 3", "/set seed 11", "/retry"))
    assert [turn["role"] for turn in chat.conversation.turns] == ["user", "assistant"]
    assert chat.conversation.turns[0] == first[0]
    assert chat.conversation.turns[1] != first[1]


def test_settings_are_checked_shown_and_used(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talking(tiny)
    chat.run(lines("/set max_tokens 2", "/set top_p 0.5", "/set", "hi"))
    said = capsys.readouterr().err
    assert "stopped after 2 tokens" in said
    assert "top_p        0.5" in said
    for wrong in (
        "/set top_p 2",
        "/set nonsense 1",
        "/set top_k x",
        "/set max_tokens 0",
        "/set max_tokens 1.5",
        "/set top_k",
    ):
        with pytest.raises(CodeLlamaError):
            chat.command(wrong)
    assert (chat.sampling["top_p"], chat.sampling["max_tokens"]) == (0.5, 2)


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_saved_dialog_goes_on_where_it_ended(tiny: str, tmp_path: Path, system: str) -> None:
    file = tmp_path / "t.json"
    first = talking(tiny, Conversation(system=system))
    first.run(lines("hi", f"/save {file}", "more"))
    second = talking(tiny)
    second.run(lines(f"/load {file}", "more"))
    assert second.conversation.messages() == first.conversation.messages()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "[1, 2]",
        '[{"role": "user", "content": "q"}]',
        '[{"role": "assistant", "content": "a"}]',
        '[{"role": "user"}, {"role": "assistant", "content": "a"}]',
    ],
)
def test_what_is_no_dialog_is_not_loaded(tiny: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    chat = talking(tiny)
    chat.conversation.ask("kept")
    with pytest.raises(PromptError):
        chat.command(f"/load {tmp_path / 't.json'}")
    assert [turn["content"] for turn in chat.conversation.turns] == ["kept"]


def test_a_pasted_block_is_one_message() -> None:
    assert read_message(lines("def f():\n    pass\n")) == "def f():\n    pass\n"
    assert read_message(lines('"""a\nb', 'c"""')) == "a\nb\nc"
    assert is_command("/help")
    assert not is_command("/usr/bin/x\n/usr/bin/y")
    assert not is_command("// a comment")


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talking(tiny, max_tokens=None)
    for n in range(6):
        chat.ask(f"question {n}")
    talk = chat.conversation
    assert talk.turns[-2]["content"] == "question 5"
    assert talk.turns[0]["content"] != "question 0"
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * (len(talk.turns) // 2)
    said = capsys.readouterr().err
    assert "note: the context is full: the oldest 1 question" in said
    assert "note: stopped: the context of 96 tokens is full" in said


def test_a_plain_text_that_outgrows_the_context_loses_its_beginning(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = talking(tiny, Conversation(plain=True), max_tokens=None)
    for n in range(8):
        chat.ask(f"x{n} = {n}")
    assert "x7 = 7" in chat.conversation.text()
    assert "x0 = 0" not in chat.conversation.text()
    assert "note: the text is longer than the context; the model sees lines" in capsys.readouterr().err


def test_a_question_that_alone_is_too_long_forgets_nothing(tiny: str) -> None:
    chat = talking(tiny)
    chat.ask("hi")
    before = list(chat.conversation.turns)
    for words in (80, 8000):
        with pytest.raises(ContextOverflowError, match="the question has"):
            chat.ask("x " * words)
        assert chat.conversation.turns == before


@pytest.mark.parametrize("answer", [None, 500])
def test_an_answer_gets_what_is_left_of_the_context(tiny: str, answer: int | None) -> None:
    chat = talking(tiny, max_tokens=answer)
    chat.conversation.ask("one two three")
    result = chat.answer(show=False)
    assert result.stats.prompt_tokens + result.stats.generated_tokens <= 96
    assert result.stats.generated_tokens > 40


def test_the_default_history_is_made_for_its_owner_alone_and_kept_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line_reader = pytest.importorskip("mlx_codellama.cli.line_reader")
    pytest.importorskip("prompt_toolkit")
    monkeypatch.setattr("mlx_codellama.env.state_folder", lambda: str(tmp_path / "state"))
    history = line_reader._history(None)
    history.store_string("hello")
    file = tmp_path / "state" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600
    with open(file, "a") as out:
        for n in range(80_000):
            out.write(f"\n# 2026-01-01\n+line {n}\n")
    assert next(iter(line_reader._history(None).load_history_strings())) == "line 79999"
    assert file.stat().st_size < line_reader.HISTORY_BYTES
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line_reader = pytest.importorskip("mlx_codellama.cli.line_reader")
    pytest.importorskip("prompt_toolkit")
    line_reader._history(Path("/dev/null/nowhere/history"))
    assert "note: the lines you type are not kept: /dev/null/nowhere/history" in capsys.readouterr().err
