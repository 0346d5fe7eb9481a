"""A conversation with a model: what was said, what of it fits the context, and how it is saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_codellama import inputs
from mlx_codellama.errors import CodeLlamaError, ContextOverflowError, PromptError
from mlx_codellama.hole import Window, fit_window
from mlx_codellama.prompts import chat_ids, prompt_ids
from mlx_codellama.source_file import read_text
from mlx_codellama.staging import write_file
from mlx_codellama.tokenizer import Tokenizer

LOADABLE = "/save FILE.json writes what /load reads"


class Room(NamedTuple):
    """What `fit` found and did."""

    max_tokens: int  # of the answer
    n_forgotten: int  # questions with their answers
    window: Window | None  # what is left of a plain text, if it was cut


@dataclass
class Conversation:
    """A dialog (turns by role) or, if `plain`, one growing text that the model continues.

    attached  (name, text) of files that go before the next question
    """

    plain: bool = False
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    attached: list[tuple[str, str]] = field(default_factory=list)

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
        """Keep the answer. A dialog alternates, so an empty answer drops its question too."""
        if answer or self.plain:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()

    def take_back(self) -> None:
        """Drop the last answer, so that its question is asked again. Raises PromptError if there is none."""
        if len(self.turns) < 2 or self.turns[-1]["role"] != "assistant":
            raise PromptError("there is no answer yet")
        self.turns.pop()

    def forget_oldest(self) -> bool:
        """Drop the oldest question with its answer; False if only the present question is left."""
        if self.plain or len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True

    def reset(self) -> None:
        self.turns.clear()
        self.attached.clear()

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Put the turns back as they were if a CodeLlamaError is raised within."""
        before = list(self.turns)
        try:
            yield
        except CodeLlamaError:
            self.turns[:] = before
            raise

    def fit(self, tokenizer: Tokenizer, context: int, max_tokens: int) -> Room:
        """Forget the oldest turns, or the beginning of a plain text, until the answer has max_tokens tokens or a
        quarter of the context.

        Raises ContextOverflowError, and forgets nothing, if the last question leaves no token for an answer.
        """
        least, forgotten, window = min(max_tokens, max(1, context // 4)), 0, None
        with self.unchanged_on_error():
            if self.plain and self._n_prompt(tokenizer, context) + least > context:
                window = self._cut(tokenizer, context, least)
            while (n := self._n_prompt(tokenizer, context)) + least > context and self.forget_oldest():
                forgotten += 1
            if n >= context:
                raise ContextOverflowError(
                    f"the question has {n:,} tokens, the context {context:,}",
                    hint="ask a shorter one, or raise --max-context",
                )
        return Room(min(max_tokens, context - n), forgotten, window)

    def _cut(self, tokenizer: Tokenizer, context: int, max_tokens: int) -> Window:
        """Keep the system message and the end of a plain text."""
        window = fit_window(
            tokenizer,
            self.text().removeprefix(self.system),
            "",
            lambda text, _: self._n_prompt(tokenizer, context, self.system + text),
            context=context,
            max_tokens=max_tokens,
        )
        self.turns[:] = [{"role": "user", "content": window.prefix}]
        return window

    def _n_prompt(self, tokenizer: Tokenizer, most: int, text: str | None = None) -> int:
        """Tokens of the prompt, of a plain one with this text; a lower bound if they are more than `most`, so that a
        text that is far too long is never encoded."""
        plain, messages = self.text() if text is None else text, self.messages()
        texts = [plain] if self.plain else [message["content"] for message in messages]
        least = sum(map(tokenizer.least_tokens, texts))
        if least > most:
            return least
        return len(prompt_ids(tokenizer, plain) if self.plain else chat_ids(tokenizer, messages))

    def save(self, path: Path) -> None:
        """Write all turns to a new file, as JSON if it is named so. Raises OutputExistsError, OutputError."""
        if path.suffix == ".json":
            content = json.dumps(self.messages(), ensure_ascii=False, indent=1) + "\n"
        elif self.plain:
            content = self.text()
        else:
            content = "\n".join(f"## {m['role']}\n\n{m['content'].strip()}\n" for m in self.messages())
        write_file(path, content.encode("utf-8"), new=True)

    def load(self, path: Path) -> None:
        """Continue a dialog that `save` wrote as JSON, or any text if `plain`. Raises PromptError."""
        if self.plain:
            self.turns = [{"role": "user", "content": read_text(path)}]
            return
        try:
            messages = inputs.read_json(path)
        except OSError as error:
            raise PromptError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise PromptError(f"{path} is not JSON: {error}", hint=LOADABLE) from None
        roles = [_role(message) for message in messages] if isinstance(messages, list) else [""]
        begins = roles[:1] == ["system"]
        turns = roles[begins:]
        if not turns or turns != [("user", "assistant")[n % 2] for n in range(len(turns))] or len(turns) % 2:
            raise PromptError(f"{path} holds no dialog of questions, each with its answer", hint=LOADABLE)
        self.reset()
        self.system = messages[0]["content"] if begins else self.system
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages[begins:]]


def _role(message: object) -> str:
    """The role of a message with text; "" for anything else."""
    if isinstance(message, dict) and isinstance(message.get("content"), str):
        return str(message.get("role"))
    return ""
