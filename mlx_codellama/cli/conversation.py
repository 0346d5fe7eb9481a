"""A conversation with a model: what was said, the slash commands, and how a message is read from a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_codellama.errors import ContextOverflowError, PromptError
from mlx_codellama.staging import write_file

BLOCK = '"""'
HELP = """\
/help           this list
/reset          forget the conversation (the system message stays)
/system [TEXT]  set the system message, or show it
/save FILE      write the conversation to a new file (JSON where it ends in .json, else Markdown)
/quit           leave; Ctrl-D does the same
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a message of several lines.
Ctrl-C stops the answer, or drops the line being typed."""


@dataclass
class Conversation:
    """A dialog (turns by role), or, where `plain`, one growing text that the model continues."""

    plain: bool = False
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The dialog as chat models take it."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def text(self) -> str:
        """The plain text so far."""
        return self.system + "".join(turn["content"] for turn in self.turns)

    def ask(self, question: str) -> None:
        if self.plain and self.turns and not self.text().endswith("\n"):
            question = "\n" + question  # what is typed is a new line of the text
        self.turns.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        """Keep the answer; where there is none, the question is dropped too, for a dialog alternates."""
        if answer or self.plain:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()

    def forget_oldest(self) -> bool:
        """Drop the oldest question with its answer; False where only the present question is left."""
        if self.plain or len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True

    def reset(self) -> None:
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write all turns. Raises OutputExistsError, OutputError."""
        if path.suffix == ".json":
            content = json.dumps(self.messages(), ensure_ascii=False, indent=1) + "\n"
        elif self.plain:
            content = self.text()
        else:
            content = "\n".join(f"## {m['role']}\n\n{m['content'].strip()}\n" for m in self.messages())
        write_file(path, content.encode("utf-8"), new=True)

    def command(self, line: str, say: Callable[[str], None]) -> bool:
        """Carry out a slash command; False means quit. Raises PromptError for an unknown one."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit", "/q"):
            return False
        if name in ("/help", "/?"):
            say(HELP)
        elif name == "/reset":
            self.reset()
            say("forgotten")
        elif name == "/system":
            if rest:
                self.system = rest
                self.reset()
                say("system message set; the conversation starts anew")
            else:
                say(self.system or "no system message")
        elif name == "/save":
            if not rest:
                raise PromptError("/save needs a file name", hint="for example: /save talk.md")
            path = Path(rest).expanduser()
            self.save(path)
            say(f"saved to {path}")
        else:
            raise PromptError(
                f"unknown command {name}", hint="/help lists them; begin with a space to send such a line"
            )
        return True


def read_message(read_line: Callable[[str], str], prompt: str = "> ", more: str = ". ") -> str:
    """One message of one or several lines. read_line gets a prompt and gives a line without its newline.

    EOFError and KeyboardInterrupt of read_line pass through.
    """
    line = read_line(prompt)
    if line.lstrip().startswith(BLOCK):
        lines = [line.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(read_line(more))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(more))
    return "\n".join(lines)


def fitting(
    conversation: Conversation, start: Callable[[], Iterator[str]], note: Callable[[str], None]
) -> Iterator[str]:
    """The answer's pieces; where the dialog outgrows the context, its oldest turns are forgotten, with a note.

    Where that does not help either, nothing is forgotten and the error passes through.
    """
    forgotten, turns = 0, list(conversation.turns)
    while True:
        try:
            pieces = start()
            first = next(pieces, None)
        except ContextOverflowError:
            if not conversation.forget_oldest():
                conversation.turns[:] = turns
                raise
            forgotten += 1
            continue
        break
    if forgotten:
        note(f"the context is full; forgotten, oldest first: {forgotten} of the questions with their answers")
    if first is not None:
        yield first
        yield from pieces
