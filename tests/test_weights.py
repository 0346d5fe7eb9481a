"""Headers that lie, folders that are written all or nothing, and streams that keep their word."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.checkpoints import Stored, random_weights, safetensors_bytes, tiny_args, to_float32, write_hf, write_mlx

from mlx_codellama import staging
from mlx_codellama.config import QuantArgs, Quantization
from mlx_codellama.errors import (
    CheckpointError,
    CodeLlamaError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
)
from mlx_codellama.weights import Block, Checkpoint, Progress, TensorSpec, packed_specs, read_header, save, tensor_specs
from mlx_codellama.weights.specs import tensors_that

ARGS = tiny_args(n_layers=1)
WEIGHTS = random_weights(ARGS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("weights") / "source", ARGS, WEIGHTS, shards=2)


class Fake:
    """A stream made of given blocks."""

    def __init__(self, specs: list[TensorSpec], blocks: Callable[[], Iterator[Block]]) -> None:
        self.args, self.specs, self.blocks = ARGS, specs, blocks
        self.files: dict[str, Path] = {}
        self.record: dict[str, Any] = {"source": "fake"}
        self.total_bytes = self.done_bytes = 0


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_with(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, np.int64, np.uint32])
def test_header_of_the_safetensors_library_is_accepted(tmp_path: Path, dtype: type[np.generic]) -> None:
    arrays = {"b": np.arange(6, dtype=dtype).reshape(2, 3), "a": np.ones(5, dtype), "none": np.zeros((0, 4), dtype)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert found.keys() == arrays.keys()
    for name, info in found.items():
        assert info.shape == arrays[name].shape
        assert raw[info.offset : info.offset + info.nbytes] == arrays[name].tobytes()


def test_our_file_is_read_by_the_safetensors_library(tmp_path: Path, source: Path) -> None:
    out = save(tmp_path / "out", Checkpoint.open(source, dtype="float16"))
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            expected = to_float32(tensor).astype(np.float16)
            np.testing.assert_array_equal(file.get_tensor(name), expected)


LIES: dict[str, tuple[Any, bytes, int | None]] = {
    "a length beyond the file": ({}, b"", 1 << 40),
    "a length of all ones": ({}, b"", (1 << 64) - 1),
    "a length one too long": ({}, b"", 3),
    "no object": ([], b"", None),
    "no JSON": (b"{'a': 1}", b"", None),
    "bytes that are no text": (b'{"\xff":1}', b"", None),
    "NaN": (b'{"a":NaN}', b"", None),
    "nesting without end": (b'{"a":' + b"[" * 100_000, b"", None),
    "a number of 5000 digits": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"1" * 5000 + b"]}}",
        b"1",
        None,
    ),
    "a name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"1", None),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", None),
    "an unknown field": ({"a": {**entry(0, 1), "strides": [1]}}, b"1", None),
    "a missing field": ({"a": {"dtype": "U8", "shape": [1]}}, b"1", None),
    "an unknown dtype": ({"a": entry(0, 1, dtype="F7")}, b"1", None),
    "a dtype of another size": ({"a": entry(0, 4, [4], "F16")}, b"1234", None),
    "overlapping tensors": ({"a": entry(0, 3), "b": entry(2, 5)}, b"12345", None),
    "the same bytes twice": ({"a": entry(0, 3), "b": entry(0, 3)}, b"123", None),
    "a hole": ({"a": entry(0, 2), "b": entry(3, 5)}, b"12345", None),
    "a hole in front": ({"a": entry(1, 3)}, b"123", None),
    "bytes nobody owns": ({"a": entry(0, 2)}, b"123", None),
    "an end beyond the file": ({"a": entry(0, 5)}, b"1234", None),
    "a negative offset": ({"a": entry(-1, 1, [2])}, b"12", None),
    "offsets that go backwards": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [2, 1]}}, b"12", None),
    "a negative size": ({"a": entry(0, 2, [-1, -2])}, b"12", None),
    "a fractional size": ({"a": entry(0, 2, [2.0])}, b"12", None),
    "a true size": ({"a": entry(0, 1, [True])}, b"1", None),
    "sizes that overflow 64 bits": ({"a": entry(0, 0, [1 << 32, 1 << 32])}, b"", None),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"12", None),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_an_error_with_a_hint(tmp_path: Path, lie: str) -> None:
    header, data, length = LIES[lie]
    with pytest.raises(CheckpointError) as caught:
        read_header(file_with(tmp_path / "x.safetensors", header, data, length=length))
    assert caught.value.hint or "dtype" in str(caught.value)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "C64"])
def test_a_dtype_that_is_not_supported_is_no_damage(tmp_path: Path, code: str) -> None:
    path = file_with(tmp_path / "x.safetensors", {"a": entry(0, 2, [2], code)}, b"12")
    with pytest.raises(CheckpointError, match=f"'a' is stored as {code}, which is not supported") as caught:
        read_header(path)
    assert "fetch" not in caught.value.hint
    assert "bfloat16" in caught.value.hint


def test_a_pointer_of_git_lfs_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs") as caught:
        read_header(path)
    assert caught.value.hint == "run `git lfs pull`"


def test_one_tensor_and_several_are_told_apart() -> None:
    assert tensors_that(["a"], "is missing", "are missing") == "tensor 'a' is missing"
    assert tensors_that(["a", "b"], "is missing", "are missing") == "2 tensors are missing, first 'a'"


def test_header_error_needs_the_lie(tmp_path: Path) -> None:
    # The honest form of the files above is accepted: what fails there is the lie, not the way the file is made.
    honest = {"__metadata__": {"a": "1"}, "a": entry(0, 2), "b": entry(2, 6, [1, 2], "F16")}
    assert list(read_header(file_with(tmp_path / "x.safetensors", honest, b"123456"))) == ["a", "b"]


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": Stored("float16", np.ones((2, 3), np.float16))})
    path = tmp_path / "x.safetensors"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            read_header(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_raise_nothing_but_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(safetensors_bytes({n: Stored("float32", np.ones((2, 3), np.float32)) for n in "ab"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        choice = data.draw(st.sampled_from([b'"', b"{", b"[", b"-", b"9", b",", b"\xff", b"\0", b""]))
        whole[at : at + data.draw(st.integers(0, 2))] = choice
    (tmp_path / "x.safetensors").write_bytes(whole)
    try:
        found = read_header(tmp_path / "x.safetensors")
    except CodeLlamaError:
        return
    assert all(0 <= info.offset <= info.offset + info.nbytes <= len(whole) for info in found.values())


def test_lying_length_allocates_nothing(tmp_path: Path) -> None:
    path = file_with(tmp_path / "x.safetensors", {}, length=1 << 62)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoint_reads_every_weight_bit_for_bit(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    assert [spec.name for spec in checkpoint.specs] == list(ARGS.tensor_shapes())
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(np.array(checkpoint.read(name).view(mx.uint16)), tensor.data)


def test_rows_are_the_rows_of_the_whole(source: Path) -> None:
    checkpoint, name = Checkpoint.open(source), "model.layers.0.mlp.up_proj.weight"
    whole = checkpoint.read(name)
    assert mx.array_equal(checkpoint.rows(name, 17, 40), whole[17:40]).item()
    assert checkpoint.rows(name, 5, 5).shape == (0, ARGS.hidden_size)
    with pytest.raises(CheckpointError, match="rows"):
        checkpoint.rows(name, 5, 9999)
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.read("model.layers.7.mlp.up_proj.weight")


@pytest.mark.parametrize("block_bytes", [1, 1000, 10**9])
def test_blocks_tile_every_tensor_whatever_their_size(source: Path, block_bytes: int) -> None:
    checkpoint = Checkpoint.open(source)
    checkpoint._reader._block_bytes = block_bytes
    parts: dict[str, list[mx.array]] = {}
    for block in checkpoint.blocks():
        rows = parts.setdefault(block.name, [])
        assert block.start == sum(len(part) for part in rows)
        rows.append(block.array)
    assert list(parts) == list(WEIGHTS)
    for name, rows in parts.items():
        np.testing.assert_array_equal(np.array(mx.concatenate(rows).view(mx.uint16)), WEIGHTS[name].data)
    assert checkpoint.done_bytes == checkpoint.total_bytes == sum(w.data.nbytes for w in WEIGHTS.values())


def test_digest_of_the_inputs_does_not_depend_on_block_size_and_sees_one_bit(source: Path, tmp_path: Path) -> None:
    def digests(folder: Path, block_bytes: int) -> dict[str, Any]:
        checkpoint = Checkpoint.open(folder)
        checkpoint._reader._block_bytes = block_bytes
        assert all("tensors_sha256" not in file for file in checkpoint.record["weights"]["files"].values())
        for _ in checkpoint.blocks():
            pass
        files: dict[str, Any] = checkpoint.record["weights"]["files"]
        return files

    first = digests(source, 10**9)
    assert first == digests(source, 700)
    assert all(len(file["tensors_sha256"]) == 64 for file in first.values())
    other = shutil.copytree(source, tmp_path / "other")
    path = other / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    changed = digests(other, 700)
    assert {name for name in first if first[name] != changed[name]} == {path.name}


def test_a_consumer_that_stops_early_leaves_no_thread(source: Path) -> None:
    import threading

    blocks = Checkpoint.open(source).blocks()
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "weights-reader" for thread in threading.enumerate())


def test_file_that_shrinks_while_it_is_read_is_an_error(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "shrinking")
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model-00002-of-00002.safetensors", 2000)
    with pytest.raises(CheckpointError, match="ends at"):
        save(tmp_path / "out", checkpoint)
    assert beside(tmp_path / "out") == ["shrinking"]


def damage(folder: Path, action: str) -> None:
    index = folder / "model.safetensors.index.json"
    one, two = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    listed = json.loads(index.read_text())
    names = sorted(listed["weight_map"])
    if action == "shard missing":
        two.unlink()
    elif action == "shard missing, no index":
        two.unlink()
        index.unlink()
    elif action == "shard twice":
        shutil.copy(one, two)
    elif action == "shard twice, no index":
        shutil.copy(one, folder / "model-00001-of-00001.safetensors")
        index.unlink()
    elif action == "stale shard":
        shutil.copy(one, folder / "model-00003-of-00003.safetensors")
    elif action == "tensor missing":
        two.write_bytes(safetensors_bytes({n: WEIGHTS[n] for n in names[1:] if listed["weight_map"][n] == two.name}))
        one.write_bytes(safetensors_bytes({n: WEIGHTS[n] for n in names[1:] if listed["weight_map"][n] == one.name}))
        del listed["weight_map"][names[0]]
        index.write_text(json.dumps(listed))
    elif action == "tensor left over":
        index.unlink()
        own = {n: WEIGHTS[n] for n in names if listed["weight_map"][n] == one.name}
        one.write_bytes(safetensors_bytes(own | {"extra.weight": WEIGHTS[names[0]]}))
    elif action == "index names what is nowhere":
        listed["weight_map"]["ghost.weight"] = one.name
        index.write_text(json.dumps(listed))
    elif action == "index names a path":
        listed["weight_map"][names[0]] = "../elsewhere.safetensors"
        index.write_text(json.dumps(listed))
    elif action == "index is no JSON":
        index.write_text("{")
    elif action in ("wrong shape", "wrong dtype"):
        config = json.loads((folder / "config.json").read_text())
        if action == "wrong shape":
            config["intermediate_size"] += 32
        else:
            config["quantization"] = {"group_size": 32, "bits": 4}
            part = {n: WEIGHTS[n] for n in names} | {
                "lm_head.scales": WEIGHTS[names[0]],
                "lm_head.biases": WEIGHTS[names[0]],
            }
            one.write_bytes(safetensors_bytes(part))
            two.unlink()
            index.unlink()
            one.rename(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    elif action == "shard cut short":
        os.truncate(one, one.stat().st_size - 1)
    else:
        raise AssertionError(action)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("shard missing", "missing, first model-00002-of-00002"),
        ("shard missing, no index", "missing, first model-00002-of-00002"),
        ("shard twice", "two files hold|says is elsewhere"),
        ("shard twice, no index", "two files hold"),
        ("stale shard", "not listed"),
        ("tensor missing", "^tensor '.*' is missing"),
        ("tensor left over", "(does|do) not belong"),
        ("index names what is nowhere", "in no file"),
        ("index names a path", "no plain file name"),
        ("index is no JSON", "is no index"),
        ("wrong shape", "has shape"),
        ("wrong dtype", "has shape|stored as"),
        ("shard cut short", "not a whole safetensors file"),
    ],
)
def test_damaged_folder_is_an_error_when_opened(source: Path, tmp_path: Path, action: str, message: str) -> None:
    folder = shutil.copytree(source, tmp_path / "damaged")
    Checkpoint.open(folder)  # whole before the damage
    damage(folder, action)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert caught.value.hint


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 0x7FC0), ("float16", 0x7C00), ("float32", 0xFF800000)])
def test_nan_or_infinity_is_an_error_that_names_the_tensor(tmp_path: Path, dtype: str, bits: int) -> None:
    args = replace(ARGS, dtype=dtype)
    weights = random_weights(args)
    name = "model.layers.0.self_attn.o_proj.weight"
    raw = weights[name].data.view(np.uint32 if dtype == "float32" else np.uint16)
    raw[-1, -1] = bits
    folder = write_hf(tmp_path / "nan", args, weights)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.o_proj"):
        save(tmp_path / "out", checkpoint)
    with pytest.raises(NonFiniteError):
        checkpoint.read(name)
    assert beside(tmp_path / "out") == ["nan"]
    raw[-1, -1] = {"bfloat16": 0x7F7F, "float16": 0x7BFF, "float32": 0x7F7FFFFF}[dtype]  # the largest finite number
    save(tmp_path / "out", Checkpoint.open(write_hf(tmp_path / "finite", args, weights)))


def test_dtype_casts_every_weight_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    weights = random_weights(ARGS)
    out = save(tmp_path / "f16", Checkpoint.open(write_hf(tmp_path / "a", ARGS, weights), dtype="float16"))
    saved = Checkpoint.open(out)
    assert saved.args.dtype == "float16"
    for name, tensor in weights.items():
        np.testing.assert_array_equal(np.array(saved.read(name)), to_float32(tensor).astype(np.float16))
    weights["lm_head.weight"].data[3, 3] = 0x4780  # 65536: beyond float16
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight has weights too large for float16"):
        save(tmp_path / "no", Checkpoint.open(write_hf(tmp_path / "b", ARGS, weights), dtype="float16"))


@pytest.mark.parametrize("quant", [QuantArgs(4, 32), QuantArgs(3, 32), QuantArgs(8, 32), QuantArgs(4, 32, "mxfp4")])
def test_quantised_folder_of_mlx_is_read_and_rewritten_unchanged(tmp_path: Path, quant: QuantArgs) -> None:
    plan = Quantization(quant, {"lm_head": None, "model.embed_tokens": QuantArgs(8, 32)})
    folder = write_mlx(tmp_path / "mlx", ARGS, WEIGHTS, plan)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.args.quantization == plan
    assert checkpoint.specs == tensor_specs(replace(ARGS, quantization=plan))
    out = save(tmp_path / "out", checkpoint)
    theirs, ours = mx.load(str(folder / "model.safetensors")), mx.load(str(out / "model.safetensors"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert theirs[name].dtype == ours[name].dtype
        assert mx.array_equal(theirs[name], ours[name]).item()


def test_module_without_scales_counts_as_unquantised(tmp_path: Path) -> None:
    # MLX's own loader goes by the scales; a config that only names the default is common.
    folder = write_mlx(tmp_path / "mlx", ARGS, WEIGHTS, Quantization(QuantArgs(4, 32), {"lm_head": None}))
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        del config[key]["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    quantization = Checkpoint.open(folder).args.quantization
    assert quantization is not None
    assert quantization.of("lm_head") is None
    assert quantization.of("model.embed_tokens") == QuantArgs(4, 32)


def test_a_quantised_module_that_the_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", ARGS, WEIGHTS, Quantization(QuantArgs(4, 32)))
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key]["model.layers.99.mlp.up_proj"] = {"bits": 8, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.99\.mlp\.up_proj"):
        Checkpoint.open(folder)


def test_group_that_does_not_divide_the_features_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="groups of 128"):
        packed_specs("lm_head", (272, 96), QuantArgs(4, 128), "bfloat16")


# ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_folder_is_complete_and_leaves_nothing_beside_it(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    out = save(tmp_path / "new" / "out", Checkpoint.open(source), progress=seen.append, run={"command": "test"})
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "run.json",
        "tokenizer.model",
    ]
    assert beside(out) == ["out"]
    run = json.loads((out / "run.json").read_text())
    assert run["command"] == "test"
    assert len(run["source"]["weights"]["files"]) == 2
    assert seen[-1].done_bytes == seen[-1].total_bytes == sum(w.data.nbytes for w in WEIGHTS.values())
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def test_shards_have_an_index_that_opens_again(source: Path, tmp_path: Path) -> None:
    out = save(tmp_path / "out", Checkpoint.open(source), max_shard_bytes=60_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = Checkpoint.open(out)
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(np.array(again.read(name).view(mx.uint16)), tensor.data)


def test_existing_output_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    def never() -> Iterator[Block]:
        raise AssertionError("the stream was read")

    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists"):
        save(tmp_path / "out", Fake(tensor_specs(ARGS), never))
    assert list((tmp_path / "out").iterdir()) == []


def test_overwrite_replaces_a_model_but_no_other_folder(source: Path, tmp_path: Path) -> None:
    out = save(tmp_path / "out", Checkpoint.open(source), max_shard_bytes=60_000)
    save(out, Checkpoint.open(source), overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == 1
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    for target in (precious, precious / "thesis.tex"):
        with pytest.raises(OutputExistsError, match="no model folder"):
            save(target, Checkpoint.open(source), overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years"


def test_model_can_replace_itself(source: Path, tmp_path: Path) -> None:
    out = save(tmp_path / "out", Checkpoint.open(source))
    save(out, Checkpoint.open(out, dtype="float16"), overwrite=True)
    assert Checkpoint.open(out).args.dtype == "float16"
    assert beside(out) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_failed_overwrite_keeps_the_old_model(
    source: Path, tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # as on a file system that cannot swap two names
        monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    out = save(tmp_path / "out", Checkpoint.open(source))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    specs = tensor_specs(ARGS)
    with pytest.raises(CheckpointError, match="of 272 rows"):
        save(out, Fake(specs, lambda: iter([])), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    save(out, Checkpoint.open(source, dtype="float16"), overwrite=True)
    assert Checkpoint.open(out).args.dtype == "float16"
    assert beside(out) == ["out"]


def test_replacement_cut_off_between_its_two_steps_is_undone(source: Path, tmp_path: Path) -> None:
    old = save(tmp_path / "out", Checkpoint.open(source))
    old = old.rename(staging.staging_name(old, "old"))  # what a kill between the two renames leaves
    with pytest.raises(OutputExistsError):
        save(tmp_path / "out", Checkpoint.open(source))
    assert not old.exists()
    assert Checkpoint.open(tmp_path / "out").specs == Checkpoint.open(source).specs


def blocks_of(name: str, *ranges: tuple[int, int], **changes: Any) -> Callable[[], Iterator[Block]]:
    spec = TensorSpec(name, ARGS.tensor_shapes()[name], "bfloat16")

    def blocks() -> Iterator[Block]:
        for start, stop in ranges:
            shape = (stop - start, *changes.get("columns", spec.shape[1:]))
            yield Block(changes.get("as_name", name), start, mx.zeros(shape, changes.get("dtype", mx.bfloat16)))

    return blocks


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (blocks_of("lm_head.weight", (0, 100), (100, 271)), "271 of 272 rows"),
        (blocks_of("lm_head.weight", (0, 100), (90, 272)), "rows 90 to 272 after 100"),
        (blocks_of("lm_head.weight", (0, 100), (101, 272)), "rows 101 to 272 after 100"),
        (blocks_of("lm_head.weight", (0, 272), (0, 272)), "after 272 rows"),
        (blocks_of("lm_head.weight", (0, 273)), "rows 0 to 273"),
        (blocks_of("lm_head.weight", (0, 272), columns=(95,)), "announced as"),
        (blocks_of("lm_head.weight", (0, 272), dtype=mx.float16), "announced as"),
        (blocks_of("lm_head.weight", (0, 272), as_name="lm_tail.weight"), "did not announce"),
    ],
)
def test_stream_that_breaks_its_word_is_an_error(
    tmp_path: Path, blocks: Callable[[], Iterator[Block]], message: str
) -> None:
    specs = [spec for spec in tensor_specs(ARGS) if spec.name == "lm_head.weight"]
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "out", Fake(specs, blocks))
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "out", Fake(specs, blocks_of("lm_head.weight", (0, 5), (5, 272))))


def test_strided_blocks_are_written_row_by_row(tmp_path: Path) -> None:
    specs = [TensorSpec("lm_head.weight", (6, 4), "bfloat16"), TensorSpec("model.norm.weight", (3,), "float32")]
    matrix, vector = mx.arange(24).reshape(4, 6).astype(mx.bfloat16), mx.arange(9).astype(mx.float32)

    def blocks() -> Iterator[Block]:
        yield Block("lm_head.weight", 0, matrix.T[:2])
        yield Block("model.norm.weight", 0, vector[::3])
        yield Block("lm_head.weight", 2, matrix.T[2:])

    out = save(tmp_path / "out", Fake(specs, blocks))
    saved = mx.load(str(out / "model.safetensors"))
    assert mx.array_equal(saved["lm_head.weight"], matrix.T).item()
    assert saved["model.norm.weight"].tolist() == [0, 3, 6]


# ── interruptions ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["pwrite", "fsync", "open"])
@pytest.mark.parametrize("at", [0, 3])
def test_full_disk_at_any_write_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    checkpoint = Checkpoint.open(source)
    real, count = getattr(os, call), 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        writes = call != "open" or args[1] & os.O_WRONLY
        count += writes
        if writes and count > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left") as caught:
        save(tmp_path / "out", checkpoint)
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save(tmp_path / "out", checkpoint)


def test_short_writes_are_carried_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    out = save(tmp_path / "out", Checkpoint.open(source))
    np.testing.assert_array_equal(
        np.array(Checkpoint.open(out).read("lm_head.weight").view(mx.uint16)), WEIGHTS["lm_head.weight"].data
    )


def test_too_little_space_is_said_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[Block]:
        raise AssertionError("the stream was read")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"takes \d+ kB and 4\.19 MB beside it, .* has 100 kB free"):
        save(tmp_path / "out", Fake(tensor_specs(ARGS), never))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_takes_the_folders_it_made_along_and_no_others(source: Path, tmp_path: Path) -> None:
    specs = tensor_specs(ARGS)
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "new" / "deeper" / "out"
    with pytest.raises(CheckpointError):
        save(out, Fake(specs, lambda: iter([])))
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]

    def foreign() -> Iterator[Block]:
        (tmp_path / "there" / "new" / "notes").write_text("of somebody else")
        return iter([])

    with pytest.raises(CheckpointError):
        save(out, Fake(specs, foreign))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "notes", "there"]
    with pytest.raises(OutputError, match=r"File exists|Not a directory"):
        save(tmp_path / "there" / "new" / "notes" / "a" / "out", Fake(specs, lambda: iter([])))
    save(out, Checkpoint.open(source))


def test_ctrl_c_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        assert any(tmp_path.glob(".out.*.partial/*"))  # it is in mid-work
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", Checkpoint.open(source), progress=press)
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import sys, time
    from pathlib import Path
    from mlx_codellama import convert
    from mlx_codellama.weights import save

    def hang(progress):
        if progress.name == "lm_head.weight":
            print("writing", flush=True)
            time.sleep(60)

    save(Path(sys.argv[2]), convert.open(sys.argv[1]), progress=hang, overwrite=True)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_9_leaves_the_old_state_and_a_rerun_succeeds(source: Path, tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        save(out, Checkpoint.open(source, dtype="float16"))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        # While it lives, nobody else may write there.
        with pytest.raises(OutputError, match="another process"):
            save(out, Checkpoint.open(source), overwrite=True)
        process.kill()
    assert any(tmp_path.glob(".out.*.partial/model.safetensors"))  # or the kill came too late to show anything
    assert out.exists() == existing
    if existing:
        assert Checkpoint.open(out).args.dtype == "float16"
    save(out, Checkpoint.open(source), overwrite=True)
    assert beside(out) == ["out"]
    assert Checkpoint.open(out).args.dtype == "bfloat16"
