"""The tokenizer against SentencePiece used directly, the way Meta's code uses it."""

from __future__ import annotations

import hashlib
import inspect
import io
import json.decoder
import random
import re
import struct
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import sentencepiece

from mlx_codellama.errors import PromptError, TokenizerError
from mlx_codellama.tokenizer import (
    INFILL_PIECES,
    InfillIds,
    StreamingDetokenizer,
    Tokenizer,
    train_tokenizer,
    with_infill_pieces,
    without_dummy_prefix,
)

TAGGED = [
    "a <PRE> b <SUF>c <MID>d <EOT>",
    "<PRE>",
    " <EOT><EOT><EOT> x",
    "template <E> List <M> f(); // <SU <SUF <PR",
    "x<step>y <step> <step><step>",
    "<s>[INST] hi </s><unk><pad>",
    "▁<PRE> ▁<MID>",
    "\n <MID>\n\t<SUF>",
]
CODE = "def f(x):\r\n\tif x == 12345:\r\n        return 'naïve ☺ 🦙'\r\n\r\n"


def test_llama_file_has_the_conventions_the_code_relies_on(llama_tokenizer: Tokenizer) -> None:
    tok = llama_tokenizer
    assert (tok.vocab_size, tok.unk_id, tok.bos_id, tok.eos_id) == (32000, 0, 1, 2)
    assert (tok.infill, tok.step_id, tok.add_dummy_prefix) == (None, None, True)
    assert tok.id_of("<0x0A>") == 13
    assert tok.encode("hello", bos=True, eos=True) == [1, 22172, 2]


def test_infill_ids_are_looked_up_by_piece(
    small_tokenizer: Tokenizer, infill_tokenizer: Tokenizer, step_tokenizer: Tokenizer
) -> None:
    assert infill_tokenizer.infill == InfillIds(pre=32007, suf=32008, mid=32009, eot=32010)
    assert [infill_tokenizer.piece(i) for i in range(32000, 32016)] == list(INFILL_PIECES)
    assert step_tokenizer.step_id == 32015
    assert infill_tokenizer.step_id is None
    first = 640 - 16  # nothing of 32000 is built in
    assert small_tokenizer.infill == InfillIds(first + 7, first + 8, first + 9, first + 10)


def test_three_of_four_infill_pieces_are_not_infilling(small_tokenizer: Tokenizer) -> None:
    broken = small_tokenizer.model_bytes.replace("▁<MID>".encode(), "▁<MUD>".encode())
    assert Tokenizer(broken).infill is None


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("dummy", [False, True])
def test_tags_in_text_are_encoded_as_the_base_vocabulary_does(
    llama_tokenizer: Tokenizer, step: bool, dummy: bool
) -> None:
    base = llama_tokenizer.model_bytes if dummy else without_dummy_prefix(llama_tokenizer.model_bytes)
    reference = sentencepiece.SentencePieceProcessor(model_proto=base)
    bare = sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(base))
    tok, plain = Tokenizer(with_infill_pieces(base, step=step)), Tokenizer(base)
    for text in TAGGED:
        assert tok.encode(text) == plain.encode(text) == reference.encode(text), text
        assert tok.encode_infilling(text) == plain.encode_infilling(text) == bare.encode(text), text
        assert min(tok.encode(text)) > 2, text
        assert max(tok.encode(text) + tok.encode_infilling(text)) < 32000, text


def test_guarding_holds_whatever_the_scores_of_the_tags_are(llama_tokenizer: Tokenizer) -> None:
    # The official scores are unknown. Above all merges they would break up words near a tag, if they took part at all.
    base = llama_tokenizer.model_bytes
    low = with_infill_pieces(base)
    added = re.sub(
        rb"\x15....\x18\x01", b"\x15" + struct.pack("<f", 7.0) + b"\x18\x01", low[len(base) :], flags=re.DOTALL
    )
    high = Tokenizer(base + added)
    assert high.encode(" <MIDDLE>", specials=True) != llama_tokenizer.encode(" <MIDDLE>")
    for text in [*TAGGED, "a <MIDDLE> <PREFIX> <SUFFIX> <Map> <Entry <EOTX>"]:
        assert high.encode(text) == llama_tokenizer.encode(text), text
        assert high.encode_infilling(text) == llama_tokenizer.encode_infilling(text), text


