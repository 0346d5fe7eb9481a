"""What reaches the disk and in which order, where tensors go, what is refused: faults that a happy end would hide."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_codellama import staging
from mlx_codellama.errors import CheckpointError, CodeLlamaError, OutputError, OutputExistsError
from mlx_codellama.weights import (
    Block,
    Checkpoint,
    Progress,
    TensorSpec,
    read_header,
    read_state,
    save,
    update_run,
    write_state,
)
from mlx_codellama.weights import saving as saving_module

HEAD = TensorSpec("lm_head.weight", (6, 4), "bfloat16")


def head_blocks() -> Iterator[Block]:
    yield Block(HEAD.name, 0, mx.zeros((6, 4), mx.bfloat16))


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes in the order in which they were synced."""
    order: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        order.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return order


@pytest.mark.parametrize("replaced", [False, True])
def test_every_file_is_on_disk_before_the_name_and_the_name_before_the_return(
    source: Path, tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    if replaced:
        save(tmp_path / "out", Checkpoint.open(source))
    swap, swapped = saving_module.place_folder, []

    def checked(folder: Path, out: Path, *how: Any) -> None:
        files = {path.name: path.stat().st_ino for path in folder.iterdir()}
        assert {"config.json", "run.json", "tokenizer.model", "model.safetensors.index.json"} <= files.keys()
        assert {name for name, inode in files.items() if inode not in synced} == set()
        assert synced[-1] == folder.stat().st_ino  # the list of its files, after the last of them
        swapped.append(len(synced))
        swap(folder, out, *how)

    monkeypatch.setattr(saving_module, "place_folder", checked)
    synced.clear()
    save(tmp_path / "out", Checkpoint.open(source), max_shard_bytes=60_000, overwrite=replaced)
    assert set(synced[swapped[0] :]) == {tmp_path.stat().st_ino}


def test_a_model_is_replaced_in_one_step_where_the_system_can(source: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (other / "x").mkdir(parents=True)
    if not staging.exchange(one, other):
        pytest.skip("this file system cannot swap two names")
    assert (one / "x").exists()
    out = save(tmp_path / "out", Checkpoint.open(source))
    seen: list[bool] = []
    rename = os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda one, target: (seen.append(out.exists()), rename(one, target))[1])
        save(out, Checkpoint.open(source), overwrite=True)
    assert seen == []  # two renames would leave a moment without a model


def test_no_shard_is_larger_than_allowed_and_the_index_counts_tensors_only(
    source: Path, tmp_path: Path, weights: dict[str, object]
) -> None:
    limit = 60_000
    out = save(tmp_path / "out", Checkpoint.open(source), max_shard_bytes=limit)
    total = 0
    for path in out.glob("*.safetensors"):
        found = read_header(path)
        payload = sum(info.nbytes for info in found.values())
        assert payload <= limit or len(found) == 1  # a tensor larger than a shard has one to itself
        total += payload
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # tensors begin aligned
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    whole = save(tmp_path / "whole", Checkpoint.open(source), max_shard_bytes=total)
    assert [path.name for path in whole.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("spare", [-1, 0])
def test_space_is_needed_for_tensors_companions_and_a_margin_to_the_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    finished = save(tmp_path / "first", Checkpoint.open(source))
    needed = sum((finished / name).stat().st_size for name in ("model.safetensors", "tokenizer.model"))
    free = needed + saving_module.MARGIN_BYTES + spare
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free))  # type: ignore[attr-defined]
    if spare < 0:
        with pytest.raises(OutputError, match="free"):
            save(tmp_path / "out", Checkpoint.open(source))
        assert not (tmp_path / "out").exists()
    else:
        save(tmp_path / "out", Checkpoint.open(source))


