"""Saved caches: what comes back is what was there, and no other file is taken for one."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracles.meta_reference import Geometry, random_weights
from oracles.mlx_models import our_model
from stand_ins import tiny_tokenizer

from mlx_codellama import staging
from mlx_codellama.api import CodeLlama
from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.engine import generate
from mlx_codellama.errors import CacheError, OutputError
from mlx_codellama.model import Model
from mlx_codellama.snapshot import load_cache, save_cache
from mlx_codellama.storage import KVStorage
from mlx_codellama.weights import ArraysFile, TensorSpec, arrays, write_arrays

GEOMETRY = Geometry(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=416)
IDS = np.random.RandomState(8).randint(3, 400, 53).tolist()
STORAGES = {
    "float": KVStorage(),
    "16": KVStorage.of(16),
    "8/4": KVStorage.of((8, 4)),
    "4": KVStorage.of(4),
    "window": KVStorage.of(8, window=19, sinks=2),
}


def model(seed: int = 5, dtype: str = "float32", **changes: float) -> Model:
    geometry = dataclasses.replace(GEOMETRY, **changes)
    return our_model(random_weights(geometry, seed=seed), geometry, dtype=dtype)


MODEL = model()


def filled(storage: KVStorage, ids: list[int] = IDS) -> Sequence:
    cache = make_sequence(MODEL.args, storage)
    read(MODEL, cache, ids)
    return cache


def read(model: Model, cache: Sequence, ids: list[int]) -> None:
    model.hidden(mx.array([ids]), [(cache, len(ids))])
    cache.ids += ids


def both(one: Sequence, other: Sequence) -> list[tuple[mx.array, mx.array]]:
    """Keys and values of all layers, side by side."""
    pairs = [zip(one.layer(i).held(), other.layer(i).held(), strict=True) for i in range(GEOMETRY.n_layers)]
    return [pair for layer in pairs for pair in layer]


def going_on(cache: Sequence) -> list[int | None]:
    return [step.id for step in generate(MODEL, [*IDS, 7], max_tokens=10, sequence=cache)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "prefix.cache"
    save_cache(path, MODEL, STORAGES["8/4"], filled(STORAGES["8/4"]))
    return path


@pytest.mark.parametrize("name", STORAGES)
def test_a_restored_cache_goes_on_as_the_live_one_does(tmp_path: Path, name: str) -> None:
    storage, path = STORAGES[name], tmp_path / "a.cache"
    live = filled(storage)
    save_cache(path, MODEL, storage, live)
    restored = load_cache(path, MODEL, storage)
    assert restored.ids == IDS
    assert [restored.layer(i).tail.offset for i in range(2)] == [53, 53]
    assert (restored.dropped, restored.trimmable) == (live.dropped, live.trimmable)
    assert all(mx.array_equal(a, b) for a, b in both(live, restored))  # to the bit
    assert going_on(restored) == going_on(live)
    whole = filled(storage)
    held = whole.nbytes // whole.layer(0).tail.capacity * 53  # fewer than a ring of 19 + 32 holds
    assert held < path.stat().st_size < held + 4096  # what is used, not what is allocated


@pytest.mark.parametrize("forgotten", [0, 1, 20, 32])
def test_a_window_that_has_gone_round_comes_back_with_what_can_be_trimmed(tmp_path: Path, forgotten: int) -> None:
    storage = STORAGES["window"]
    ids = np.random.RandomState(3).randint(3, 400, 140).tolist()
    live = filled(storage, ids)
    live.trim(forgotten)
    save_cache(tmp_path / "a", MODEL, storage, live)
    restored = load_cache(tmp_path / "a", MODEL, storage)
    assert restored.ids == ids[: 140 - forgotten]
    for more in (0, 5, 40):
        for cache in (live, restored):
            cache.trim(min(cache.trimmable, more))
            read(MODEL, cache, IDS[: more + 1])
        assert (live.offset, live.trimmable) == (restored.offset, restored.trimmable)
        assert all(mx.array_equal(a, b) for a, b in both(live, restored))


def test_an_empty_cache_comes_back_empty(tmp_path: Path) -> None:
    save_cache(tmp_path / "a", MODEL, KVStorage(), make_sequence(MODEL.args))
    cache = load_cache(tmp_path / "a", MODEL, KVStorage())
    assert (cache.ids, cache.offset, cache.nbytes) == ([], 0, 0)


def test_bfloat16_comes_back_as_bfloat16(tmp_path: Path) -> None:
    half = model(dtype="bfloat16")
    cache = make_sequence(half.args)
    read(half, cache, IDS)
    save_cache(tmp_path / "a", half, KVStorage(), cache)
    restored = load_cache(tmp_path / "a", half, KVStorage())
    assert restored.arrays[0].dtype == mx.bfloat16
    assert all(mx.array_equal(a, b) for a, b in both(cache, restored))


# ── foreign files ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"seed": 6}, "another model"),
        ({"dtype": "bfloat16"}, "another model"),
        ({"rope_theta": 1e4}, "rotary setting 'theta 1000000.0', here it is 'theta 10000.0'"),
        ({"norm_eps": 1e-6}, "another model"),
        ({"n_heads": 2, "n_kv_heads": 1}, "another model"),  # the same arrays, cut into other heads
    ],
    ids=str,
)
def test_a_cache_of_another_model_is_refused(saved: Path, other: dict, match: str) -> None:
    with pytest.raises(CacheError, match=match) as caught:
        load_cache(saved, model(**other), STORAGES["8/4"])
    assert caught.value.hint


def test_one_layer_trained_on_is_another_model(saved: Path) -> None:
    trained = model()
    weight = trained.model.layers[1].self_attn.v_proj.weight
    trained.model.layers[1].self_attn.v_proj.weight = weight + 1e-4 * mx.random.normal(weight.shape)
    with pytest.raises(CacheError, match="another model"):
        load_cache(saved, trained, STORAGES["8/4"])


@pytest.mark.parametrize("name", ["float", "16", "4", "window"])
def test_a_cache_of_another_storage_is_refused(saved: Path, name: str) -> None:
    with pytest.raises(CacheError, match="'8 and 4 bits, everything', here it is") as caught:
        load_cache(saved, MODEL, STORAGES[name])
    assert "--kv-bits" in caught.value.hint


def test_what_is_no_saved_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(CacheError, match="cannot read"):
        load_cache(path, MODEL, KVStorage())
    with pytest.raises(CacheError):
        load_cache(tmp_path, MODEL, KVStorage())
    path.write_text("{}")
    with pytest.raises(CacheError, match="not a whole"):
        load_cache(path, MODEL, KVStorage())
    mx.save_safetensors(str(path) + ".safetensors", {"ids": mx.arange(3)})
    with pytest.raises(CacheError, match="checks"):
        load_cache(tmp_path / "a.safetensors", MODEL, KVStorage())
    write_arrays(path, [TensorSpec("ids", (3,), "int32")], [mx.arange(3)], {"kind": "train"})
    with pytest.raises(CacheError, match="not a saved key-value cache"):
        load_cache(path, MODEL, KVStorage())
    write_arrays(path, [TensorSpec("ids", (3,), "int32")], [mx.arange(3)], {"kind": "key-value cache 0"})
    with pytest.raises(CacheError, match="another version"):
        load_cache(path, MODEL, KVStorage())


def test_a_file_cut_short_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    data, short = saved.read_bytes(), tmp_path / "short"
    for n in [*range(0, 3000, 97), *range(3000, len(data), 4999), len(data) - 1]:
        short.write_bytes(data[:n])
        with pytest.raises(CacheError):
            load_cache(short, MODEL, STORAGES["8/4"])
    short.write_bytes(data + b"\0")
    with pytest.raises(CacheError):
        load_cache(short, MODEL, STORAGES["8/4"])


def test_a_changed_byte_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    data, changed = saved.read_bytes(), tmp_path / "changed"
    (length,) = struct.unpack("<Q", data[:8])
    rng = np.random.RandomState(3)
    for at in {*range(8), *rng.randint(8, 8 + length, 150).tolist(), *rng.randint(0, len(data), 60).tolist()}:
        changed.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randint(8))]) + data[at + 1 :])
        with pytest.raises(CacheError):
            load_cache(changed, MODEL, STORAGES["8/4"])


def rewritten(path: Path, ids: list[int] | None = None, offset: str | None = None, drop: str = "") -> None:
    """The same file with other contents and right checks: nothing but its meaning is wrong."""
    file = ArraysFile(path)
    held = {name: file.read(name) for name in file.specs if name != drop}
    if ids is not None:
        held["ids"] = mx.array(np.array(ids, np.int32))
    metadata = file.metadata | ({} if offset is None else {"offset": offset})
    specs = [TensorSpec(n, a.shape, str(a.dtype).removeprefix("mlx.core.")) for n, a in held.items()]
    write_arrays(path, specs, list(held.values()), metadata)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ids": [*IDS[:-1], 416]}, "outside the vocabulary"),
        ({"ids": [*IDS[:-1], -1]}, "outside the vocabulary"),
        ({"ids": IDS[:-1]}, "does not hold"),
        ({"offset": "52"}, "does not hold"),
        ({"offset": "-1"}, "does not hold"),
        ({"offset": "9" * 400}, "does not hold"),
        ({"offset": "٥٣"}, "does not hold"),  # digits, but not ours
        ({"drop": "layers.1.rows"}, "does not hold"),
        ({"drop": "ids"}, "does not hold"),
    ],
    ids=str,
)
def test_contents_that_do_not_fit_together_are_refused(saved: Path, change: dict, match: str) -> None:
    rewritten(saved)
    load_cache(saved, MODEL, STORAGES["8/4"])  # rewriting alone does not break it
    rewritten(saved, **change)
    with pytest.raises(CacheError, match=match):
        load_cache(saved, MODEL, STORAGES["8/4"])


def test_a_shape_of_petabytes_allocates_nothing(saved: Path) -> None:
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table["layers.0.rows"]["shape"][2] = 1 << 50
    text = json.dumps(table).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CacheError):
        load_cache(saved, MODEL, STORAGES["8/4"])


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()
    write_at, calls = arrays.write_at, []

    def full(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return write_at(fd, data, offset)

    monkeypatch.setattr(arrays, "write_at", full)
    with pytest.raises(OutputError, match="No space"):
        save_cache(saved, MODEL, STORAGES["8/4"], filled(STORAGES["8/4"], IDS[:30]))
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_what_a_killed_process_left_is_taken_over_and_a_live_one_is_not(saved: Path) -> None:
    partial = staging.staging_name(saved, "partial")
    partial.write_bytes(b"x" * 10**6)
    save_cache(saved, MODEL, STORAGES["8/4"], filled(STORAGES["8/4"]))
    assert load_cache(saved, MODEL, STORAGES["8/4"]).ids == IDS
    assert os.listdir(saved.parent) == [saved.name]
    with staging.replacing(saved) as fd:
        os.write(fd, saved.read_bytes())
        with pytest.raises(OutputError, match="another process"):
            save_cache(saved, MODEL, STORAGES["8/4"], filled(STORAGES["8/4"]))


def test_ids_that_are_not_the_caches_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    cache = filled(KVStorage())
    del cache.ids[0]
    with pytest.raises(ValueError, match="52 ids for a cache of 53"):
        save_cache(tmp_path / "a", MODEL, KVStorage(), cache)


# ── the Python face ─────────────────────────────────────────────────────────────────────────────────────────────────


def codellama(**options: object) -> CodeLlama:
    return CodeLlama(MODEL, tiny_tokenizer(), **options)  # type: ignore[arg-type]


def test_a_saved_prompt_is_not_read_again(tmp_path: Path) -> None:
    first = codellama(storage=KVStorage.of(8))
    first.complete(IDS, max_tokens=0)
    assert first.save_cache(tmp_path / "a") == 53
    second = codellama(storage=KVStorage.of(8))
    assert second.load_cache(str(tmp_path / "a")) == 53
    answer = second.complete([*IDS, 9, 9], max_tokens=8)
    assert answer.stats.cached_tokens == 53
    assert answer.ids == codellama(storage=KVStorage.of(8)).complete([*IDS, 9, 9], max_tokens=8).ids
    with pytest.raises(CacheError, match="storage"):
        codellama().load_cache(tmp_path / "a")


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    m = codellama()
    with pytest.raises(CacheError, match="no cache to save"):
        m.save_cache(tmp_path / "a")
    m.complete(IDS, max_tokens=1)
    m.forget()
    with pytest.raises(CacheError):
        m.save_cache(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_fork_begins_where_the_first_is_and_goes_its_own_way() -> None:
    m = codellama(storage=KVStorage.of(4))
    m.complete(IDS, max_tokens=0)
    branch = m.fork()
    one, other = branch.complete([*IDS, 8, 8], max_tokens=9), m.complete([*IDS, 5], max_tokens=9)
    assert one.stats.cached_tokens == other.stats.cached_tokens == 53
    for prompt, answer in (([*IDS, 8, 8], one), ([*IDS, 5], other)):
        assert codellama(storage=KVStorage.of(4)).complete(prompt, max_tokens=9).ids == answer.ids
    assert codellama().fork().complete(IDS, max_tokens=1).stats.cached_tokens == 0
