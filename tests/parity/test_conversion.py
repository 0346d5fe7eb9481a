"""Files that torch, transformers and mlx-lm wrote convert to ours, and ours load in transformers and mlx-lm.

One tiny random model of bfloat16-exact weights goes through every layout. Logits are held to Meta's maths in float64,
with twice the error of a plain float32 pass as tolerance; files are held to each other bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles.layouts import CONTEXT, FILED, write_bin, write_hf_tokenizer, write_meta, write_transformers
from oracles.meta_reference import Weights, forward, from_hf, random_weights
from oracles.mlx_models import logits, rms
from oracles.transformers_model import transformers_greedy, transformers_logits

from mlx_codellama import convert, quant
from mlx_codellama.api import load
from mlx_codellama.config import load_config
from mlx_codellama.loader import load_model
from mlx_codellama.quant.recipes import recipe
from mlx_codellama.weights import Checkpoint, save

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
KINDS = pytest.mark.parametrize("kind", sorted(FILED))


@pytest.fixture(autouse=True)
def _peers() -> None:
    for name in ("torch", "transformers", "mlx_lm"):
        pytest.importorskip(name)


def weights_of(kind: str) -> Weights:
    return random_weights(FILED[kind], seed=31)


def some_ids(kind: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.random.RandomState(32).randint(0, FILED[kind].vocab_size, (2, 19))


def converted(source: Path, out: Path, *, name: str | None = None) -> Path:
    """Our conversion of a folder, quantised by the recipe of this name where there is one."""
    stream = convert.open(source)
    save(out, quant.apply(recipe(name, stream.args) if name else None, stream))
    return out


def dequantised(folder: Path, kind: str) -> Weights:
    """Meta-named float32 weights that a quantised checkpoint of anybody's stands for, read by MLX alone."""
    arrays: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        arrays |= mx.load(str(file))
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    dense = {}
    for name, array in arrays.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{path}.scales" in arrays:
            q = {"mode": "affine", **settings, **settings.get(path, {})}
            scales, biases = arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            array = mx.dequantize(array, scales, biases, group_size=q["group_size"], bits=q["bits"], mode=q["mode"])
        dense[name] = np.array(array.astype(mx.float32))
    return from_hf(dense, FILED[kind])


