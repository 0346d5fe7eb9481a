"""Blocks under pressure: slow consumers, other readers, the end of a chunk, files that are shorter than they say."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.checkpoints import random_weights, safetensors_bytes, write_hf

from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import CheckpointError, ConfigError, NonFiniteError
from mlx_codellama.weights import Checkpoint, FileRows, InputFile, read_header
from mlx_codellama.weights import header as header_module
from mlx_codellama.weights import reading as reading_module


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16))


def test_a_buffer_is_not_filled_again_before_it_is_copied(
    source: Path, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(source)
    checkpoint._reader._block_bytes = 4000
    copy = reading_module.to_array

    def late(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> mx.array:
        time.sleep(0.002)  # the reader has long read all the buffers it may
        return copy(raw, dtype, shape)

    monkeypatch.setattr(reading_module, "to_array", late)
    rows: dict[str, list[mx.array]] = {}
    for block in checkpoint.blocks():
        rows.setdefault(block.name, []).append(block.array)
    for name, parts in rows.items():
        np.testing.assert_array_equal(bits(mx.concatenate(parts)), weights[name].data)


def test_the_reader_stays_a_few_blocks_ahead(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(source)
    checkpoint._reader._block_bytes = 1000
    reads: list[int] = []
    real = FileRows.read
    monkeypatch.setattr(FileRows, "read", lambda self, *args: (reads.append(1), real(self, *args))[1])
    blocks = checkpoint.blocks()
    for taken in range(1, 5):
        next(blocks)
        time.sleep(0.02)
        assert taken <= len(reads) <= taken + 3  # one taken, one ready, one being read
    blocks.close()  # type: ignore[attr-defined]


def test_short_reads_are_carried_on(source: Path, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [view[:1000] for view in views], offset))
    checkpoint = Checkpoint.open(source)
    for name in ("lm_head.weight", "model.norm.weight"):
        np.testing.assert_array_equal(bits(checkpoint.read(name)), weights[name].data)


def test_hashes_count_what_blocks_read_and_nothing_else(source: Path) -> None:
    def digests(checkpoint: Checkpoint, *, disturb: bool) -> dict[str, Any]:
        for block in checkpoint.blocks():
            if disturb:
                checkpoint.rows(block.name, 0, 1)
        files: dict[str, Any] = checkpoint.record["weights"]["files"]
        return files

    one = Checkpoint.open(source)
    alone = digests(one, disturb=False)
    assert digests(one, disturb=True) == alone  # nor does a second pass go on from the first
    assert digests(Checkpoint.open(source), disturb=True) == alone


@pytest.mark.parametrize("at", [0, 99, 100, -1])
def test_nan_is_found_in_every_chunk_and_at_its_borders(
    tmp_path: Path, args: ModelArgs, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(reading_module, "CHUNK", 100)
    weights = random_weights(args)
    weights["model.norm.weight"].data.reshape(-1)[min(at, 95)] = 0x7FC0
    weights["lm_head.weight"].data.reshape(-1)[at] = 0xFFC0
    checkpoint = Checkpoint.open(write_hf(tmp_path / "nan", args, weights))
    for name in ("model.norm.weight", "lm_head.weight"):
        with pytest.raises(NonFiniteError, match=name):
            checkpoint.read(name)
    checkpoint.read("model.embed_tokens.weight")


def test_rows_beyond_their_file_are_refused_when_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    file = InputFile(tmp_path / "x")
    FileRows(file, 4, "float32", (4, 6))
    for offset in (5, -1):
        with pytest.raises(CheckpointError, match="too short"):
            FileRows(file, offset, "float32", (4, 6))


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_checkpoints_that_are_forgotten_close_their_files(source: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        checkpoint = Checkpoint.open(source)
        checkpoint.read("lm_head.weight")
        del checkpoint
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_bytes(tmp_path: Path, args: ModelArgs) -> None:
    weights = random_weights(args)
    other = random_weights(replace(args, dtype="float16"))
    weights["model.embed_tokens.weight"] = other["model.embed_tokens.weight"]  # the first tensor
    checkpoint = Checkpoint.open(write_hf(tmp_path / "mixed", args, weights))
    assert checkpoint.args.dtype == "bfloat16"
    assert next(iter(checkpoint.specs)).dtype == "float16"


def test_integers_are_no_weights_and_buffers_of_the_rotation_are_left_out(
    tmp_path: Path, args: ModelArgs, weights: dict[str, Any]
) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": weights["model.norm.weight"]}
    folder = write_hf(tmp_path / "hf", args, weights)
    (folder / "more.safetensors").write_bytes(safetensors_bytes(extra))
    assert len(Checkpoint.open(folder).specs) == len(weights)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"BF16"', b'"I16" ', 1))  # as many bytes, other numbers
    with pytest.raises(CheckpointError, match="is stored as int16, expected bfloat16"):
        Checkpoint.open(folder)


def test_a_dtype_that_does_not_exist_is_an_error(source: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'float8'") as caught:
        Checkpoint.open(source, dtype="float8")
    assert "bfloat16" in caught.value.hint


def test_companions_of_a_tokenizer_travel_along(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
    for name in (*names, "tokenizer.json", "README.md"):
        (folder / name).write_text("{}")
    assert set(Checkpoint.open(folder).files) == {*names, "tokenizer.json", "tokenizer.model"}


@pytest.mark.parametrize("name", ["..\\elsewhere.safetensors", "a/b.safetensors", "..", ""])
def test_an_index_names_files_beside_it_and_no_others(source: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][min(index["weight_map"])] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no plain file name"):
        Checkpoint.open(folder)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 1000)
    for length in (1000, 1001):
        text = b"{}".ljust(length)
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        if length == 1000:
            assert read_header(tmp_path / "x.safetensors") == {}
        else:
            with pytest.raises(CheckpointError, match="claims 1001 bytes"):
                read_header(tmp_path / "x.safetensors")
