"""A text with a hole in it: where the hole is, and which part of the text around it fits the context.

The model sees text with `\\n` line endings; the text keeps its own, and the answer takes the text's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_codellama.errors import ContextOverflowError, PromptError, counted

if TYPE_CHECKING:
    from mlx_codellama.tokenizer import Tokenizer

FILL_ME = "<FILL_ME>"
BOM = "\ufeff"
LONGEST = 16  # characters of the longest piece that Llama's tokenizer finds in text
LEAST_ROOM = 16  # tokens of text around the hole, below which nothing sensible is written


@dataclass(frozen=True)
class Hole:
    """A text cut at the hole. before + answer + after is the new text, in the file's own line endings."""

    before: str
    after: str
    newline: str  # "\n" or "\r\n": the ending that most lines of the file have
    mark: str = ""  # what stands at the hole in the file and the answer replaces

    @property
    def text(self) -> str:
        """The whole text as it was, mark included."""
        return self.before + self.mark + self.after

    @property
    def prefix(self) -> str:
        """What the model sees before the hole."""
        return self.before.removeprefix(BOM).replace("\r\n", "\n")

    @property
    def suffix(self) -> str:
        return self.after.replace("\r\n", "\n")

    def filled(self, answer: str) -> str:
        return self.before + self.native(answer) + self.after

    def native(self, answer: str) -> str:
        return answer.replace("\r\n", "\n").replace("\n", self.newline)


def newline_of(text: str) -> str:
    crlf = text.count("\r\n")
    return "\r\n" if crlf * 2 > text.count("\n") else "\n"


def hole_at(text: str, line: int, column: int | None, name: str) -> Hole:
    """The hole at a 1-based line and column; columns count characters, and none means the end of the line.

    A text that ends in a newline has one more, empty, line after it. Raises PromptError when out of range.
    """
    body = text.removeprefix(BOM)
    starts = [0, *(m.end() for m in re.finditer("\n", body))]
    if not 1 <= line <= len(starts):
        raise PromptError(f"{name} has no line {line}", hint=f"it has {counted(len(starts), 'line')}, counted from 1")
    start = starts[line - 1]
    end = starts[line] - 1 if line < len(starts) else len(body)
    if end > start and line < len(starts) and body[end - 1] == "\r":
        end -= 1
    width = end - start
    if column is not None and not 1 <= column <= width + 1:
        raise PromptError(
            f"line {line} of {name} has no column {column}",
            hint=f"the line has {counted(width, 'character')}: columns 1 to {width + 1}",
        )
    at = len(text) - len(body) + (end if column is None else start + column - 1)
    return Hole(text[:at], text[at:], newline_of(text))


def hole_marked(text: str, name: str, *, is_file: bool = True) -> Hole:
    """The hole at the one `<FILL_ME>` in the text. Raises PromptError where there is none or more than one.

    is_file  whether the hint may offer a line and a column instead
    """
    found = text.count(FILL_ME)
    if found != 1:
        instead = f", or name it: {name}:LINE or {name}:LINE:COL" if is_file else ""
        raise PromptError(
            f"{name} holds no {FILL_ME}" if not found else f"{name} holds {FILL_ME} {found} times",
            hint=f"mark the one place to fill with {FILL_ME}{instead}",
        )
    before, _, after = text.partition(FILL_ME)
    return Hole(before, after, newline_of(text), FILL_ME)


@dataclass(frozen=True)
class Window:
    """The part of a prefix and a suffix that fits the context. Lines and columns count from 1 in the whole text.

    first_column, last_column  of the first and the last character seen; line ends are none
    whole                      everything is seen;  whole_lines  what is seen begins and ends with a line
    """

    prefix: str
    suffix: str
    first_line: int
    last_line: int
    n_lines: int
    first_column: int
    last_column: int
    whole: bool
    whole_lines: bool

    @classmethod
    def of(cls, prefix: str, suffix: str, n_before: int, n_after: int) -> Window:
        """The last n_before characters of the prefix and the first n_after of the suffix."""
        text, start, end = prefix + suffix, len(prefix) - n_before, len(prefix) + n_after
        last = end - 1 if end > start and text[end - 1] == "\n" else end
        first_begin, last_begin = text.rfind("\n", 0, start) + 1, text.rfind("\n", 0, last) + 1
        return cls(
            prefix[start:],
            suffix[:n_after],
            first_line=text.count("\n", 0, start) + 1,
            last_line=text.count("\n", 0, last) + 1,
            n_lines=text.count("\n") + 1,
            first_column=start - first_begin + 1,
            last_column=last - last_begin,
            whole=start == 0 and end == len(text),
            whole_lines=start == first_begin and (end == len(text) or text[end - 1 : end + 1].find("\n") >= 0),
        )

    @property
    def span(self) -> str:
        """What is seen, in words."""
        if self.whole_lines:
            return f"lines {self.first_line} to {self.last_line}"
        if self.first_line == self.last_line:
            return f"columns {self.first_column:,} to {self.last_column:,} of line {self.first_line}"
        return (
            f"line {self.first_line} from column {self.first_column:,} "
            f"to line {self.last_line} up to column {self.last_column:,}"
        )