def assert_as_good_as_plain(found: Any, weights: Weights, kind: str) -> None:
    """found [2, 19, V]: logits of some_ids by somebody in float32."""
    g, ids = FILED[kind], some_ids(kind)
    truth = forward(weights, g, ids)
    plain = forward(weights, g, ids, dtype=np.float32)
    assert truth.std() > 0.5
    assert rms(found - truth) <= 2 * rms(plain - truth)


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.model"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@KINDS
@pytest.mark.parametrize("shards", [1, 2])
def test_meta_shards_of_torch_become_a_model_that_transformers_loads(kind: str, shards: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = weights_of(kind)
    out = converted(write_meta(tmp_path / "meta", kind, weights, shards=shards), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="float32", attn_implementation="eager")
    assert theirs.config.max_position_embeddings == CONTEXT
    assert_as_good_as_plain(transformers_logits(theirs, some_ids(kind)), weights, kind)
    assert_as_good_as_plain(logits(load_model(out, dtype="float32").model, some_ids(kind)), weights, kind)


@KINDS
def test_what_transformers_saves_loads_here_and_converts_here(kind: str, tmp_path: Path) -> None:
    weights = weights_of(kind)
    source = write_transformers(tmp_path / "hf", kind, weights, shard_bytes=300_000)
    assert len(list(source.glob("*.safetensors"))) > 1
    assert_as_good_as_plain(logits(load_model(source, dtype="float32").model, some_ids(kind)), weights, kind)
    out = converted(source, tmp_path / "ours")
    assert load_config(out).rope_theta == FILED[kind].rope_theta
    assert_as_good_as_plain(logits(load_model(out, dtype="float32").model, some_ids(kind)), weights, kind)


@KINDS
@pytest.mark.parametrize("name", [None, "q4"])
def test_every_source_format_gives_the_same_files_to_the_bit(kind: str, name: str | None, tmp_path: Path) -> None:
    weights = weights_of(kind)
    sources = {
        "meta of 1": write_meta(tmp_path / "m1", kind, weights),
        "meta of 2": write_meta(tmp_path / "m2", kind, weights, shards=2),
        "safetensors": write_transformers(tmp_path / "h1", kind, weights),
        "safetensors, sharded": write_transformers(tmp_path / "hn", kind, weights, shard_bytes=300_000),
        "bin": write_bin(tmp_path / "b1", kind, weights),
        "bin, sharded": write_bin(tmp_path / "b3", kind, weights, shards=3),
    }
    sources["ours"] = converted(sources["meta of 1"], tmp_path / "again")
    found = {kind: digests(converted(folder, tmp_path / f"{kind} out", name=name)) for kind, folder in sources.items()}
    first = found.pop("meta of 1")
    assert len(first) == 3
    assert found == dict.fromkeys(found, first)


@KINDS
@pytest.mark.parametrize("name", ["q4", "q8", "mixed", "mxfp4"])
def test_our_quantised_checkpoint_gives_the_same_logits_in_mlx_lm(kind: str, name: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as their_load

    weights = weights_of(kind)
    out = converted(write_meta(tmp_path / "meta", kind, weights), tmp_path / "ours", name=name)
    meant = dequantised(out, kind)
    theirs, _ = their_load(out, lazy=True)
    theirs.set_dtype(mx.float32, lambda dtype: mx.issubdtype(dtype, mx.floating))  # packed words stay
    assert_as_good_as_plain(logits(theirs, some_ids(kind)), meant, kind)
    ours = load_model(out, dtype="float32", exact=True).model
    assert_as_good_as_plain(logits(ours, some_ids(kind)), meant, kind)
    drift = rms(forward(meant, FILED[kind], some_ids(kind)) - forward(weights, FILED[kind], some_ids(kind)))
    assert drift > 1e-3  # quantised indeed


@KINDS
@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_lm_converts_loads_here_and_equals_ours_to_the_bit(kind: str, bits: int, tmp_path: Path) -> None:
    from mlx_lm import convert as their_convert

    weights = weights_of(kind)
    source = write_transformers(tmp_path / "hf", kind, weights)
    write_hf_tokenizer(source)
    theirs = tmp_path / "theirs"
    their_convert(str(source), str(theirs), quantize=True, q_bits=bits, q_group_size=64)
    (theirs / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    loaded = load_model(theirs, dtype="float32", exact=True).model
    assert_as_good_as_plain(logits(loaded, some_ids(kind)), dequantised(theirs, kind), kind)
    ours = Checkpoint.open(converted(source, tmp_path / "ours", name=f"q{bits}"))
    peer = Checkpoint.open(theirs)
    assert [s.name for s in ours.specs] == [s.name for s in peer.specs]
    for spec in ours.specs:
        assert mx.array_equal(ours.read(spec.name), peer.read(spec.name)).item(), spec.name
    # An mlx-community checkpoint is a source too: converting it without quantising keeps every bit.
    again = Checkpoint.open(converted(theirs, tmp_path / "again"))
    assert all(mx.array_equal(again.read(s.name), peer.read(s.name)).item() for s in peer.specs)


@KINDS
def test_greedy_ids_of_the_whole_path_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = converted(write_meta(tmp_path / "meta", kind, weights_of(kind), shards=2), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="float32", attn_implementation="eager")
    model = load(out, dtype="float32")
    for text in ("abc", "b\n  a", ""):
        ids = model.tokenizer.encode(text, bos=True)
        found = model.complete(text, max_tokens=24)
        expected = transformers_greedy(theirs, ids, 24)
        stop = expected.index(2) + 1 if 2 in expected else 24
        assert [i for i in found.ids if i != 2] == [i for i in expected[:stop] if i != 2]
