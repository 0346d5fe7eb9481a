"""Text to token ids and back, with SentencePiece: Code Llama's tokenizer is a SentencePiece BPE model.

We make three processors from one file:

- *unchanged*: for decoding and `encode(specials=True)`, which treats text as Meta's own code does;
- *guarded*: text cannot match the infill pieces, `<step>` and other tags (all ids stay the same). In the 7B and 13B
  files the sentinels seem to be ordinary merges, so ` <PRE>` in a user's file would otherwise become a sentinel;
- *guarded, without the dummy space* before the text: for suffixes and middles of an infill.

SentencePiece writes a space as `▁`, so a literal `▁` (U+2581) in text is decoded as a space, as in Meta's code.
"""

from __future__ import annotations

import io
import math
import random
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from mlx_codellama import inputs
from mlx_codellama.errors import PromptError, TokenizerError
from mlx_codellama.staging import write_file

MAX_BYTES = 16 << 20  # limit for a tokenizer.model; Llama 2's has 0.5 MB
SPACE = "▁"
STEP_PIECE = "<step>"
INFILL_PIECES = (
    *(SPACE + s for s in ("<SU", "<SUF", "<PRE", "<M", "<MID", "<E", "<EOT", "<PRE>", "<SUF>", "<MID>")),
    *(SPACE + "<EOT>" * n for n in range(1, 7)),
)
"""The 16 pieces after the 32,000 of Llama 2, in id order: 32000 … 32015."""

# Piece types and field numbers of SentencePiece's model file (a protocol buffer).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2


class InfillIds(NamedTuple):
    """Ids of the four infill sentinels: three precede prefix, suffix and middle; `eot` ends the middle."""

    pre: int
    suf: int
    mid: int
    eot: int