def window(
    prefix: str, suffix: str, n_tokens: Callable[[str], int], budget: int, prompt_tokens: Callable[[str, str], int]
) -> Window:
    """Keep whole lines around the cursor, outwards, until the prompt takes `budget` tokens.

    n_tokens       tokens of one line
    prompt_tokens  tokens of the whole prompt made of (prefix, suffix); the result is checked with it
    budget         tokens the prompt may take
    The suffix gets up to a third, more where the prefix is short. A line at the cursor that is longer than its share
    is cut. Raises PromptError where the budget is too small for any text.
    """
    if len(prefix) + len(suffix) <= 8 * budget and prompt_tokens(prefix, suffix) <= budget:
        return Window.of(prefix, suffix, len(prefix), len(suffix))
    near = LONGEST * budget  # characters: what lies farther off cannot be seen
    left, right = split_lines(prefix[-near:])[::-1], split_lines(suffix[:near])
    left_costs, right_costs = _costs(left, n_tokens, budget), _costs(right, n_tokens, budget)
    slack = 8  # the control ids, and joins of lines that take a token more
    while budget > slack:
        room = budget - slack
        for_right = min(sum(right_costs), max(room // 3, room - sum(left_costs)))
        a, b = _fitting(left_costs, room - for_right), _fitting(right_costs, for_right)
        kept, rest = "".join(left[:a][::-1]), "".join(right[:b])
        if left and not a:
            kept = _longest(lambda n: left[0][-n:] if n else "", len(left[0]), n_tokens, room - for_right)
        if right and not b:
            rest = _longest(lambda n: right[0][:n], len(right[0]), n_tokens, for_right)
        if (kept or rest) and prompt_tokens(kept, rest) <= budget:
            return Window.of(prefix, suffix, len(kept), len(rest))
        slack *= 2
    raise PromptError(
        f"no text fits the {budget} tokens left for the prompt",
        hint="lower --max-tokens, or take a model with a longer context",
    )


def fit_window(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    n_prompt: Callable[[str, str], int],
    *,
    context: int,
    max_tokens: int,
    reserved: int = 0,
) -> Window:
    """The part of a text that fits a context beside its answer.

    n_prompt    tokens of a prompt made of (prefix, suffix)
    context     tokens of prompt and answer;  max_tokens: of the answer
    reserved    tokens kept free for other text before it, unless that leaves fewer than LEAST_ROOM
    Raises ContextOverflowError if the answer leaves no room.
    """
    budget = context - max_tokens
    if budget < LEAST_ROOM and n_prompt(prefix, suffix) > budget:
        raise ContextOverflowError(
            f"{max_tokens} new tokens leave no room in a context of {context}", hint="lower --max-tokens"
        )
    budget = max(min(budget, LEAST_ROOM), budget - reserved)
    return window(prefix, suffix, lambda line: len(tokenizer.encode_infilling(line)), budget, n_prompt)


def split_lines(text: str) -> list[str]:
    """Lines with their newlines. Unlike str.splitlines, form feeds and U+2028 are characters, as they are to `diff`."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _costs(lines: list[str], n_tokens: Callable[[str], int], budget: int) -> list[int]:
    """Tokens of each line, nearest first, until they exceed the budget."""
    costs: list[int] = []
    total = 0
    for line in lines:
        costs.append(n_tokens(line) if len(line) <= LONGEST * budget else budget + 1)
        total += costs[-1]
        if total > budget:
            break
    return costs


def _fitting(costs: list[int], room: int) -> int:
    """How many of the first costs sum to at most room."""
    total = 0
    for i, cost in enumerate(costs):
        total += cost
        if total > room:
            return i
    return len(costs)


def _longest(part: Callable[[int], str], most: int, n_tokens: Callable[[str], int], room: int) -> str:
    """The longest part(n), n ≤ most characters, of at most `room` tokens."""
    low, high = 0, min(most, LONGEST * max(room, 0)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if n_tokens(part(middle)) <= room else (low, middle)
    return part(low)
