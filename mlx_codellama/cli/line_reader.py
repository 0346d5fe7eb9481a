"""How `chat` reads what is typed: lines with editing, pasted blocks in one piece, and a history that is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_codellama import env, inputs
from mlx_codellama.cli import output
from mlx_codellama.hole import split_lines
from mlx_codellama.staging import write_file

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

BLOCK = '"""'
HISTORY_BYTES = 2**20  # of the file, from which on only its newer half stays


def line_reader(history: Path | None) -> Callable[[str], str]:
    """A function that shows a prompt on stderr and gives what was typed. It raises EOFError and KeyboardInterrupt.

    history  the file of the lines typed; None for the one in the user's state folder
    """
    if not (sys.stdin.isatty() and output.can_redraw()):
        return _plain
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output.vt100 import Vt100_Output

    screen = Vt100_Output.from_pty(sys.stderr, term=env.terminal_type())
    screen.enable_cpr = False  # asks the terminal nothing: a late answer would end up in the text
    session: PromptSession[str] = PromptSession(history=_history(history), output=screen, key_bindings=_keys())
    return session.prompt


def _plain(prompt: str) -> str:
    output.report(prompt, newline=False)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _keys() -> KeyBindings:
    """Alt-Enter (or Esc, Enter) begins a new line; Enter sends."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Path | None) -> History:
    """What was typed is nobody else's business: the file is made with mode 0600."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = path or Path(env.state_folder()) / "chat_history"
    try:
        if path is None:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file == Path(os.devnull):
            return InMemoryHistory()
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        content = inputs.read_bytes(file, 16 * HISTORY_BYTES)
        if path is None and len(content) > HISTORY_BYTES:
            write_file(file, content[content.find(b"\n# ", len(content) - HISTORY_BYTES // 2) + 1 :])
    except OSError as error:
        output.note(f"the lines you type are not kept: {file}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(file))


def read_message(read_line: Callable[[str], str], prompt: str = "> ", more: str = ". ") -> str:
    """One message of one or several lines. read_line gets a prompt and gives a line without its newline, or a pasted
    block whole.

    EOFError and KeyboardInterrupt of read_line pass through.
    """
    text = read_line(prompt)
    if text.lstrip().startswith(BLOCK):
        text = text.lstrip().removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + read_line(more)
        return text.rstrip().removesuffix(BLOCK).strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read_line(more)
    return text


def is_command(message: str) -> bool:
    """A slash begins a command, but not a pasted block such as a comment of C."""
    return message.startswith("/") and len(split_lines(message)) == 1 and not message.startswith(("//", "/*"))