class Tokenizer:
    """A SentencePiece BPE model with Code Llama's conventions. Immutable, safe to share between threads."""

    def __init__(self, model: bytes, *, source: str = "tokenizer.model") -> None:
        """model: the bytes of a `tokenizer.model`; `source` names it in errors. Raises TokenizerError."""
        self._source = source
        self._layout = _read_layout(model, source)
        self._model = model
        self._full = self._processor(model)
        pieces = self._layout.pieces
        if self._full.get_piece_size() != len(pieces):
            raise TokenizerError(f"{source} is damaged: its piece table cannot be read", hint=_DAMAGED_HINT)
        self._ids = {p.text: i for i, p in enumerate(pieces)}
        self.vocab_size = len(pieces)
        self.bos_id = int(self._full.bos_id())
        self.eos_id = int(self._full.eos_id())
        self.unk_id = int(self._full.unk_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(f"{source} has no <s> or no </s> piece", hint="Code Llama's tokenizers have both")
        self.add_dummy_prefix = self._layout.add_dummy_prefix
        """Whether encode() adds a leading space (70B-Instruct's file: no, all others: yes)."""
        sentinels = [self.id_of(f"{SPACE}<{name}>") for name in ("PRE", "SUF", "MID", "EOT")]
        self.infill = None if None in sentinels else InfillIds(*(i for i in sentinels if i is not None))
        """Sentinel ids, or None on models that cannot infill. Always looked up by piece."""
        self.step_id = self.id_of(STEP_PIECE)
        """Id of `<step>`, or None. Only the 70B dialog format has it."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `path`, a `tokenizer.model` file or a folder that holds one. Raises TokenizerError."""
        file = Path(path)
        if file.is_dir():
            folder, file = file, file / "tokenizer.model"
            if not file.exists():
                raise TokenizerError(f"{folder} has no tokenizer.model", hint=_missing_hint(folder))
        try:
            model = inputs.read_bytes(file, MAX_BYTES)
        except FileNotFoundError:
            raise TokenizerError(f"{file} does not exist", hint="pass a model folder or a tokenizer.model") from None
        except OSError as e:
            raise TokenizerError(f"{file} cannot be read: {e.strerror}") from None
        return cls(model, source=str(file))

    def to_dict(self) -> dict[str, Any]:
        """What the file says of its pieces, as plain data."""
        return {
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "add_dummy_prefix": self.add_dummy_prefix,
            "infill_ids": self.infill._asdict() if self.infill else None,
            "step_id": self.step_id,
        }

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, specials: bool = False) -> list[int]:
        """Ids of `text`, with a leading dummy space if the model uses one; "" gives no ids.

        specials=False: tags inside the text (` <PRE>`, `<step>` …) are split into ordinary pieces.
        specials=True: SentencePiece's result with the unchanged file, like Meta's encode. Raises PromptError.
        """
        ids = self._encode(self._full if specials else self._guarded, text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_infilling(self, text: str) -> list[int]:
        """Ids of `text` as a continuation, without a dummy space. Same ids as Meta's `encode("☺" + s)[2:]`."""
        return self._encode(self._guarded_bare, text)

    def least_tokens(self, text: str) -> int:
        """A lower bound of len(encode(text)), computed from the length of the longest piece without encoding. 0 for a
        tokenizer that drops characters first; Code Llama's do not."""
        return -(-len(text) // self._layout.longest) if self._layout.longest else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control pieces give no text; the leading dummy space is dropped. Raises TokenizerError."""
        return str(self._full.decode(self._checked(ids)))

    def decode_infilling(self, ids: Sequence[int]) -> str:
        """Text of `ids` as a continuation: leading spaces are kept. Raises TokenizerError."""
        return str(self._full_bare.decode(self._checked(ids)))

    def id_of(self, piece: str) -> int | None:
        """Id of exactly this piece (`▁` for a space), or None."""
        return self._ids.get(piece)

    def piece(self, id: int) -> str:
        """The piece with this id, as in the file (`▁def`, `<0x0A>`). Raises TokenizerError."""
        return self._layout.pieces[self._checked([id])[0]].text

    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming decoder for ids that continue a text."""
        return StreamingDetokenizer(self)

    @property
    def model_bytes(self) -> bytes:
        """The SentencePiece file this tokenizer was made from."""
        return self._model

    # The processors are made at first use: each takes about 10 ms for 32,000 pieces.

    @cached_property
    def _guarded(self) -> Any:
        return self._processor(self._guarded_model) if self._layout.guarded else self._full

    @cached_property
    def _guarded_bare(self) -> Any:
        if not self.add_dummy_prefix:
            return self._guarded
        return self._processor(without_dummy_prefix(self._guarded_model))

    @cached_property
    def _full_bare(self) -> Any:
        return self._processor(without_dummy_prefix(self._model)) if self.add_dummy_prefix else self._full

    @cached_property
    def _guarded_model(self) -> bytes:
        """The model with every tag piece changed into a control piece, which text cannot match."""
        out, at = [], 0
        for i in self._layout.guarded:
            p = self._layout.pieces[i]
            out += [self._model[at : p.start], _piece_entry(p.text, p.score, _CONTROL)]
            at = p.end
        return b"".join([*out, self._model[at:]])

    def _processor(self, model: bytes) -> Any:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            message = f"{self._source} is not a SentencePiece model or is damaged"
            raise TokenizerError(message, hint=_DAMAGED_HINT) from None

    def _encode(self, processor: Any, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise PromptError(
                f"the text is not Unicode: it has a lone surrogate (U+{ord(text[e.start]):04X}) at character {e.start}",
                hint="read files as UTF-8 with errors='strict' or 'replace', not 'surrogateescape'",
            ) from None
        return [int(i) for i in processor.encode(text)]

    def _checked(self, ids: Sequence[int]) -> list[int]:
        out = [int(i) for i in ids]
        bad = next((i for i in out if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise TokenizerError(
                f"token id {bad} is outside this tokenizer's {self.vocab_size} pieces",
                hint="the model and the tokenizer.model may belong to different variants",
            )
        return out


class StreamingDetokenizer:
    """Text of ids that arrive one at a time. The parts, including finish(), concatenate to decode_infilling(ids).

    A character whose UTF-8 bytes arrive as several byte pieces appears when it is complete. Bytes that cannot become a
    character appear as one U+FFFD each, as in decode().
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def add(self, id: int) -> str:
        """The new complete text after this id; "" while inside a character. Raises TokenizerError for an unknown id."""
        piece = self._tokenizer.piece(id)
        if self._tokenizer._layout.pieces[int(id)].type == _BYTE:
            shown, self._pending = _complete_characters(self._pending + bytes([int(piece[1:-1], 16)]), final=False)
        else:
            shown = self._finish_bytes() + self._tokenizer.decode_infilling([id])
        return self._show(shown)

    def finish(self) -> str:
        """The rest: U+FFFD for each byte of an incomplete character."""
        return self._show(self._finish_bytes())

    def _finish_bytes(self) -> str:
        shown, self._pending = _complete_characters(self._pending, final=True)
        return shown

    def _show(self, new: str) -> str:
        if new:
            self._parts.append(new)
        return new


def _complete_characters(data: bytes, *, final: bool) -> tuple[str, bytes]:
    """Decode UTF-8 as SentencePiece does: each byte that cannot start or continue a character is one U+FFFD.

    → (text, rest): rest is the beginning of a character that later bytes may complete; empty if `final`.
    """
    out: list[str] = []
    while data:
        try:
            out.append(data.decode())
            return "".join(out), b""
        except UnicodeDecodeError as e:
            out.append(data[: e.start].decode())
            data = data[e.start :]
            if not final and e.reason == "unexpected end of data":
                return "".join(out), data
            out.append("\ufffd")
            data = data[1:]
    return "".join(out), b""


def train_tokenizer(
    texts: Iterable[str],
    out: str | Path | None,
    *,
    vocab_size: int,
    infill: bool = True,
    character_coverage: float = 0.9999,
    max_lines: int = 0,
    seed: int = 0,
) -> Tokenizer:
    """Train a SentencePiece BPE tokenizer with Code Llama's conventions; write it to the file `out` if given.

    texts       whole documents; we cut them at newlines, because a newline is always the byte piece <0x0A>
    vocab_size  number of pieces: unk, bos, eos, 256 bytes, 15 runs of spaces, learned merges and characters, and the
                16 infill pieces if `infill`
    max_lines   train on a random sample of this many lines (0: all), drawn with `seed`

    The same texts and arguments give the same bytes. Raises TokenizerError if the texts are too few for vocab_size.
    """
    trained = io.BytesIO()
    lines = _lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample(lines, max_lines, seed) if max_lines else lines,
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size - len(_SPACE_RUNS) - len(INFILL_PIECES) * infill,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # not for lines inside a file; the finished model gets it below
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            character_coverage=character_coverage,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise TokenizerError(
            f"SentencePiece could not learn {vocab_size} pieces from these texts: {e}",
            hint="give more text or a smaller vocab_size (at least 290 plus the number of different characters)",
        ) from None
    model = _with_dummy_prefix(_with_space_runs(trained.getvalue()), True)
    tokenizer = Tokenizer(with_infill_pieces(model) if infill else model, source=str(out or ""))
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"the texts hold only {tokenizer.vocab_size} different pieces, not {vocab_size}",
            hint="give more text or a smaller vocab_size",
        )
    if out is not None:
        write_file(out, tokenizer.model_bytes)
    return tokenizer


def with_infill_pieces(model: bytes, *, step: bool = False) -> bytes:
    """Append the 16 extra pieces to a SentencePiece model, with scores below all merges. Raises TokenizerError.

    step: the last one is `<step>`, as in the 70B models, instead of the sixfold `▁<EOT>…`.
    """
    pieces = _read_layout(model, "the SentencePiece model").pieces
    present = {p.text for p in pieces}.intersection([*INFILL_PIECES, STEP_PIECE])
    if present:
        raise TokenizerError(f"the model already has the piece {sorted(present)[0]}")
    lowest = min(p.score for p in pieces)
    gap = max(1.0, abs(lowest) * 1e-6)  # far above float32 rounding at that size
    names = [*INFILL_PIECES[:-1], STEP_PIECE] if step else INFILL_PIECES
    return model + b"".join(
        _piece_entry(name, lowest - gap * (i + 1), _USER_DEFINED if name == STEP_PIECE else _NORMAL)
        for i, name in enumerate(names)
    )


def without_dummy_prefix(model: bytes) -> bytes:
    """The same SentencePiece model, but encoding adds no leading space and decoding drops none."""
    return _with_dummy_prefix(model, False)


# --- SentencePiece's model file: find the pieces, add one, flip one flag. ---


class _Piece(NamedTuple):
    text: str
    score: float
    type: int
    start: int  # start of the whole entry in the file, in bytes
    end: int


class _Layout(NamedTuple):
    pieces: list[_Piece]
    guarded: list[int]  # ids that text must not match
    add_dummy_prefix: bool
    longest: int  # characters of the longest piece; 0 if characters of a text may be dropped before it is split


_DAMAGED_HINT = "copy tokenizer.model again from the original model folder (Llama 2's file has 499,723 bytes)"


def _missing_hint(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return (
            "tokenizer.json is not enough: other tokenizers split Code Llama's infill prompts differently; "
            "copy tokenizer.model from the original repository of the model into the folder"
        )
    return "copy tokenizer.model from the original repository of the model into the folder"


_SPACE_RUNS = tuple(SPACE * n for n in range(2, 17))
_SPACE_SCORE = -1e9  # below every merge, so an indent of four before a word is `▁▁▁` `▁word`, as in Llama's tokenizer


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines to train on. Runs of spaces become one space (runs are added later); drops NUL and lone surrogates."""
    for text in texts:
        clean = text.replace("\x00", "").encode("utf-8", "ignore").decode()
        for line in clean.split("\n"):
            line = re.sub(f"[ {SPACE}]+", " ", line)
            for i in range(0, len(line), 1000):  # SentencePiece skips lines of more than 4,192 bytes
                yield line[i : i + 1000]


def _sample(lines: Iterable[str], n: int, seed: int) -> Iterator[str]:
    """A uniform sample of n lines in one pass (reservoir sampling)."""
    rng, kept = random.Random(seed), []
    for seen, line in enumerate(lines):
        if seen < n:
            kept.append(line)
        elif (at := rng.randrange(seen + 1)) < n:
            kept[at] = line
    return iter(kept)


def _with_space_runs(model: bytes) -> bytes:
    """Insert the pieces for 2 … 16 spaces after the byte pieces; score whitespace as Llama's tokenizer does."""
    pieces = _read_layout(model, "the trained model").pieces
    at = 1 + max(i for i, p in enumerate(pieces) if p.type == _BYTE)
    entries = [_piece_entry(p.text, _SPACE_SCORE if p.text == SPACE else p.score, p.type) for p in pieces]
    entries[at:at] = [_piece_entry(run, _SPACE_SCORE, _NORMAL) for run in _SPACE_RUNS]
    return b"".join([*entries, model[pieces[-1].end :]])


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _piece_entry(text: str, score: float, type: int) -> bytes:
    body = _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(type)
    return _message(_PIECES, body)


def _with_dummy_prefix(model: bytes, on: bool) -> bytes:
    # If a singular message occurs twice, they are merged and the later value wins (protocol buffer encoding rules).
    return model + _message(_NORMALIZER, b"\x18" + _varint(int(on)))


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int | bytes, int, int]]:
    """(field number, value, start, end) of each entry of a message. Raises ValueError or IndexError on damage."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError

    value: int | bytes
    while at < end:
        start = at
        key = varint()
        wire = key & 7
        if wire == 0:
            value = varint()
        else:
            n = {1: 8, 5: 4}.get(wire) if wire != 2 else varint()
            if n is None or at + n > end:
                raise ValueError
            value = data[at : at + n]
            at += n
        yield key >> 3, value, start, at


def _read_layout(model: bytes, source: str) -> _Layout:
    """Find pieces and flags. Raises TokenizerError unless this is a whole BPE model with byte fallback."""
    pieces: list[_Piece] = []
    dummy, drops, kind = True, True, 0
    rewritten = False  # text is rewritten by a table of characters
    try:
        for field, value, start, end in _fields(model, 0, len(model)):
            if field == _PIECES and isinstance(value, bytes):
                entry = {f: v for f, v, _, _ in _fields(value, 0, len(value))}
                text, score, type = entry.get(1, b""), entry.get(2, bytes(4)), entry.get(3, _NORMAL)
                if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(type, int)):
                    raise ValueError
                pieces.append(_Piece(text.decode(), struct.unpack("<f", score)[0], type, start, end))
            elif field == _TRAINER and isinstance(value, bytes):
                kind = next((int(v) for f, v, _, _ in _fields(value, 0, len(value)) if f == 3), kind)
            elif field == _NORMALIZER and isinstance(value, bytes):
                for f, v, _, _ in _fields(value, 0, len(value)):
                    if f == 2:
                        rewritten = bool(v)
                    elif f == 3:
                        dummy = bool(v)
                    elif f == 4:  # remove_extra_whitespaces
                        drops = bool(v)
    except (ValueError, IndexError, struct.error):
        raise TokenizerError(f"{source} is not a SentencePiece model or is damaged", hint=_DAMAGED_HINT) from None
    if not pieces or kind != _BPE or not all(math.isfinite(p.score) for p in pieces):
        raise TokenizerError(f"{source} is not a SentencePiece BPE model or is cut short", hint=_DAMAGED_HINT)
    if sum(p.type == _BYTE for p in pieces) != 256:
        raise TokenizerError(f"{source} has no byte fallback", hint="Code Llama's tokenizers have 256 byte pieces")
    tags = {*INFILL_PIECES, STEP_PIECE, "<s>", "</s>"}
    guarded = [
        i
        for i, p in enumerate(pieces)
        if p.type in (_NORMAL, _USER_DEFINED, _UNUSED)
        and (p.text in tags or (p.type == _USER_DEFINED and p.text.lstrip(SPACE)[:1] in ("<", "[")))
    ]
    matched = (len(p.text) for i, p in enumerate(pieces) if i not in guarded)
    longest = 0 if drops or rewritten else max(matched)
    return _Layout(pieces, guarded, dummy, longest)
