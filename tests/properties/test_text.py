"""Properties of tokenizer and prompts that hold for any text and any ids."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_codellama.hole import hole_marked
from mlx_codellama.prompts import infill_ids, parse_literal_infill
from mlx_codellama.tokenizer import Tokenizer, without_dummy_prefix

# U+2581 stands for a space inside SentencePiece, so it is the one character that does not come back.
TEXT = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=60)
SPACED = st.text(st.sampled_from(" \t\r\n\x00aé🦙<>PREMIDSUFstep/1[]"), max_size=60)
ANY = st.one_of(TEXT, SPACED)
IDS = st.lists(st.one_of(st.integers(0, 639), st.integers(3 + 0x80, 258)), max_size=40)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=ANY)
def test_every_text_round_trips(small_tokenizer: Tokenizer, text: str) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text
    assert small_tokenizer.decode_infilling(small_tokenizer.encode_infilling(text)) == text


@quick
@given(text=ANY)
def test_text_never_becomes_a_control_id(small_tokenizer: Tokenizer, text: str) -> None:
    ids = small_tokenizer.encode(text) + small_tokenizer.encode_infilling(text)
    assert all(2 < i < 640 - 16 for i in ids)


@quick
@given(ids=IDS)
def test_streamed_pieces_join_to_decode_infilling(small_tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = small_tokenizer.detokenizer()
    shown = ""
    for i in ids:
        shown += stream.add(i)
        assert small_tokenizer.decode_infilling(ids).startswith(shown)  # nothing is ever taken back
    assert shown + stream.finish() == small_tokenizer.decode_infilling(ids)


@quick
@given(prefix=ANY, suffix=ANY)
def test_infill_ids_give_prefix_and_suffix_back(small_tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    tok, sentinels = small_tokenizer, small_tokenizer.infill
    assert sentinels is not None
    psm = infill_ids(tok, prefix, suffix)
    at = psm.index(sentinels.suf)
    assert (tok.decode(psm[2:at]), tok.decode_infilling(psm[at + 1 : -1])) == (prefix, suffix)
    spm = infill_ids(tok, prefix, suffix, order="spm")
    at = spm.index(sentinels.mid)
    assert (tok.decode(spm[at + 1 :]), tok.decode_infilling(spm[3:at])) == (prefix, suffix)
    assert sorted(psm) == sorted(spm)


@quick
@given(text=ANY)
def test_suffix_does_not_depend_on_the_dummy_setting(small_tokenizer: Tokenizer, text: str) -> None:
    bare = Tokenizer(without_dummy_prefix(small_tokenizer.model_bytes))
    assert bare.encode(text) == bare.encode_infilling(text) == small_tokenizer.encode_infilling(text)


@quick
@given(prefix=ANY, suffix=ANY)
def test_strings_with_tags_and_marker_split_back(prefix: str, suffix: str) -> None:
    if not any(tag in prefix + suffix for tag in ("<PRE>", "<SUF>", "<MID>")):
        assert parse_literal_infill(f"<PRE> {prefix} <SUF>{suffix} <MID>") == (prefix, suffix)
        assert parse_literal_infill(f"<PRE> <SUF>{suffix} <MID> {prefix}") == (prefix, suffix)
    if "<FILL_ME>" not in prefix + suffix:
        hole = hole_marked(f"{prefix}<FILL_ME>{suffix}", "text")
        assert (hole.before, hole.after) == (prefix, suffix)
