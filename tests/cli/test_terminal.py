"""Terminals, pipes and closed streams: what is written where, and that nothing from outside can command a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_codellama.cli import generation, output
from mlx_codellama.errors import CodeLlamaError, printable

from .conftest import Run

COMMAND = [sys.executable, "-m", "mlx_codellama"]
SET_TITLE = "\x1b]0;gotcha\x07"  # what a terminal would obey


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which `run` is the command."""
    script = f'run() {{ "{sys.executable}" -m mlx_codellama "$@"; }}\n{line}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def on_a_terminal(*arguments: str, columns: int = 80, both: bool = True, **environment: str) -> tuple[int, str]:
    """(exit status, what a terminal of so many columns got on stderr, and on stdout unless not `both`)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    got = bytearray()

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                return
            if not piece:
                return
            got.extend(piece)

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs if both else subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    reader.start()
    status = process.wait(timeout=60)
    os.close(theirs)
    reader.join(timeout=10)
    os.close(ours)
    return status, got.decode("utf-8", "replace").replace("\r\n", "\n")


# ── what comes from outside is escaped ──────────────────────────────────────────────────────────────────────────────


@given(st.text())
def test_nothing_printable_commands_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not set(shown) & {chr(n) for n in (*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E, 0x2066)}
    shown.encode()  # no lone surrogates
    assert printable(shown) == shown


def test_letters_of_every_script_stay_as_they_are() -> None:
    assert printable("größe 代码 ñ\u00a0→ 🙂") == "größe 代码 ñ\u00a0→ 🙂"


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = CodeLlamaError(f"no such key {SET_TITLE}\nhint: run rm", hint="try \x9b2J\r")
    assert str(error) == r"no such key \x1b]0;gotcha\x07\nhint: run rm"
    assert error.hint == r"try \x9b2J\r"


def test_a_key_of_a_config_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({f"{SET_TITLE}\nhint: run rm": 1, "model_type": "llama"}))
    said = run("inspect", tmp_path).stderr
    assert "\x1b" not in said
    assert "\nhint: run rm" not in said


def test_a_name_of_a_file_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    file = tmp_path / f"a{SET_TITLE}\nhint: run rm.py"
    for arguments in (("infill", file), ("complete", "-f", file), ("inspect", file), ("plan", file)):
        said = run(*arguments).stderr
        assert said
        assert "\x1b" not in said
        assert "\nhint: run rm" not in said


def test_notes_tables_and_progress_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    output.note(SET_TITLE + "\nhint: x")
    output.say(output.table(("name", "n"), [(SET_TITLE + "\n", 1)]))
    output.say(output.pairs([("name", SET_TITLE)]))
    output.status(SET_TITLE)
    said = capsys.readouterr().err
    assert said.replace("\r\x1b[K", "").count("\x1b") == 0
    assert "\nhint" not in said


def test_a_document_holds_no_control_code(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"text": SET_TITLE + "\x9b\u2028\u202e\n größe 代码"}
    output.document(content)
    said = capsys.readouterr().out
    assert json.loads(said) == content
    assert not {"\x1b", "\x9b", "\u2028", "\u202e"} & set(said)
    assert "größe 代码" in said


def test_text_is_exact_in_a_pipe_and_escaped_on_a_terminal() -> None:
    code = "from mlx_codellama.cli import output; output.data('a\\tb\\r\\n' + chr(27) + '[2J')"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert piped.stdout == b"a\tb\r\n\x1b[2J\n"
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, timeout=60)
    shown = os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    assert b"\x1b" not in shown
    assert shown.endswith(b"\\x1b[2J\r\n")


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_closed_stdout_is_said_at_once() -> None:
    done = shell("run plan 7b >&-")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "error: stdout is closed")


def test_a_closed_stderr_takes_nothing_away() -> None:
    done = shell("run complete 'def f(' -n 2 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, shell("run complete 'def f(' -n 2").stdout, "")


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = shell("run infill <&-")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdin holds no <FILL_ME>")


@pytest.mark.parametrize("arguments", ["--help", "complete --help", "--version"])
def test_help_that_nobody_reads_ends_as_any_output_does(arguments: str) -> None:
    done = shell(f"run {arguments} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() in ("0", "141")  # 0: it was written before the reader went away
    assert done.stderr == ""


def test_help_to_a_closed_pipe_is_status_141() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_note_begins_a_line_of_its_own_where_the_answer_goes_down_the_same_pipe() -> None:
    done = shell("run complete 'def f(' -n 2 2>&1")
    assert "\nnote: stopped after 2 tokens" in done.stdout


def test_an_answer_in_a_pipe_of_its_own_is_exact() -> None:
    done = shell("run complete 'def f(' -n 2")
    assert not done.stdout.endswith("\n")
    assert done.stderr.startswith("note: stopped")


def test_a_note_begins_a_line_of_its_own_on_a_terminal() -> None:
    _, shown = on_a_terminal("complete", "def f(", "-n", "2")
    assert "\nnote: stopped after 2 tokens" in shown
    assert "\n\n" not in shown


@pytest.mark.parametrize("verb", ["complete", "infill"])
def test_quiet_silences_notes(run: Run, tiny: str, verb: str) -> None:
    arguments = [verb, "def f(<FILL_ME>", "-m", tiny, "-n", 2] if verb == "complete" else [verb, "-m", tiny, "-n", 2]
    loud, quiet = (run(*arguments, *more, input="def f(<FILL_ME>") for more in ((), ("-q",)))
    assert "note: stopped" in loud.stderr
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, loud.stdout, "")


def test_quiet_silences_no_error_and_nothing_that_was_asked_for(run: Run, tiny: str) -> None:
    assert "tok/s" in run("complete", "x", "-m", tiny, "-n", 2, "-q", "--stats").stderr
    assert run("complete", "x", "-m", "/not/there", "-q").stderr.startswith("error: ")


# ── small and simple terminals ──────────────────────────────────────────────────────────────────────────────────────


def test_progress_stays_on_one_line_of_a_narrow_terminal() -> None:
    code = (
        "import sys; from mlx_codellama.cli import generation\n"
        "show = generation.prefill_meter()\n"
        "for n in range(1000, 9000, 500): show(n, 9000)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=60, env={**os.environ, "TERM": "xterm"})
    shown = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    lines = shown.replace("\x1b[K", "").split("\r")
    assert len(lines) > 10
    assert max(map(len, lines)) < 40


def test_a_dumb_terminal_gets_no_escapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    now = [0.0]
    show = generation.prefill_meter(lambda: now[0])
    for at in range(10):
        now[0] = 5.0 * at
        show(1000 * (at + 1), 10000)
    said = capsys.readouterr().err
    assert "prompt read: 30 % of 10,000 tokens" in said
    assert not {"\r", "\x1b"} & set(said)


def test_convert_draws_no_bar_on_a_dumb_terminal(tiny: str, tmp_path: Path) -> None:
    status, shown = on_a_terminal("convert", tiny, str(tmp_path / "out"), TERM="dumb")
    assert status == 0
    assert "\x1b" not in shown


def test_a_mistyped_command_is_guessed(run: Run) -> None:
    assert "did you mean complete?" in run("compleet", "x").stderr
    assert "did you mean" not in run("xyzzy").stderr


def test_an_empty_name_of_a_model_is_wrong_use(run: Run) -> None:
    for arguments in (("complete", "x", "-m", ""), ("inspect", ""), ("plan", ""), ("bench", ""), ("quantize", "", "o")):
        result = run(*arguments)
        assert (result.exit_code, "the name is empty" in result.stderr) == (2, True), arguments
