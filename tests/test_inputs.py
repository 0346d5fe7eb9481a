"""Reading what others wrote: regular files only, never more than a limit, and JSON that says one thing."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles.checkpoints import random_weights, tiny_args, write_hf, write_meta, write_npz

from mlx_codellama import convert, inputs
from mlx_codellama.config import load_config
from mlx_codellama.errors import CheckpointError, CodeLlamaError
from mlx_codellama.source_file import read_text
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.train.corpus import read_corpus
from mlx_codellama.weights import Checkpoint, read_state, save, update_run
from mlx_codellama.weights.arrays import ArraysFile

ARGS = tiny_args()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(".pipe"))
    path.symlink_to(".pipe")


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # regular in nothing but its willingness to be read without end


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        try:  # a socket's path may have 108 bytes
            before = os.getcwd()
            os.chdir(path.parent)
            server.bind(path.name)
            os.chdir(before)
        finally:
            os.close(here)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)  # a hole: reading it would fill any memory


ODD = [pipe, link_to_a_pipe, link_to_a_device, listening]


@pytest.mark.parametrize("make", ODD)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    make(path)  # nobody writes into the pipes: an open that waits would hang the test
    with pytest.raises(OSError, match="not a regular file"):
        inputs.read_bytes(path, 100)
    with pytest.raises(OSError, match="not a regular file"):
        next(inputs.pieces(path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        inputs.read_bytes(tmp_path, 100)


def test_nothing_beyond_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert inputs.read_bytes(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="it has 100 bytes, more than the 99 allowed"):
        inputs.read_bytes(path, 99)
    endless(path)
    with pytest.raises(OSError, match="1,000,000,000,000 bytes"):
        inputs.read_bytes(path, 100)


@pytest.mark.skipif(sys.platform != "linux", reason="files of /proc have no size beforehand")
def test_a_file_that_hides_its_size_is_held_to_the_limit_too() -> None:
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(OSError, match="more than the 10 allowed"):
        inputs.read_bytes("/proc/self/status", 10)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"rope_theta": 1e6, "rope_theta": 1e4}', "names 'rope_theta' twice"),
        ('{"a": {"b": 1, "b": 1}}', "names 'b' twice"),
        (f'{{"a": {10**400}}}', "integer of 401 digits"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        ("{", "Expecting"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_does_not_say_one_thing_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        inputs.parse_json(text)


def test_json_is_else_read_as_it_is() -> None:
    value = {"a": [1, -2.5, None, True, "x"], "b": {"a": 10**39}}
    assert inputs.parse_json(json.dumps(value)) == value


# ── every reader of the package ─────────────────────────────────────────────────────────────────────────────────────


def hf(folder: Path) -> Path:
    return write_hf(folder, ARGS, random_weights(ARGS), shards=2)


def bin_(folder: Path) -> Path:
    return write_hf(folder, ARGS, random_weights(ARGS), shards=2, kind="bin")


def meta(folder: Path) -> Path:
    return write_meta(folder, ARGS, random_weights(ARGS))


def npz(folder: Path) -> Path:
    args = tiny_args(dtype="float16")
    return write_npz(folder, args, random_weights(args))


FILES = [
    (hf, "config.json"),
    (hf, "model-00002-of-00002.safetensors"),
    (hf, "model.safetensors.index.json"),
    (hf, "tokenizer.model"),
    (bin_, "pytorch_model-00001-of-00002.bin"),
    (bin_, "pytorch_model.bin.index.json"),
    (meta, "params.json"),
    (meta, "consolidated.00.pth"),
    (npz, "weights.npz"),
]
SMALL = [(make, name) for make, name in FILES if name.endswith((".json", ".model"))]


@pytest.mark.parametrize(("make", "name"), FILES)
@pytest.mark.parametrize("odd", [pipe, link_to_a_device])
def test_a_release_with_an_odd_file_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], name: str, odd: Callable[[Path], None]
) -> None:
    folder = make(tmp_path / "source")
    convert.open(folder)  # it is the file that is refused
    (folder / name).unlink()
    odd(folder / name)
    with pytest.raises(CodeLlamaError, match=rf"(?s){name}.*not a regular file"):
        convert.open(folder)


@pytest.mark.parametrize(("make", "name"), SMALL)
def test_a_release_with_a_huge_description_is_refused(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    folder = make(tmp_path / "source")
    endless(folder / name)
    with pytest.raises(CodeLlamaError, match=rf"(?s){name}.*1,000,000,000,000 bytes"):
        convert.open(folder)


@pytest.mark.parametrize("odd", [pipe, endless])
@pytest.mark.parametrize(
    "read",
    [
        load_config,
        Tokenizer.load,
        ArraysFile,
        read_state,
        read_text,
        lambda path: update_run(path.parent, {}),
    ],
    ids=["config", "tokenizer", "cache", "state", "text", "run"],
)
def test_no_reader_waits_or_reads_without_end(
    tmp_path: Path, read: Callable[[Path], object], odd: Callable[[Path], None]
) -> None:
    path = tmp_path / "run.json"
    odd(path)
    with pytest.raises(CodeLlamaError, match=r"run\.json"):
        read(path)


def test_a_companion_of_any_size_is_not_copied(tmp_path: Path) -> None:
    folder = hf(tmp_path / "source")
    endless(folder / "special_tokens_map.json")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json.*1,000,000,000,000 bytes"):
        save(tmp_path / "out", Checkpoint.open(folder))
    assert not (tmp_path / "out").exists()


def test_a_corpus_leaves_pipes_and_data_out(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.py").write_text("x = 1  # long enough to be read, and different\n" * 2)
    pipe(tmp_path / "pipe.py")
    endless(tmp_path / "huge.py")
    corpus = read_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.held_out) == 200


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    # The hub's own cache is made of links.
    folder = hf(tmp_path / "source")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert convert.open(linked).args == convert.open(folder).args