def test_a_link_is_not_replaced_by_what_it_points_to(source: Path, tmp_path: Path) -> None:
    real = save(tmp_path / "real", Checkpoint.open(source))
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(OutputExistsError, match="symbolic link"):
        save(tmp_path / "link", Checkpoint.open(source, dtype="float16"), overwrite=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        save(tmp_path / "dangling", Checkpoint.open(source))
    assert Checkpoint.open(real).args.dtype == "bfloat16"
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_run_left_is_not_part_of_the_model_and_goes(source: Path, tmp_path: Path) -> None:
    partial = staging.staging_name(tmp_path / "out", "partial")
    partial.mkdir()
    (partial / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    out = save(tmp_path / "out", Checkpoint.open(source))
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "run.json", "tokenizer.model"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_config_that_cannot_be_read_again_is_not_left_behind(tmp_path: Path, given: type, args: object) -> None:
    class Unreadable:
        def to_dict(self) -> dict[str, object]:
            return {"model_type": "llama", "hidden_size": "many"}

    with pytest.raises(CodeLlamaError):
        save(tmp_path / "out", given([HEAD], head_blocks, args=Unreadable()))
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "out", given([HEAD], head_blocks))


def test_a_tensor_that_is_announced_twice_is_an_error(tmp_path: Path, given: type) -> None:
    with pytest.raises(CheckpointError, match="twice"):
        save(tmp_path / "out", given([HEAD, HEAD], head_blocks))
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_closed_when_writing_fails(tmp_path: Path, given: type) -> None:
    ends: list[str] = []

    def blocks() -> Iterator[Block]:
        try:
            yield Block("unannounced", 0, mx.zeros((6, 4), mx.bfloat16))
        finally:
            ends.append("closed")

    kept = blocks()  # so that it is not closed by being forgotten
    with pytest.raises(CheckpointError, match="did not announce"):
        save(tmp_path / "out", given([HEAD], lambda: kept))
    assert ends == ["closed"]


def test_freed_blocks_do_not_pile_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[None] = []
    monkeypatch.setattr(saving_module, "CACHE_BYTES", 50_000)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(None))
    save(tmp_path / "out", Checkpoint.open(source))
    total = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert len(cleared) >= total // (2 * 65_000)  # every 50 kB and the block that goes beyond


def test_progress_counts_source_bytes_where_the_stream_tells_them(source: Path, tmp_path: Path, given: type) -> None:
    seen: list[Progress] = []
    stream = Checkpoint.open(source, dtype="float32")  # twice as much is written as is read
    save(tmp_path / "out", stream, progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == stream.total_bytes
    assert max(p.done_bytes for p in seen) == stream.total_bytes
    seen.clear()
    save(tmp_path / "other", given([HEAD], head_blocks), progress=seen.append)
    assert [(p.done_bytes, p.total_bytes) for p in seen] == [(48, 48)]


# ── run.json and the state of a run ─────────────────────────────────────────────────────────────────────────────────


def test_run_json_keeps_its_entries_and_is_replaced_only_when_on_disk(
    tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    update_run(tmp_path, {"a": 1, "b": 2})
    moved: list[str] = []
    replace = os.replace

    def checked(one: Path, target: Path) -> None:
        assert one.stat().st_ino in synced
        assert json.loads(Path(target).read_text()) == {"a": 1, "b": 2}
        moved.append(one.name)
        replace(one, target)

    monkeypatch.setattr(os, "replace", checked)
    synced.clear()
    update_run(tmp_path, {"b": 3})
    assert len(moved) == 1
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1, "b": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["[1]", "{", "\udcff"])
def test_a_run_json_that_is_none_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="not readable"):
        update_run(tmp_path, {"a": 1})
    assert (tmp_path / "run.json").read_bytes() == text.encode("utf-8", "surrogateescape")


def test_a_full_disk_keeps_the_old_run_json_and_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_run(tmp_path, {"a": 1})
    write_state(tmp_path / "state.safetensors", {"x": mx.ones((3,))}, {"train": "1"})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space"):
        update_run(tmp_path, {"a": 2})
    with pytest.raises(OutputError, match="No space"):
        write_state(tmp_path / "state.safetensors", {"x": mx.zeros((3,))}, {"train": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "state.safetensors"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}
    arrays, metadata = read_state(tmp_path / "state.safetensors")
    assert arrays["x"].tolist() == [1, 1, 1]
    assert metadata["train"] == "1"


def test_a_state_is_replaced_by_a_rename_of_what_is_on_disk(
    tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {"x": mx.ones((3,))}, {"train": "1"})
    held = path.open("rb")  # a reader of the old state keeps it whole
    before = path.read_bytes()
    replace = os.replace

    def checked(one: Path, other: Path) -> None:
        assert one.stat().st_ino in synced
        replace(one, other)

    monkeypatch.setattr(os, "replace", checked)
    synced.clear()
    write_state(path, {"x": mx.zeros((5,))}, {"train": "2"})
    assert held.read() == before
    held.close()


def test_what_is_no_state_is_not_read_as_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the state"):
        read_state(next(iter(sorted(source.glob("*.safetensors")))))
    path = tmp_path / "state.safetensors"
    write_state(path, {"x": mx.ones((300,))}, {"train": "1"})
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_state(path)
