"""Where a hole is, and what of a long text the model sees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_codellama.errors import PromptError
from mlx_codellama.hole import Hole, Window, hole_at, hole_marked, newline_of, window

TEXT = "def f(a):\n    x = é1\n\n    return x\n"


@pytest.mark.parametrize(
    ("line", "column", "before"),
    [
        (1, None, "def f(a):"),
        (1, 1, ""),
        (2, 11, "def f(a):\n    x = é1"),  # one past the last character: the end of the line
        (2, 10, "def f(a):\n    x = é"),  # columns count characters, é is one
        (3, None, "def f(a):\n    x = é1\n"),
        (3, 1, "def f(a):\n    x = é1\n"),
        (5, None, TEXT),  # the empty line after the last newline
    ],
)
def test_line_and_column_count_from_one(line: int, column: int | None, before: str) -> None:
    hole = hole_at(TEXT, line, column, "f.py")
    assert hole.before == before
    assert hole.before + hole.after == TEXT


@pytest.mark.parametrize(
    ("line", "column", "message", "hint"),
    [
        (6, None, "f.py has no line 6", "it has 5 lines"),
        (0, None, "f.py has no line 0", "counted from 1"),
        (1, 11, "line 1 of f.py has no column 11", "9 characters: columns 1 to 10"),
        (1, 0, "no column 0", "columns 1 to 10"),
    ],
)
def test_out_of_range_says_what_there_is(line: int, column: int | None, message: str, hint: str) -> None:
    with pytest.raises(PromptError) as error:
        hole_at(TEXT, line, column, "f.py")
    assert message in str(error.value)
    assert hint in error.value.hint


def test_an_empty_file_has_one_empty_line() -> None:
    assert hole_at("", 1, 1, "f.py") == Hole("", "", "\n")
    with pytest.raises(PromptError):
        hole_at("", 2, None, "f.py")


def test_crlf_is_hidden_from_the_model_and_comes_back_with_the_answer() -> None:
    hole = hole_at(TEXT.replace("\n", "\r\n"), 2, None, "f.py")
    assert hole.prefix == "def f(a):\n    x = é1"
    assert hole.suffix == "\n\n    return x\n"
    assert hole.filled("\n    y = 2") == TEXT.replace("é1\n", "é1\n    y = 2\n").replace("\n", "\r\n")


def test_a_byte_order_mark_stays_in_the_file_and_is_no_column() -> None:
    hole = hole_at("\ufeffab\n", 1, 2, "f.py")
    assert hole.prefix == "a"
    assert hole.filled("X") == "\ufeffaXb\n"


def test_mixed_endings_are_left_alone_and_the_answer_takes_the_commoner_one() -> None:
    assert newline_of("a\r\nb\r\nc\n") == "\r\n"
    assert newline_of("a\r\nb\nc\n") == "\n"
    hole = hole_at("a\r\nb\nc\n", 2, None, "f.py")
    assert hole.filled("\nx") == "a\r\nb\nx\nc\n"


@settings(deadline=None)
@given(st.text(alphabet="ab\n\ré ", max_size=40), st.data())
def test_any_position_cuts_the_text_in_two_and_loses_nothing(text: str, data: st.DataObject) -> None:
    line = data.draw(st.integers(1, text.count("\n") + 1))
    hole = hole_at(text, line, None, "f")
    assert hole.before + hole.after == text
    assert hole.before.count("\n") == line - 1
    assert hole.after[:1] in ("", "\n", "\r")


def test_the_mark_must_be_there_once() -> None:
    assert hole_marked("a<FILL_ME>b", "f") == Hole("a", "b", "\n", mark="<FILL_ME>")
    with pytest.raises(PromptError, match=r"holds no <FILL_ME>"):
        hole_marked("ab", "f")
    with pytest.raises(PromptError, match="2 times"):
        hole_marked("<FILL_ME><FILL_ME>", "f")


def test_a_missing_mark_offers_a_line_only_where_lines_can_be_named() -> None:
    with pytest.raises(PromptError) as error:
        hole_marked("ab", "f.py")
    assert "f.py:LINE:COL" in error.value.hint
    with pytest.raises(PromptError) as error:
        hole_marked("ab", "stdin", is_file=False)
    assert error.value.hint == "mark the one place to fill with <FILL_ME>"


# Tokens are words here: a count that lines add up to, and three control ids for the whole prompt.
def words(text: str) -> int:
    return len(text.split())


def prompt_words(prefix: str, suffix: str) -> int:
    return words(prefix) + words(suffix) + 3


PREFIX = "".join(f"p{i} p p p\n" for i in range(1, 101))
SUFFIX = "".join(f"\ns{i} s s s" for i in range(1, 101))


def test_a_text_that_fits_is_seen_whole() -> None:
    seen = window("a b\nc", " d\ne", words, 20, prompt_words)
    assert (seen.prefix, seen.suffix) == ("a b\nc", " d\ne")
    assert (seen.first_line, seen.last_line, seen.n_lines) == (1, 3, 3)


@pytest.mark.parametrize("budget", [20, 60, 200, 500, 790])
def test_a_long_text_is_cut_to_whole_lines_around_the_cursor(budget: int) -> None:
    seen = window(PREFIX + "here ", SUFFIX, words, budget, prompt_words)
    assert budget / 2 < prompt_words(seen.prefix, seen.suffix) <= budget  # fits, and the room is used
    assert (PREFIX + "here ").endswith(seen.prefix)
    assert SUFFIX.startswith(seen.suffix)
    assert seen.prefix.startswith("p")
    assert seen.suffix == "" or seen.suffix.endswith(("s", "\n"))
    assert words(seen.prefix) >= words(seen.suffix)
    assert seen.prefix.splitlines()[0] == (PREFIX + "here ").splitlines()[seen.first_line - 1]


def test_a_short_prefix_leaves_its_room_to_the_suffix() -> None:
    seen = window("a\n", SUFFIX, words, 100, prompt_words)
    assert seen.prefix == "a\n"
    assert words(seen.suffix) > 80


def test_a_line_longer_than_the_budget_is_cut_at_the_cursor() -> None:
    seen = window("x " * 5000, "y " * 5000, words, 90, prompt_words)
    assert 45 < prompt_words(seen.prefix, seen.suffix) <= 90
    assert seen.prefix.endswith("x ")
    assert seen.suffix.startswith("y ")


@pytest.mark.parametrize(
    ("prefix", "suffix", "before", "after", "span"),
    [
        ("ab\ncd", "e\nf\n", 5, 4, "lines 1 to 3"),
        ("ab\ncd", "e\nf\n", 2, 2, "lines 2 to 2"),
        ("ab\ncd", "e\nf\n", 2, 1, "lines 2 to 2"),  # its end is not seen, all of its characters are
        ("ab\ncd", "e\nf\n", 1, 1, "columns 2 to 3 of line 2"),
        ("ab\ncd", "ef", 2, 1, "columns 1 to 3 of line 2"),
        ("ab\ncd", "e\nfgh\n", 4, 4, "line 1 from column 2 to line 3 up to column 2"),
        ("x" * 1_500_000, "y" * 1_500_000, 20, 10, "columns 1,499,981 to 1,500,010 of line 1"),
    ],
)
def test_what_is_seen_is_told_in_lines_or_where_lines_are_cut_in_columns(
    prefix: str, suffix: str, before: int, after: int, span: str
) -> None:
    seen = Window.of(prefix, suffix, before, after)
    assert seen.span == span
    assert (seen.prefix, seen.suffix) == (prefix[len(prefix) - before :], suffix[:after])
    assert seen.whole == (len(prefix) == before and len(suffix) == after)


def test_a_budget_for_no_text_at_all_is_an_error() -> None:
    with pytest.raises(PromptError, match="no text fits"):
        window(PREFIX, SUFFIX, words, 5, prompt_words)


@pytest.mark.parametrize("line", ["word " * 20, "word " * 400_000])
def test_no_more_text_is_counted_than_could_be_seen(line: str) -> None:
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return words(text)

    text = f"{line}\n" * (2_000_000 // len(line))
    seen = window(text, text, count, 100, lambda prefix, suffix: count(prefix) + count(suffix) + 3)
    assert seen.prefix
    assert text.endswith(seen.prefix)
    assert counted < 100_000  # of 4,000,000 characters
