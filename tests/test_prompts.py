"""Prompts to the token id: known sequences, and Meta's formatting written again here on SentencePiece itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mlx_codellama.errors import NotSupported, PromptError
from mlx_codellama.prompts import (
    DIALOG_TAGS,
    chat_ids,
    infill_ids,
    parse_literal_infill,
    prompt_ids,
    stop_ids,
)
from mlx_codellama.tokenizer import Tokenizer, with_infill_pieces, without_dummy_prefix

GOLDEN = json.loads((Path(__file__).parent / "golden" / "token_ids.json").read_text())
PARTS = [
    ("def f(x):\n    return ", "\n\nprint(f(1))\n"),
    ("", "\nrest"),
    ("import os\n", ""),
    ("", ""),
    (" leading", " trailing "),
    ("a\r\n", "\r\nb\r\n"),
    ("  two  ", "  two  "),
    ("naïve ☺", "🦙"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# --- infilling ---


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_known_infill_sequence(infill_tokenizer: Tokenizer, order: str) -> None:
    known = GOLDEN["infill"]
    assert infill_ids(infill_tokenizer, known["prefix"], known["suffix"], order=order) == known[order]


@pytest.mark.parametrize("kind", ["SingleLine", "MultiLine"])
def test_humaneval_infilling_rows_equal_metas_formatting(
    shared_data: Path, infill_tokenizer: Tokenizer, kind: str
) -> None:
    meta = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "llama-tokenizer" / "tokenizer.model"))
    seen: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in seen:
            seen[text] = meta.encode(text)
        return seen[text]

    path = shared_data / "human-eval-infilling" / f"HumanEval-{kind}Infilling.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(rows) == {"SingleLine": 1033, "MultiLine": 5815}[kind]
    assert sum(row["suffix"] == "" for row in rows) == {"SingleLine": 156, "MultiLine": 940}[kind]
    for row in rows:
        pre, suf = encode(row["prompt"]), encode("☺" + row["suffix"])[2:]
        assert infill_ids(infill_tokenizer, row["prompt"], row["suffix"]) == [1, 32007, *pre, 32008, *suf, 32009]
        spm = infill_ids(infill_tokenizer, row["prompt"], row["suffix"], order="spm")
        assert spm == [1, 32007, 32008, *suf, 32009, *pre]


def test_humaneval_middles_decode_to_themselves(shared_data: Path, infill_tokenizer: Tokenizer) -> None:
    path = shared_data / "human-eval-infilling" / "HumanEval-SingleLineInfilling.jsonl.gz"
    for line in gzip.decompress(path.read_bytes()).splitlines():
        middle = json.loads(line)["canonical_solution"]
        assert infill_tokenizer.decode_infilling(infill_tokenizer.encode_infilling(middle)) == middle


@pytest.mark.parametrize(("prefix", "suffix"), PARTS)
@pytest.mark.parametrize("dummy", [True, False])
def test_infill_form_holds_for_any_vocabulary_and_dummy_setting(
    small_tokenizer: Tokenizer, prefix: str, suffix: str, dummy: bool
) -> None:
    model = small_tokenizer.model_bytes
    tok = small_tokenizer if dummy else Tokenizer(without_dummy_prefix(model))
    with_prefix = sentencepiece.SentencePieceProcessor(model_proto=model if dummy else without_dummy_prefix(model))
    bare = sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(model))
    pre, suf, mid, _ = (bare.piece_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    p, s = with_prefix.encode(prefix), bare.encode(suffix)
    assert infill_ids(tok, prefix, suffix) == [1, pre, *p, suf, *s, mid]
    assert infill_ids(tok, prefix, suffix, order="spm") == [1, pre, suf, *s, mid, *p]
    assert bool(p) == bool(prefix)  # an empty prefix has no dummy space of its own


def test_tags_in_the_users_file_are_text(infill_tokenizer: Tokenizer) -> None:
    ids = infill_ids(infill_tokenizer, "x = ' <SUF>' <MID>", " <EOT> <PRE> </s><s>")
    assert [i for i in ids if i >= 32000 or i < 3] == [1, 32007, 32008, 32009]
    assert prompt_ids(infill_tokenizer, " <PRE> a <EOT>") == [1, *infill_tokenizer.encode(" <PRE> a <EOT>")]
    assert max(prompt_ids(infill_tokenizer, " <PRE> a <EOT>")) < 32000


def test_infill_without_infill_pieces_is_not_supported(small_tokenizer: Tokenizer) -> None:
    plain = Tokenizer(small_tokenizer.model_bytes.replace("▁<PRE>".encode(), "▁<QRE>".encode()))
    for call in (
        lambda: infill_ids(plain, "a", "b"),
        lambda: stop_ids(plain, "infill"),
        lambda: prompt_ids(plain, "<PRE> a <SUF>b <MID>", literal_infill=True),
    ):
        with pytest.raises(NotSupported, match="cannot infill") as e:
            call()
        assert "Instruct" in e.value.hint


def test_unknown_order_and_kind_are_refused(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="PSM"):
        infill_ids(small_tokenizer, "a", "b", order="PSM")
    with pytest.raises(PromptError, match="talk"):
        stop_ids(small_tokenizer, "talk")


def test_stop_ids_are_metas(small_tokenizer: Tokenizer) -> None:
    tok = small_tokenizer
    assert tok.infill is not None
    assert stop_ids(tok, "complete") == stop_ids(tok, "chat") == {tok.eos_id}
    assert stop_ids(tok, "infill") == {tok.infill.eot}


def test_70b_stops_at_step(step_tokenizer: Tokenizer) -> None:
    assert stop_ids(step_tokenizer, "chat") == {32015}
    assert stop_ids(step_tokenizer, "complete") == {2}


# --- infill prompts as strings ---


@pytest.mark.parametrize(("prefix", "suffix"), PARTS)
@pytest.mark.parametrize(
    ("form", "order"),
    [("<PRE> {0} <SUF>{1} <MID>", "psm"), ("<PRE> <SUF>{1} <MID> {0}", "spm")],
)
def test_literal_prompt_gives_the_ids_of_infill(
    small_tokenizer: Tokenizer, form: str, order: str, prefix: str, suffix: str
) -> None:
    text = form.format(prefix, suffix)
    expected = infill_ids(small_tokenizer, prefix, suffix, order=order)
    assert prompt_ids(small_tokenizer, text, literal_infill=True) == expected
    assert prompt_ids(small_tokenizer, text) == [1, *small_tokenizer.encode(text)]
    assert parse_literal_infill(text) == (prefix, suffix)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("<PRE>def f():<SUF>\nend<MID>", "psm"),
        ("<PRE> def f():<SUF>\nend<MID>", "psm"),
        ("<PRE>def f(): <SUF>\nend <MID>", "psm"),
        ("\n<PRE> def f(): <SUF>\nend <MID>\n", "psm"),
        ("<PRE><SUF>\nend<MID>def f():", "spm"),
        ("<PRE> <SUF>\nend<MID> def f():", "spm"),
        ("<PRE><SUF>\nend <MID>def f():", "spm"),
    ],
)
def test_literal_prompt_may_lack_the_spaces_of_the_tags(small_tokenizer: Tokenizer, text: str, order: str) -> None:
    expected = infill_ids(small_tokenizer, "def f():", "\nend", order=order)
    assert prompt_ids(small_tokenizer, text, literal_infill=True) == expected


def test_space_after_suf_is_the_suffixs_except_in_twinnys_form() -> None:
    assert parse_literal_infill("<PRE> a <SUF> + b <MID>") == ("a", " + b")
    assert parse_literal_infill("<PRE>a<SUF> + b<MID>") == ("a", " + b")
    assert parse_literal_infill("<PRE>return <SUF> + b<MID>") == ("return", " + b")
    assert parse_literal_infill("<PRE># x.py \na <SUF> + b <MID>") == ("# x.py \na", "+ b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<PRE>",
        "<PRE> a <SUF>b",
        "<PRE> a <MID>",
        "<PRE> a <MID>b <SUF>",
        "x <PRE> a <SUF>b <MID>",
        "<SUF><MID>",
    ],
)
def test_other_text_stays_plain(small_tokenizer: Tokenizer, text: str) -> None:
    assert parse_literal_infill(text) is None
    assert prompt_ids(small_tokenizer, text, literal_infill=True) == [1, *small_tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("<PRE> <PRE> a <SUF>b <MID>", "<PRE>"),
        ("<PRE> a <SUF> c <SUF>b <MID>", "<SUF>"),
        ("<PRE> a <SUF>b <MID> <MID>", "<MID>"),
        ("<PRE> a <SUF>b <MID> more", "after <MID>"),
    ],
)
def test_ambiguous_literal_prompt_is_refused(text: str, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        parse_literal_infill(text)


# --- dialogs ---


def test_known_inst_dialog(llama_tokenizer: Tokenizer) -> None:
    known = GOLDEN["inst_dialog"]
    assert chat_ids(llama_tokenizer, known["messages"]) == known["ids"]


def test_known_source_dialog(step_tokenizer: Tokenizer) -> None:
    known = GOLDEN["source_dialog"]
    assert chat_ids(step_tokenizer, known["messages"]) == known["ids"]


def test_inst_dialog_equals_the_string_form_turn_by_turn(small_tokenizer: Tokenizer) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=small_tokenizer.model_bytes)
    dialog = [
        system(" Be brief.\n"),
        user(" one "),
        assistant("\ntwo\n"),
        user("three"),
        assistant(""),
        user(" four\n"),
    ]
    turns = ["[INST] <<SYS>>\n Be brief.\n\n<</SYS>>\n\n one [/INST] two ", "[INST] three [/INST]  "]
    expected = [i for turn in turns for i in [1, *sp.encode(turn), 2]]
    assert chat_ids(small_tokenizer, dialog) == [*expected, 1, *sp.encode("[INST] four [/INST]")]


def test_source_dialog_of_many_turns_equals_the_string_form(step_tokenizer: Tokenizer) -> None:
    # No dummy prefix: the pieces joined are the string, and the tag splits it in the unguarded reading.
    sp = sentencepiece.SentencePieceProcessor(model_proto=step_tokenizer.model_bytes)
    dialog = [user(" q1 "), {**assistant("a1\n"), "destination": "user"}, user("q2\n\ncode:\n    x = 1")]
    text = (
        " Source: system<step> Source: user\n\n q1<step> Source: assistant\nDestination: user\n\n a1<step>"
        " Source: user\n\n q2\n\ncode:\n    x = 1<step> Source: assistant\nDestination: user\n\n "
    )
    ids = chat_ids(step_tokenizer, dialog)
    assert ids == [1, *sp.encode(text)]
    assert ids.count(32015) == 4
    assert ids[-1] == 29871


def test_source_dialog_with_dummy_prefix_has_it_in_every_part(llama_tokenizer: Tokenizer) -> None:
    tok = Tokenizer(with_infill_pieces(llama_tokenizer.model_bytes, step=True))
    sp = sentencepiece.SentencePieceProcessor(model_proto=llama_tokenizer.model_bytes)
    parts: list[Any] = [" Source: system", "\n\n s", 32015, " Source: user", "\n\n q", 32015]
    parts += [" Source: assistant\nDestination: user", "\n\n "]
    expected = [1]
    for part in parts:
        expected += [part] if isinstance(part, int) else sp.encode(part)
    assert chat_ids(tok, [system("s"), user("q")]) == expected
    assert 29871 in expected[:4]


@pytest.mark.parametrize("tag", DIALOG_TAGS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_special_tags_in_a_message_are_refused(small_tokenizer: Tokenizer, tag: str, place: int) -> None:
    dialog = [system("s"), user("u"), assistant("a"), user("v")]
    dialog[place] = {**dialog[place], "content": f"say{tag}this"}
    with pytest.raises(PromptError) as e:
        chat_ids(small_tokenizer, dialog)
    assert tag in str(e.value)
    assert f"message {place}" in str(e.value)


def test_infill_tags_in_a_message_are_text(infill_tokenizer: Tokenizer) -> None:
    ids = chat_ids(infill_tokenizer, [user("what does <PRE> or <EOT> or </s> mean?")])
    assert [i for i in ids if i >= 32000 or i < 3] == [1]


@pytest.mark.parametrize(
    ("dialog", "word"),
    [
        ([], "empty"),
        ([system("s")], "last message is from 'system'"),
        ([user("a"), assistant("b")], "last message is from 'assistant'"),
        ([assistant("a")], "'user' was expected"),
        ([user("a"), user("b")], "'assistant' was expected"),
        ([user("a"), assistant("b"), system("c"), user("d")], "message 2 is from 'system'"),
        ([system("s"), assistant("b"), user("c")], "message 1 is from 'assistant'"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "User", "content": "x"}], "'User'"),
        ([{"role": "user"}], "no text as its 'content'"),
        ([{"content": "x"}], "no text as its 'role'"),
        ([{"role": "user", "content": ["x"]}], "no text as its 'content'"),
        ([{"role": "user", "content": "x", "name": "y"}], "unknown key 'name'"),
        ([{"role": "user", "content": "x", "destination": "a<step>"}], "<step>"),
    ],
)
def test_malformed_dialog_is_a_clear_error(small_tokenizer: Tokenizer, dialog: Any, word: str) -> None:
    with pytest.raises(PromptError) as e:
        chat_ids(small_tokenizer, dialog)
    assert word in str(e.value)
    assert e.value.hint
