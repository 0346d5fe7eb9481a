"""Which files of a folder are a model's weights: the same for a folder, the hub and the loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import Stored, random_weights, safetensors_bytes, tiny_args, write_hf, write_mlx
from oracles.torch_files import write_torch

from mlx_codellama import convert, hub, shards
from mlx_codellama.config import QuantArgs, Quantization
from mlx_codellama.errors import CheckpointError, TokenizerError
from mlx_codellama.loader import check_vocabulary, load_model
from mlx_codellama.shards import BIN, SAFETENSORS
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights import Checkpoint, save

ARGS = tiny_args()
WEIGHTS = random_weights(ARGS)
OTHER = safetensors_bytes({"lora_A.weight": Stored("float32", np.ones((2, 2), np.float32))})
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def chosen(*names: str, index: dict[str, str] | None = None, form: shards.Form = SAFETENSORS) -> list[str]:
    return shards.choose(names, form, read=lambda _: json.dumps({"weight_map": index}), where="it").names


@pytest.mark.parametrize(
    ("present", "weights"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        ([ONE, TWO], [ONE, TWO]),
        ([ONE, TWO, "model.safetensors"], ["model.safetensors"]),
        ([ONE, TWO, "adapter_model.safetensors", "extra.safetensors"], [ONE, TWO]),
        (["weights.00.safetensors", "weights.01.safetensors", "adapters.safetensors"],
         ["weights.00.safetensors", "weights.01.safetensors"]),
        (["model.fp16.safetensors", "optimizer.safetensors"], ["model.fp16.safetensors"]),
        (["codellama.safetensors", "consolidated.safetensors"], ["codellama.safetensors"]),
        (["model.safetensors", ".model.safetensors.swp", "._model.safetensors"], ["model.safetensors"]),
    ],
)  # fmt: skip
def test_weights_are_told_from_what_lies_beside_them(present: list[str], weights: list[str]) -> None:
    assert chosen(*present) == weights
    assert hub.choose(present, None, read=lambda _: "") == weights


def test_an_index_counts_if_all_of_it_is_there() -> None:
    listed = {"a": ONE, "b": TWO}
    assert chosen(ONE, TWO, INDEX, "model.safetensors", index=listed) == [ONE, TWO]
    assert chosen(INDEX, "model.safetensors", index=listed) == ["model.safetensors"]
    assert chosen(ONE, INDEX, "model.safetensors", index=listed) == ["model.safetensors"]
    with pytest.raises(CheckpointError, match=f"1 of 2 weight files of it are missing, first {TWO}"):
        chosen(ONE, INDEX, index=listed)
    with pytest.raises(CheckpointError, match="not listed"):
        chosen(ONE, TWO, INDEX, "model-00003-of-00003.safetensors", index=listed)


@pytest.mark.parametrize("present", [[], ["adapter_model.safetensors"], [ONE], ["pytorch_model.bin"]])
def test_a_folder_without_a_whole_model_is_refused(present: list[str]) -> None:
    with pytest.raises(CheckpointError):
        chosen(*present)


@pytest.mark.parametrize("listed", ["", "..", "a/b.safetensors", "..\\b.safetensors", "a\0"])
def test_an_index_names_plain_files_only(listed: str) -> None:
    with pytest.raises(CheckpointError, match="no plain file name"):
        chosen(INDEX, index={"a": listed})


def test_bin_files_are_chosen_alike() -> None:
    assert chosen("pytorch_model.bin", "optimizer.bin", "training_args.bin", form=BIN) == ["pytorch_model.bin"]


# ── whole folders ───────────────────────────────────────────────────────────────────────────────────────────────────

BESIDE = ("adapter_model.safetensors", "adapters.safetensors", "consolidated.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("n_shards", [1, 2])
def test_files_beside_the_weights_change_nothing_and_are_named(tmp_path: Path, n_shards: int) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS, shards=n_shards)
    plain = convert.open(folder)
    for name in (*BESIDE, "model.fp16.safetensors"):
        (folder / name).write_bytes(OTHER)
    stream, loaded = convert.open(folder), Checkpoint.open(folder)
    assert stream.specs == loaded.specs == plain.specs
    assert stream.aside == loaded.aside == sorted((*BESIDE, "model.fp16.safetensors"))
    run = json.loads((save(tmp_path / "out", stream) / "run.json").read_text())
    assert run["source"]["left_aside"] == stream.aside
    assert plain.aside == []


def test_an_adapter_beside_torch_files_does_not_hide_them(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS, kind="bin")
    (folder / "adapter_model.safetensors").write_bytes(OTHER)
    assert convert.detect(folder) is convert.Layout.BIN
    assert convert.open(folder).args == ARGS


def test_an_adapter_alone_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ARGS.to_dict()))
    (tmp_path / "adapter_model.safetensors").write_bytes(OTHER)
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        convert.open(tmp_path)


def test_an_index_of_shards_that_do_not_exist_gives_way_to_the_whole_file(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, ONE)}))
    assert convert.open(folder).specs == Checkpoint.open(folder).specs


def test_an_index_may_list_buffers_that_no_shard_has(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = ONE
    (folder / INDEX).write_text(json.dumps(index))
    assert convert.open(folder).args == ARGS


# ── tensors under other circumstances ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_the_state_of_a_wrapper_is_named_for_what_it_is(tmp_path: Path, kind: str, prefix: str) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, {prefix + name: w for name, w in WEIGHTS.items()}, kind=kind)
    with pytest.raises(CheckpointError, match=f"every tensor is named {prefix!r}") as caught:
        convert.open(folder)
    assert "inside it" in caught.value.hint


def test_double_precision_is_named_for_what_it_is(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS, kind="bin")
    wide = {n: Stored("float64", np.ones(w.data.shape)) for n, w in WEIGHTS.items()}
    write_torch(folder / "pytorch_model.bin", wide)
    with pytest.raises(CheckpointError, match="stored as float64, which is not read"):
        convert.open(folder)


def tied(folder: Path, *, same: bool, quantised: bool) -> Path:
    """A model whose head is its embedding, with a head stored all the same."""
    head = WEIGHTS["model.embed_tokens.weight"] if same else WEIGHTS["lm_head.weight"]
    weights = {**WEIGHTS, "lm_head.weight": Stored(head.dtype, head.data.copy())}
    if quantised:
        write_mlx(folder, ARGS, weights, Quantization(QuantArgs(4, 32)))
    else:
        write_hf(folder, ARGS, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("quantised", [False, True])
def test_a_tied_model_may_store_its_head_twice(tmp_path: Path, quantised: bool) -> None:
    folder = tied(tmp_path / "same", same=True, quantised=quantised)
    assert convert.open(folder).args.tie_word_embeddings
    assert "lm_head.weight" not in {spec.name for spec in convert.open(folder).specs}
    assert load_model(folder).args.tie_word_embeddings
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        convert.open(tied(tmp_path / "other", same=False, quantised=quantised))


@pytest.mark.parametrize(
    ("rows", "said"),
    [(320, "padding to a multiple of 64"), (273, r"added 1, such as \[PAD\]"), (271, "from the model's own release")],
)
def test_a_vocabulary_that_does_not_fit_is_explained(tmp_path: Path, rows: int, said: str) -> None:
    folder = write_hf(tmp_path / "hf", ARGS, WEIGHTS)
    with pytest.raises(TokenizerError, match=f"272 pieces, the model {rows} rows") as caught:
        check_vocabulary(Tokenizer.load(folder), tiny_args(vocab_size=rows))
    assert said.replace("\\", "") in caught.value.hint
    assert ("272 rows" in caught.value.hint) == (rows > 272)
