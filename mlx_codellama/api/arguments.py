"""What callers pass, held to its kind before anything is computed. A wrong kind is a TypeError that names it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence


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
    """messages, a sequence of mappings; `prompts.chat_ids` looks into them."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f'messages is {_kind(messages)}; expected a list of {{"role": …, "content": …}}')
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f'messages[{position}] is {_kind(message)}; expected {{"role": …, "content": …}}')
    return messages


def whole_number(value: object, name: str) -> int:
    """value, which must be an int."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError(f"{name} is {_kind(value)}; expected a whole number (int)")


def stop_texts(value: object) -> list[str]:
    """One text or several, as a list; what is in it, StopMatcher checks."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, (bytes, bytearray, Mapping)) or not isinstance(value, Sequence):
        raise TypeError(f"stop is {_kind(value)}; expected a text (str) or a list of them")
    return list(value)


def _kind(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:37] + '…'} ({type(value).__name__})"
