"""The command as a process: what it imports, how it ends, and a conversation in a real terminal (a pty)."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_codellama.cli.group import VERBS

from .conftest import Run

Spawn = Callable[..., "subprocess.CompletedProcess[str]"]
HEAVY = ("mlx", "numpy", "rich", "prompt_toolkit", "huggingface_hub", "sentencepiece", "safetensors")


def test_help_imports_nothing_heavy_for_any_verb() -> None:
    code = (
        "import sys\n"
        "from mlx_codellama.cli.group import group\n"
        "for verb in [[]] + [[v] for v in sys.argv[1:]]:\n"
        "    try: group.main([*verb, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, verb\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, (verb, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: mlx-codellama") == len(VERBS) + 1


def test_help_of_the_group_loads_no_verb() -> None:
    code = (
        "import sys\n"
        "from mlx_codellama.__main__ import main\n"
        "sys.argv = ['mlx-codellama', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'mlx_codellama.cli.infill' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("arguments", [(), ("--nonsense",), ("nonsense",), ("infill", "--nonsense")])
def test_wrong_use_exits_2_and_says_so_on_stderr(spawn: Spawn, arguments: tuple[str, ...]) -> None:
    done = spawn(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the two extras exist on Linux only")
@pytest.mark.parametrize("arguments", [("complete", "x"), ("inspect",), ("bench",), ("doctor",)])
def test_a_missing_mlx_names_the_two_extras(spawn: Spawn, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlx' or name.startswith('mlx.'):\n"
        "            raise ModuleNotFoundError(\"No module named 'mlx'\", name='mlx')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = spawn(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert "error: MLX is not installed" in done.stderr
    assert "mlx-codellama[cpu]" in done.stderr
    assert "mlx-codellama[cuda]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_backend_that_is_required_but_absent_is_an_error(spawn: Spawn, tiny: str) -> None:
    wrong = "cuda" if sys.platform == "darwin" else "metal"
    done = spawn("complete", "x", "-m", tiny, "-n", 2, env={"MLX_CODELLAMA_REQUIRE": wrong})
    assert done.returncode == 1
    assert f"error: {wrong} is required" in done.stderr
    assert "hint: " in done.stderr


def test_a_reader_that_goes_away_is_no_noise(tiny: str) -> None:
    command = [sys.executable, "-m", "mlx_codellama", "complete", "def", "-m", tiny, "-n", "80"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_exits_130_without_a_traceback() -> None:
    command = [sys.executable, "-m", "mlx_codellama", "chat"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr is not None
    assert b"note: " in process.stderr.readline()  # said just before it waits for the question
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


SLOW_CONVERT = """
import sys, time
from mlx_codellama.weights.reading import InputFile
read = InputFile.read
InputFile.read = lambda *args: time.sleep(0.1) or read(*args)  # so that the signal comes in the middle of the work
from mlx_codellama.__main__ import main
sys.argv = ["mlx-codellama", "convert", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_in_the_middle_of_convert_leaves_nothing_and_the_command_can_be_run_again(
    run: Run, tiny: str, tmp_path: Path, existing: bool
) -> None:
    out, arguments = tmp_path / "out", [tiny, str(tmp_path / "out"), "-q", "q8", "--group-size", "32"]
    before: dict[str, bytes] = {}
    if existing:
        assert run("convert", tiny, out).exit_code == 0
        before, arguments = {path.name: path.read_bytes() for path in out.iterdir()}, [*arguments, "--overwrite"]
    process = subprocess.Popen([sys.executable, "-c", SLOW_CONVERT, *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".out.*.partial/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.decode().endswith("interrupted\n")
    assert b"Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * existing
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    again = run("convert", *arguments)
    assert again.exit_code == 0, again.stderr
    assert run("inspect", out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


READY = r">[\s\S]*\?25h$"  # the prompt drawn, and the cursor shown


class Terminal:
    """A command in a pseudo-terminal, which a test types into."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "dumb", "XDG_STATE_HOME": tempfile.mkdtemp(), **environment})
            os.execv(sys.executable, [sys.executable, "-m", "mlx_codellama", *arguments])
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def read_until(self, pattern: str, seconds: float = 25) -> str:
        """Wait until what came since the last call matches; returns it."""
        end, got = time.monotonic() + seconds, ""
        while not re.search(pattern, got):
            assert time.monotonic() < end, f"waited for {pattern!r}, got {got!r}"
            ready, _, _ = select.select([self.handle], [], [], 0.2)
            if ready:
                try:
                    got += os.read(self.handle, 65536).decode("utf-8", "replace")
                except OSError:  # the other end closed
                    assert re.search(pattern, got), f"ended while waiting for {pattern!r}: {got!r}"
        self.screen += got
        return got

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C until pattern appears: Python's readline misses a signal that comes just before it waits for a key."""
        for _ in range(60):
            self.type("\x03")
            if select.select([self.handle], [], [], 1)[0]:
                break
        self.read_until(pattern)

    def end(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.handle], [], [], 0.1)
            if ready:
                try:
                    os.read(self.handle, 65536)
                except OSError:
                    break
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]

    yield start
    for one in opened:
        os.close(one.handle)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty.*:DeprecationWarning")
def test_a_conversation_in_a_terminal(terminal: Callable[..., Terminal], tiny: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    chat = terminal("chat", "-m", tiny, "-n", "5", "--seed", "3")
    chat.read_until(r"/help for help[\s\S]*> $")
    chat.type("hello \\\n")
    chat.read_until(r"\. $")
    chat.type("world\n")
    chat.read_until(r"stopped after 5 tokens[\s\S]*> $")
    chat.type("/nonsense\n")
    chat.read_until(r"error: unknown command /nonsense[\s\S]*hint: [\s\S]*> $")
    chat.type("half a line")
    chat.read_until("half a line$")
    chat.interrupt(r"Ctrl-D or /quit leaves[\s\S]*> $")
    chat.type(f"/save {saved}\n")
    chat.read_until(r"saved to [\s\S]*> $")
    assert '"hello \\nworld"' in saved.read_text()
    assert "half a line" not in saved.read_text()
    chat.type("\x04")
    assert chat.end() == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty.*:DeprecationWarning")
def test_lines_that_were_typed_are_there_the_next_time_and_a_pasted_block_is_one_message(
    terminal: Callable[..., Terminal], tiny: str, tmp_path: Path
) -> None:
    again, xterm = ("chat", "-m", tiny, "-n", "1"), {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    first = terminal(*again, **xterm)
    first.read_until(READY)
    first.type("\x1b[200~hello\nthere\x1b[201~\r")
    first.read_until(r"stopped after 1 token;[\s\S]*" + READY)
    first.type(f"/save {tmp_path}/t.json\r")
    first.read_until(r"saved to[\s\S]*" + READY)
    first.type("\x04")
    assert first.end() == 0
    assert '"hello\\nthere"' in (tmp_path / "t.json").read_text()
    history = tmp_path / "mlx_codellama" / "chat_history"
    assert "+hello\n+there\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    second = terminal(*again, **xterm)
    second.read_until(READY)
    second.type("\x10\x10")  # Ctrl-P: the line before
    second.read_until("hello")
    second.type("\x03")  # drops what is being typed
    second.read_until(r"/quit leaves[\s\S]*" + READY)
    second.type("\x04")
    assert second.end() == 0


def test_a_bar_is_drawn_on_a_terminals_stderr_and_results_go_to_stdout(tiny: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_codellama", "convert", tiny, str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, env=environment)
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, drawn
    assert done.stdout.decode().startswith(f"wrote {tmp_path / 'out'}\n")
    assert "\x1b[" not in done.stdout.decode()
    assert "\x1b[" in drawn
    assert "convert" in drawn


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty.*:DeprecationWarning")
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal], tiny: str) -> None:
    chat = terminal("chat", "-m", tiny, "--plain", "-n", "100000", "--context", "200000")
    chat.read_until(r"> $")
    chat.type("def f(\n")
    chat.read_until(r"def f\(\r\n[\s\S]{20}")  # the answer is under way
    chat.type("\x03")
    chat.read_until(r"\(stopped\)[\s\S]*> $")
    chat.type("/quit\n")
    assert chat.end() == 0