def test_added_pieces_score_below_all_merges(small_tokenizer: Tokenizer) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=small_tokenizer.model_bytes)
    scores = [sp.get_score(i) for i in range(640)]
    assert max(scores[-16:]) < min(scores[:-16])
    assert scores[-16:] == sorted(set(scores[-16:]), reverse=True)


def test_guarding_is_needed_because_the_file_itself_matches_tags(
    infill_tokenizer: Tokenizer, step_tokenizer: Tokenizer
) -> None:
    assert 32007 in infill_tokenizer.encode(TAGGED[0], specials=True)
    assert 32005 in infill_tokenizer.encode(TAGGED[3], specials=True)
    assert step_tokenizer.encode(TAGGED[4], specials=True).count(32015) == 4


def test_user_defined_tags_of_a_derivative_are_guarded_too() -> None:
    # 70B's slot name stands for any user-defined tag; here it becomes `<|im|>`, of the same length.
    base = train_small(infill=False)
    derived = Tokenizer(with_infill_pieces(base, step=True).replace(b"<step>", b"<|im|>"))
    tag = derived.id_of("<|im|>")
    assert tag in derived.encode("a<|im|>b", specials=True)
    assert tag not in derived.encode("a<|im|>b")
    assert derived.decode(derived.encode("a<|im|>b")) == "a<|im|>b"


def train_small(*, infill: bool, seed: int = 0, max_lines: int = 0) -> bytes:
    lines = [inspect.getsource(json.decoder), inspect.getsource(textwrap)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.model"
        train_tokenizer(lines, path, vocab_size=420 + 16 * infill, infill=infill, seed=seed, max_lines=max_lines)
        return path.read_bytes()


def test_suffix_equals_metas_smiley_trick(infill_tokenizer: Tokenizer) -> None:
    meta = sentencepiece.SentencePieceProcessor(model_proto=infill_tokenizer.model_bytes)
    for text in ["\n    return result\n", "", " x", "x", "  two", "\t", "\r\nif", "🦙", "☺", "\x00", CODE]:
        assert infill_tokenizer.encode_infilling(text) == meta.encode("☺" + text)[2:], text


def test_suffix_keeps_its_first_token_without_dummy_prefix(
    infill_tokenizer: Tokenizer, step_tokenizer: Tokenizer
) -> None:
    # There Meta's [2:] would cut the newline: `☺` alone is one token.
    text = "\n    return result"
    assert step_tokenizer.encode_infilling(text) == infill_tokenizer.encode_infilling(text) == [13, 1678, 736, 1121]
    assert step_tokenizer.encode(text) == step_tokenizer.encode_infilling(text)
    assert infill_tokenizer.encode(text) == [29871, 13, 1678, 736, 1121]


def test_decode_infilling_keeps_leading_spaces_where_decode_drops_one(llama_tokenizer: Tokenizer) -> None:
    meta = sentencepiece.SentencePieceProcessor(model_proto=llama_tokenizer.model_bytes)
    for text in [" leading", "    indented", "x", "", " ", "\n  y", CODE]:
        ids = llama_tokenizer.encode_infilling(text)
        assert llama_tokenizer.decode_infilling(ids) == text
        assert llama_tokenizer.decode_infilling(ids) == meta.decode([31171, *ids])[1:]
        assert llama_tokenizer.decode(llama_tokenizer.encode(text)) == text
    assert llama_tokenizer.decode(llama_tokenizer.encode_infilling(" leading")) == "leading"


def test_both_dummy_settings_round_trip(small_tokenizer: Tokenizer) -> None:
    bare = Tokenizer(without_dummy_prefix(small_tokenizer.model_bytes))
    assert not bare.add_dummy_prefix
    for tok in (small_tokenizer, bare):
        for text in [CODE, " a", "", "   ", "\n"]:
            assert tok.decode(tok.encode(text)) == text
            assert tok.decode_infilling(tok.encode_infilling(text)) == text
    assert bare.encode("def") == small_tokenizer.encode_infilling("def") != small_tokenizer.encode("def")


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b\x00", "🦙🏽‍💻 e\u0301 \u2028 \ufeff", "\r\r\n\n\r", "\U0010ffff\uffff"]
)
def test_odd_characters_survive(small_tokenizer: Tokenizer, text: str) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text
    assert small_tokenizer.decode_infilling(small_tokenizer.encode_infilling(text)) == text


