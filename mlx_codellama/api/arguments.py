"""What callers pass, held to its kind before anything is computed. A wrong kind is a TypeError that names it."""

from __future__ import annotations

import inspect
import numbers
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, TypeVar

from mlx_codellama.errors import ContextOverflowError, PromptError
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.tokenizer import Tokenizer

F = TypeVar("F", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """Keyword arguments of every generating call, besides max_tokens.

    temperature, top_p, top_k, min_p, repetition_penalty, repetition_window
                see `mlx_codellama.sampling.SamplingParams`
    seed        the same seed, prompt and parameters draw the same tokens; None draws one, and `stats.seed` reports it
    stop        a text or several; generation ends before the first of them to be complete
    logprobs    0 for the logarithm of each chosen token's probability, n for the n most likely as well
    lookup      check several tokens at once if the context suggests them and that is faster (prompt lookup). Quantised
                weights on the native CPU kernels: no id, logarithm or stored byte changes. Elsewhere several rows may
                round differently than one, which tips a choice now and then. Default: on in float32, except over
                keys or values of 4 bits where the native kernels do not compute the whole model
    cancel      an Event, or a function that returns True, to end early with finish_reason "cancelled"
    on_prefill  called with (prompt tokens read, prompt tokens) while a long prompt is read
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    repetition_window: int
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    lookup: bool | None
    cancel: threading.Event | Callable[[], bool] | None
    on_prefill: Callable[[int, int], None] | None


def with_options(function: F) -> F:
    """Show each of Options, with its default and its meaning, in `help` and in `inspect.signature`."""
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    kind = inspect.Parameter.KEYWORD_ONLY
    for name, hint in Options.__annotations__.items():
        shown = getattr(hint, "__forward_arg__", hint)
        named.append(inspect.Parameter(name, kind, default=defaults.get(name), annotation=shown))
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{inspect.cleandoc(Options.__doc__ or '')}"
    return function


def check_length(tokenizer: Tokenizer, context: int, *texts: str) -> None:
    """Refuse text that cannot fit the context, before it is encoded: that takes 40 bytes for each of its own.

    Raises ContextOverflowError.
    """
    least = sum(tokenizer.least_tokens(text) for text in texts)
    if least > context:
        raise ContextOverflowError(
            f"the prompt has at least {least} tokens, the context {context}",
            hint="shorten the prompt, or read beyond what the model was trained for (max_context=, --max-context)",
        )


def text(value: object, name: str) -> str:
    """value, which must be a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_kind(value)}; expected text (str)")
    return value


def token_ids(value: object, name: str, *, or_text: bool = False) -> list[int]:
    """value as a list of ids: any iterable of whole numbers, arrays too. Bytes are text of some encoding."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(value, Iterable):
        wanted = "text (str) or a list of token ids (int)" if or_text else "a list of token ids (int)"
        raise TypeError(f"{name} is {_kind(value)}; expected {wanted}")
    ids = []
    for position, id in enumerate(value):
        try:
            ids.append(operator.index(id))
        except TypeError:
            raise TypeError(f"{name}[{position}] is {_kind(id)}; token ids are whole numbers (int)") from None
    return ids


def dialog(messages: object) -> Sequence[Mapping[str, str]]:
    """messages, a sequence of mappings; `prompts.chat_ids` looks into them.

    content may be OpenAI's list of {"type": "text", "text": …}, which is joined. Raises PromptError for other parts.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f'messages is {_kind(messages)}; expected a list of {{"role": …, "content": …}}')
    plain_messages = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f'messages[{position}] is {_kind(message)}; expected {{"role": …, "content": …}}')
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": _joined(content, f"messages[{position}].content")}
        plain_messages.append(message)
    return plain_messages


def _joined(parts: Sequence[object], name: str) -> str:
    texts = []
    for position, part in enumerate(parts):
        where = f"{name}[{position}]"
        if not isinstance(part, Mapping):
            raise TypeError(f'{where} is {_kind(part)}; expected {{"type": "text", "text": …}}')
        if part.get("type") != "text":
            raise PromptError(f"{where} is of type {part.get('type')!r}", hint="Code Llama reads text alone")
        texts.append(text(part.get("text"), f"{where}.text"))
    return "".join(texts)


def scalar(value: object) -> object:
    """numpy's and MLX's numbers as Python's; anything else as it is."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if getattr(value, "ndim", None) == 0 and callable(item := getattr(value, "item", None)):
        return item()
    return value


def whole_number(value: object, name: str) -> int:
    """value, which must be an int, numpy's included."""
    number = scalar(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise TypeError(f"{name} is {_kind(value)}; expected a whole number (int)")


def stop_texts(value: object) -> list[str]:
    """None, one text or several, as a list; what is in it, StopMatcher checks."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (bytes, bytearray, Mapping)) or not isinstance(value, Sequence):
        raise TypeError(f"stop is {_kind(value)}; expected a text (str) or a list of them")
    return list(value)


def switch(value: object, name: str) -> bool | None:
    """value, which must be True, False or None."""
    value = scalar(value)
    if value is None or isinstance(value, bool):
        return value
    raise TypeError(f"{name} is {_kind(value)}; expected True, False or None")


def callback(value: object, name: str) -> Callable[..., Any] | None:
    """value, which must be a function or None."""
    if value is None or callable(value):
        return value
    raise TypeError(f"{name} is {_kind(value)}; expected a function or None")


def cancel_check(value: object) -> Callable[[], bool] | None:
    """cancel= as a function: an Event (threading's, or any with is_set), a function or None."""
    is_set = getattr(value, "is_set", value)
    if is_set is None or callable(is_set):
        return is_set
    raise TypeError(f"cancel is {_kind(value)}; expected an Event, a function that returns a bool, or None")


def _kind(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:37] + '…'} ({type(value).__name__})"
