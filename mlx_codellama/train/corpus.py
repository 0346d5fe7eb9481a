"""A folder of source files as documents. Some files are held out whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_codellama import inputs
from mlx_codellama.errors import ConfigError

MAX_BYTES = 4 << 20  # per source file; larger files are data


@dataclass(frozen=True)
class Document:
    name: str  # path below the corpus folder, with forward slashes
    text: str
    weight: float = 1.0  # how often its characters are read, relative to weight 1


@dataclass(frozen=True)
class Corpus:
    """Documents for training, and held-out documents that no step sees."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """sha256 over names and texts of both parts, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.name}\0{document.text}\0".encode())
        return digest.hexdigest()


def read_corpus(
    folder: Path,
    *,
    suffix: str = ".py",
    exclude: tuple[str, ...] = (),
    lighter: tuple[str, ...] = (),
    hold_out_one_in: int = 50,
) -> Corpus:
    """Read every UTF-8 file below `folder` whose name ends in `suffix`.

    exclude          folder names whose contents are skipped
    lighter          folder names whose contents are read a third as often
    hold_out_one_in  the hash of its name decides if a file is held out, so new files do not change the choice. If that
                     would hold out none of a few files, the one with the smallest hash is held out
    Skips data tables: files over 4 MiB, with a line over 500 characters, or of fewer than 40 characters.
    Raises ConfigError if nothing is left to train on.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(folder.rglob(f"*{suffix}")):
        name = path.relative_to(folder).as_posix()
        folders = set(name.split("/")[:-1])
        if folders & set(exclude) or not path.is_file():
            continue
        try:
            text = inputs.read_bytes(path, MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) < 40 or max(map(len, text.split("\n"))) > 500:
            continue
        chosen = _hash(name) % hold_out_one_in == 0
        (held_out if chosen else train).append(Document(name, text, 1 / 3 if folders & set(lighter) else 1.0))
    if not held_out and len(train) > 1:
        held_out.append(min(train, key=lambda document: _hash(document.name)))
        train.remove(held_out[0])
    if not train or not held_out:
        raise ConfigError(
            f"{folder} holds {len(train)} files to train on and {len(held_out)} to hold out",
            hint=f"it needs at least one of each, of {suffix} files in UTF-8",
        )
    return Corpus(tuple(train), tuple(held_out))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def windows(
    documents: tuple[Document, ...], rng: np.random.Generator, *, shortest: int, longest: int
) -> Iterator[tuple[str, bool]]:
    """Endless random pieces of documents, each whole lines of `shortest` to `longest` characters (log-uniform).

    Yields (text, ends): `ends` is true if the piece reaches the end of its file. Files are drawn in proportion to their
    length, so all characters of the same weight are equally likely to be read.
    """
    lengths = np.array([len(d.text) * d.weight for d in documents], dtype=np.float64)
    share = lengths / lengths.sum()
    while True:
        text = documents[int(rng.choice(len(documents), p=share))].text
        wanted = int(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        start = int(rng.integers(-wanted // 2, max(1, len(text) - wanted // 2)))
        start = text.rfind("\n", 0, max(start, 0)) + 1
        end = start + wanted
        end = len(text) if end >= len(text) else max(text.rfind("\n", start, end) + 1, text.find("\n", end) + 1)
        if end - start > 1.5 * longest or not text[start:end].strip():
            continue
        yield text[start:end], end == len(text)
