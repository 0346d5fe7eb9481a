"""A conversation with a model: what was said, and how it goes to a file and comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mlx_codellama import inputs
from mlx_codellama.cli.cursor import read_text
from mlx_codellama.errors import PromptError
from mlx_codellama.staging import write_file


@dataclass
class Conversation:
    """A dialog (turns by role), or, where `plain`, one growing text that the model continues."""

    plain: bool = False
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    attached: list[tuple[str, str]] = field(
        default_factory=list
    )  # (name, text) of files that go before the next question

    def messages(self) -> list[dict[str, str]]:
        """The dialog as chat models take it."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def text(self) -> str:
        """The plain text so far."""
        return self.system + "".join(turn["content"] for turn in self.turns)

    def ask(self, question: str) -> None:
        """Add a question, with the files attached before it."""
        for name, text in reversed(self.attached):
            ended = text if text.endswith("\n") else text + "\n"
            question = ended + question if self.plain else f"{name}:\n```\n{ended}```\n\n{question}"
        self.attached.clear()
        if self.plain and self.turns and not self.text().endswith("\n"):
            question = "\n" + question  # what is typed is a new line of the text
        self.turns.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        """Keep the answer; where there is none, the question is dropped too, for a dialog alternates."""
        if answer or self.plain:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()

    def take_back(self) -> bool:
        """Drop the last answer, so that its question is asked again; False if there is none."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            return False
        self.turns.pop()
        return bool(self.turns)

    def forget_oldest(self) -> bool:
        """Drop the oldest question with its answer; False where only the present question is left."""
        if self.plain or len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True

    def reset(self) -> None:
        self.turns.clear()
        self.attached.clear()

    def save(self, path: Path) -> None:
        """Write all turns. Raises OutputExistsError, OutputError."""
        if path.suffix == ".json":
            content = json.dumps(self.messages(), ensure_ascii=False, indent=1) + "\n"
        elif self.plain:
            content = self.text()
        else:
            content = "\n".join(f"## {m['role']}\n\n{m['content'].strip()}\n" for m in self.messages())
        write_file(path, content.encode("utf-8"), new=True)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote as JSON; a plain text from any text file. Raises PromptError."""
        if self.plain:
            self.turns = [{"role": "user", "content": read_text(path)}]
            return
        try:
            messages = inputs.read_json(path)
        except OSError as error:
            raise PromptError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise PromptError(f"{path} is not JSON: {error}", hint="/save FILE.json writes what /load reads") from None
        roles = [_role(message) for message in messages] if isinstance(messages, list) else [""]
        begins = roles[:1] == ["system"]
        turns = roles[begins:]
        if not turns or turns != [("user", "assistant")[n % 2] for n in range(len(turns))] or len(turns) % 2:
            raise PromptError(
                f"{path} holds no dialog of questions, each with its answer",
                hint="/save FILE.json writes what /load reads",
            )
        self.reset()
        self.system = messages[0]["content"] if begins else self.system
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages[begins:]]


def _role(message: object) -> str:
    """The role of a message with text; "" for anything else."""
    if isinstance(message, dict) and isinstance(message.get("content"), str):
        return str(message.get("role"))
    return ""