def test_lone_surrogate_is_a_clear_error(small_tokenizer: Tokenizer) -> None:
    for encode in (small_tokenizer.encode, small_tokenizer.encode_infilling):
        with pytest.raises(PromptError, match=r"U\+DC80\) at character 3") as e:
            encode("abc\udc80")
        assert "UTF-8" in e.value.hint


def test_long_text_is_encoded_in_reasonable_time(small_tokenizer: Tokenizer) -> None:
    for text in ["x" * 400_000, " " * 400_000, CODE * 6000]:
        start = time.perf_counter()
        ids = small_tokenizer.encode(text)
        assert time.perf_counter() - start < 10  # quadratic work would take minutes
        assert small_tokenizer.decode(ids) == text


def test_ids_outside_the_vocabulary_are_refused(small_tokenizer: Tokenizer) -> None:
    for use in (small_tokenizer.decode, small_tokenizer.decode_infilling):
        for bad in (-1, 640):
            with pytest.raises(TokenizerError, match=str(bad)):
                use([5, bad])
    with pytest.raises(TokenizerError):
        small_tokenizer.piece(640)
    with pytest.raises(TokenizerError):
        small_tokenizer.detokenizer().add(640)


# --- streaming ---


def streamed(tok: Tokenizer, ids: list[int]) -> list[str]:
    stream = tok.detokenizer()
    parts = [stream.add(i) for i in ids]
    parts.append(stream.finish())
    assert stream.text == "".join(parts)
    return parts


def byte_ids(tok: Tokenizer, data: bytes) -> list[int]:
    ids = [tok.id_of(f"<0x{b:02X}>") for b in data]
    assert None not in ids
    return [i for i in ids if i is not None]


def test_stream_shows_a_character_only_when_it_is_complete(small_tokenizer: Tokenizer) -> None:
    assert streamed(small_tokenizer, byte_ids(small_tokenizer, "é🦙".encode())) == ["", "é", "", "", "", "🦙", ""]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\xe2\x98",
        b"\xe2\x98A",
        b"\xf0\x9f\xa6\xf0\x9f\xa6\x99",
        b"\xc0\x80",
        b"\xed\xa0\x80\xed\xb0\x80",
        b"\xf4\x90\x80\x80",
        b"\x80\xe2\x82\xac\xe2",
    ],
)
def test_stream_shows_broken_bytes_as_decode_does(small_tokenizer: Tokenizer, data: bytes) -> None:
    tok = small_tokenizer
    word = tok.encode(" def")
    for ids in (byte_ids(tok, data), byte_ids(tok, data) + word, [tok.bos_id, *byte_ids(tok, data), tok.eos_id]):
        assert "".join(streamed(tok, ids)) == tok.decode_infilling(ids)
    assert "\ufffd" in tok.decode_infilling(byte_ids(tok, data))


def test_a_control_piece_ends_a_broken_character(small_tokenizer: Tokenizer) -> None:
    tok = small_tokenizer
    first, second = byte_ids(tok, "é".encode())
    ids = [first, tok.eos_id, second]
    assert streamed(tok, ids) == ["", "\ufffd", "\ufffd", ""]
    assert tok.decode_infilling(ids) == "\ufffd\ufffd"


