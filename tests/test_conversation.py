"""What a conversation keeps of what was said."""

from __future__ import annotations

import pytest

from mlx_codellama.conversation import Conversation
from mlx_codellama.errors import PromptError


def test_plain_turns_are_lines_of_one_text() -> None:
    talk = Conversation(plain=True)
    for question, answer in (("def f():", "\n    pass"), ("def g():", "\n    pass\n"), ("x", "")):
        talk.ask(question)
        talk.answered(answer)
    assert talk.text() == "def f():\n    pass\ndef g():\n    pass\nx"


def test_an_empty_answer_takes_its_question_along() -> None:
    talk = Conversation()
    talk.ask("q")
    talk.answered("")
    assert talk.messages() == []


def test_an_error_leaves_the_turns_as_they_were() -> None:
    talk = Conversation()
    talk.ask("q")
    talk.answered("a")
    before = list(talk.turns)

    def refused() -> None:
        with talk.unchanged_on_error():
            talk.take_back()
            talk.ask("another")
            raise PromptError("refused")

    with pytest.raises(PromptError):
        refused()
    assert talk.turns == before


def test_without_an_answer_there_is_none_to_take_back() -> None:
    talk = Conversation()
    talk.ask("q")
    with pytest.raises(PromptError, match="no answer yet"):
        talk.take_back()
