"""What callers pass: taken in every form that can only mean one thing, refused by name before anything is computed."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import CONTEXT, tiny_codellama, tiny_tokenizer

import mlx_codellama
from mlx_codellama.api import CodeLlama
from mlx_codellama.api.arguments import Options
from mlx_codellama.config import MAX_TOKENS
from mlx_codellama.errors import ContextOverflowError, NotSupported, PromptError
from mlx_codellama.tokenizer import Tokenizer

PROMPT = "def f(x):"


@pytest.mark.parametrize(
    "numbers",
    [
        {"seed": np.uint64(2**63 + 1), "max_tokens": np.int32(3), "top_k": np.int64(5), "temperature": np.float32(0.5)},
        {"seed": np.array(7), "max_tokens": mx.array(3), "top_k": np.uint8(5), "temperature": np.float64(0.5)},
        {"seed": 7, "max_tokens": 3, "min_p": np.float16(0.25), "temperature": mx.array(0.5)},
    ],
)
def test_numpys_and_mlxs_numbers_are_numbers(numbers: dict[str, Any]) -> None:
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in numbers.items()}
    assert tiny_codellama().complete(PROMPT, **numbers).ids == tiny_codellama().complete(PROMPT, **plain).ids


def test_no_stop_text_may_be_none() -> None:
    assert tiny_codellama().complete(PROMPT, max_tokens=3, stop=None).finish_reason == "length"


@pytest.mark.parametrize("wrong", [{"cancel": True}, {"lookup": "no"}, {"lookup": 1}, {"on_prefill": True}])
def test_a_value_of_another_kind_is_a_type_error_that_names_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))} is "):
        tiny_codellama().complete(PROMPT, max_tokens=3, **wrong)


@pytest.mark.parametrize("max_tokens", [True, 1.5, np.float32(2), "3"])
def test_a_number_of_tokens_is_a_whole_number(max_tokens: Any) -> None:
    with pytest.raises(TypeError, match=r"^max_tokens is "):
        tiny_codellama().complete(PROMPT, max_tokens=max_tokens)


def test_any_event_cancels() -> None:
    class Event:
        def is_set(self) -> bool:
            return True

    set_event = threading.Event()
    set_event.set()
    for cancel in (Event(), set_event, lambda: True):
        assert tiny_codellama().complete(PROMPT, max_tokens=9, cancel=cancel).finish_reason == "cancelled"  # type: ignore[arg-type]


def test_content_in_openais_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    asked = tiny_codellama().chat([{"role": "user", "content": parts}], max_tokens=3)
    assert asked.ids == tiny_codellama().chat([{"role": "user", "content": "What is 1 + 1?"}], max_tokens=3).ids


def test_a_picture_is_refused_and_named() -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(PromptError, match=r"messages\[0\]\.content\[1\] is of type 'image_url'"):
        tiny_codellama().chat([{"role": "user", "content": parts}])


def test_a_part_that_is_no_mapping_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"messages\[0\]\.content\[0\] is 'hi'"):
        tiny_codellama().chat([{"role": "user", "content": ["hi"]}])


# ── text that cannot fit is refused before it is encoded ────────────────────────────────────────────────────────────


@given(st.text(max_size=200))
def test_no_text_has_fewer_tokens_than_the_lower_bound(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_the_lower_bound_is_met_by_the_longest_piece() -> None:
    assert tiny_tokenizer().least_tokens(" " * 160) == 10


def test_a_tokenizer_that_drops_characters_has_no_lower_bound() -> None:
    drops = tiny_tokenizer().model_bytes + b"\x1a\x02\x20\x01"  # the normaliser's remove_extra_whitespaces
    assert Tokenizer(drops).least_tokens(" " * 1000) == 0


@pytest.mark.parametrize("call", ["complete", "infill", "chat"])
def test_what_cannot_fit_the_context_is_refused_before_it_is_encoded(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * (CONTEXT * 16 + 1)
    arguments: dict[str, Any] = {
        "complete": {"prompt": text},
        "infill": {"prefix": text[:4000], "suffix": text[4000:]},
        "chat": {"messages": [{"role": "user", "content": text}]},
    }[call]
    m = tiny_codellama()
    monkeypatch.setattr(Tokenizer, "_encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ContextOverflowError, match=f"at least {CONTEXT + 1} tokens, the context {CONTEXT}"):
        getattr(m, call)(**arguments)


# ── what a call says about itself ───────────────────────────────────────────────────────────────────────────────────


def test_a_seed_that_nobody_gave_is_reported_and_repeats_the_call() -> None:
    first = tiny_codellama().complete(PROMPT, max_tokens=12, temperature=1.5)
    assert first.stats.seed is not None
    again = tiny_codellama().complete(PROMPT, max_tokens=12, temperature=1.5, seed=first.stats.seed)
    assert (again.ids, again.stats.seed) == (first.ids, first.stats.seed)


def test_a_greedy_call_has_no_seed() -> None:
    assert tiny_codellama().complete(PROMPT, max_tokens=2, seed=3).stats.seed is None


@pytest.mark.parametrize("name", ["complete", "infill", "chat", "stream_complete", "stream_infill", "stream_chat"])
def test_help_names_every_option_with_its_default(name: str) -> None:
    call = getattr(CodeLlama, name)
    shown = inspect.signature(call).parameters
    assert set(Options.__annotations__) <= set(shown)
    assert (shown["temperature"].default, shown["repetition_window"].default, shown["seed"].default) == (0.0, 64, None)
    assert "on_prefill  called with" in call.__doc__


def test_a_call_that_does_not_say_ends_after_the_default_of_its_kind() -> None:
    assert tiny_codellama().complete(PROMPT).stats.generated_tokens == MAX_TOKENS["complete"] == 128


def test_the_repr_of_a_model_says_what_it_is() -> None:
    assert repr(mlx_codellama.load()) == ("<CodeLlama 'demo': 6.52 million parameters, 4 bits, 512 tokens of context>")


def test_a_closed_model_says_so_and_a_fork_goes_on() -> None:
    with tiny_codellama() as m:
        other = m.fork()
    for use in (lambda: m.complete(PROMPT), lambda: m.args, lambda: m.cached_tokens):
        with pytest.raises(NotSupported, match="closed"):
            use()
    assert repr(m) == "<CodeLlama: closed>"
    m.close()
    assert other.complete(PROMPT, max_tokens=2).stats.generated_tokens == 2
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        m.nonsense  # noqa: B018


def test_loading_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    mlx_codellama.load(progress=lambda *at: told.append(at))
    done = [at[1] for at in told]
    assert done == sorted(set(done))
    assert told[-1][1] == told[-1][2]
    assert {at[2] for at in told} == {told[-1][2]}
    assert told[0][0].startswith("model.")