def test_stream_keeps_leading_spaces(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode_infilling("    return x")
    stream = StreamingDetokenizer(small_tokenizer)
    assert stream.add(ids[0])[0] == " "
    assert stream.text + "".join(stream.add(i) for i in ids[1:]) == "    return x"


# --- files ---


def test_load_takes_a_folder_or_the_file(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(small_tokenizer.model_bytes)
    for path in (tmp_path, str(tmp_path), file):
        assert Tokenizer.load(path).encode(CODE) == small_tokenizer.encode(CODE)


def test_folder_without_tokenizer_model_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model") as e:
        Tokenizer.load(tmp_path)
    assert "copy tokenizer.model" in e.value.hint
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError) as e:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json is not enough" in e.value.hint
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["empty", "text", "half", "pieces only", "tail", "flipped"])
def test_damaged_file_is_a_tokenizer_error(small_tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    whole = small_tokenizer.model_bytes
    last = small_tokenizer._layout.pieces[-17]  # the trainer's record follows the learned pieces
    (tmp_path / "tokenizer.model").write_bytes(
        {
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "half": whole[: len(whole) // 2],
            "pieces only": whole[: last.end],
            "tail": whole[:-3],
            "flipped": whole[:40] + bytes(b ^ 0xFF for b in whole[40:60]) + whole[60:],
        }[damage]
    )
    with pytest.raises(TokenizerError) as e:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert e.value.hint


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    # A unigram model with byte fallback opens in SentencePiece without complaint and would give other ids.
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(textwrap).split("\n")),
        model_writer=out,
        model_type="unigram",
        vocab_size=420,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match="BPE"):
        Tokenizer(out.getvalue())
    with pytest.raises(TokenizerError, match="byte fallback"):
        Tokenizer(small_bpe_without_bytes())


def small_bpe_without_bytes() -> bytes:
    out = io.BytesIO()
    lines = inspect.getsource(textwrap).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=120, num_threads=1, minloglevel=2
    )
    return out.getvalue()


def test_random_damage_loads_or_raises_tokenizer_error(small_tokenizer: Tokenizer) -> None:
    rng, refused = random.Random(5), 0
    for _ in range(150):
        data = bytearray(small_tokenizer.model_bytes)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            Tokenizer(bytes(data)).encode(CODE)
        except TokenizerError:
            refused += 1
    assert refused > 30  # truncations alone are about 45


# --- training ---


def test_trained_tokenizer_follows_code_llamas_conventions(small_tokenizer: Tokenizer) -> None:
    tok = small_tokenizer
    assert (tok.vocab_size, tok.unk_id, tok.bos_id, tok.eos_id) == (640, 0, 1, 2)
    assert tok.add_dummy_prefix
    assert [tok.id_of("<0x00>"), tok.id_of("<0xFF>")] == [3, 258]
    pieces = [tok.piece(i) for i in tok.encode_infilling("\n    return 1234\n")]
    assert pieces[:2] == ["<0x0A>", "▁▁▁"]
    assert pieces[-6:] == ["▁", "1", "2", "3", "4", "<0x0A>"]
    assert all(tok.id_of("▁" * n) for n in range(1, 17))
    learned = [tok.piece(i) for i in range(259 + 15, 640 - 16)]
    assert not any("\n" in p or "▁▁" in p for p in learned)
    assert any(len(p) > 5 for p in learned)


def test_training_gives_the_same_bytes_again_and_other_bytes_for_another_sample() -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(train_small(infill=True, seed=seed, max_lines=150)).hexdigest()

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_training_on_too_little_text_is_a_clear_error(tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    with pytest.raises(TokenizerError) as e:
        train_tokenizer(["hello world"], out, vocab_size=5000)
    assert "smaller vocab_size" in e.value.hint
    with pytest.raises(TokenizerError):
        train_tokenizer(["hello world"], out, vocab_size=100)
    with pytest.raises(TokenizerError):
        train_tokenizer([], out, vocab_size=300)
    assert not out.exists()


def test_infill_pieces_are_added_once(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="already"):
        with_infill_pieces(small_tokenizer.model_bytes)
