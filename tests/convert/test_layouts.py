"""Every published layout of the same weights gives the same files; every damaged one gives an error, nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracles.checkpoints import (
    Stored,
    Weights,
    meta_name,
    meta_shards,
    random_weights,
    tiny_args,
    tokenizer_bytes,
    write_hf,
    write_meta,
    write_mlx,
    write_npz,
)
from oracles.torch_files import write_torch

from mlx_codellama import convert
from mlx_codellama.config import VARIANTS, ModelArgs, QuantArgs, Quantization
from mlx_codellama.convert.names import meta_tensors
from mlx_codellama.errors import CheckpointError, CodeLlamaError, ConfigError, NonFiniteError, TokenizerError
from mlx_codellama.loader import load_model
from mlx_codellama.weights import Checkpoint, save

MODELS: dict[str, tuple[ModelArgs, Weights]] = {}


def model(kind: str, dtype: str = "bfloat16") -> tuple[ModelArgs, Weights]:
    if kind + dtype not in MODELS:
        args = tiny_args(gqa=kind == "gqa", n_layers=2, dtype=dtype)
        MODELS[kind + dtype] = args, random_weights(args)
    return MODELS[kind + dtype]


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "run.json"  # times and paths
    }


LAYOUTS: dict[str, Callable[[Path, ModelArgs, Weights], Path]] = {
    "one safetensors file": lambda f, a, w: write_hf(f, a, w),
    "three safetensors files": lambda f, a, w: write_hf(f, a, w, shards=3),
    "safetensors with rope buffers": lambda f, a, w: write_hf(f, a, w, shards=2, buffers=True),
    "one bin file": lambda f, a, w: write_hf(f, a, w, kind="bin"),
    "three bin files with rope buffers": lambda f, a, w: write_hf(f, a, w, kind="bin", shards=3, buffers=True),
    "one Meta shard": lambda f, a, w: write_meta(f, a, w, shards=1),
    "two Meta shards": lambda f, a, w: write_meta(f, a, w, shards=2),
    "four Meta shards": lambda f, a, w: write_meta(f, a, w, shards=4),
    "eight Meta shards": lambda f, a, w: write_meta(f, a, w, shards=8),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Hashes of what the plainest layout gives, per model; the weights in it are checked one by one."""
    found = {}
    for kind in ("gqa", "mha"):
        for dtype in ("bfloat16", "float16", "float32"):
            args, weights = model(kind, dtype)
            folder = tmp_path_factory.mktemp("expected")
            out = save(folder / "out", convert.open(write_hf(folder / "hf", args, weights)))
            checkpoint = Checkpoint.open(out)
            assert checkpoint.args == args
            for name, tensor in weights.items():
                array = np.asarray(memoryview(checkpoint.read(name).view(mx.uint8)))
                assert array.tobytes() == tensor.data.tobytes()
            found[kind + dtype] = hashes(out)
    return found


@pytest.mark.parametrize("kind", ["gqa", "mha"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_files(
    tmp_path: Path, expected: dict[str, dict[str, str]], layout: str, kind: str
) -> None:
    # Dimensions are pairwise different and weights random: a wrong axis, order or permutation changes the hash.
    out = save(tmp_path / "out", convert.open(LAYOUTS[layout](tmp_path / "source", *model(kind))))
    assert hashes(out) == expected[kind + "bfloat16"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", ["three bin files with rope buffers", "four Meta shards"])
def test_every_dtype_is_kept(tmp_path: Path, expected: dict[str, dict[str, str]], layout: str, dtype: str) -> None:
    out = save(tmp_path / "out", convert.open(LAYOUTS[layout](tmp_path / "source", *model("gqa", dtype))))
    assert hashes(out) == expected["gqa" + dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_blocks_give_the_same_files(tmp_path: Path, expected: dict[str, dict[str, str]], layout: str) -> None:
    stream = convert.open(LAYOUTS[layout](tmp_path / "source", *model("gqa")))
    stream._reader._block_bytes = 3000  # a block ends inside most shards, and holds few heads
    assert hashes(save(tmp_path / "out", stream)) == expected["gqabfloat16"]


def test_what_we_write_is_read_again(tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    args, weights = model("gqa")
    one = save(tmp_path / "one", convert.open(write_meta(tmp_path / "meta", args, weights, shards=4)))
    two = save(tmp_path / "two", convert.open(one))
    assert hashes(one) == hashes(two) == expected["gqabfloat16"]


def test_quantised_mlx_folder_passes_through(tmp_path: Path) -> None:
    args, weights = model("gqa")
    plan = Quantization(QuantArgs(4, 32), {"lm_head": QuantArgs(8, 32)})
    out = save(tmp_path / "out", convert.open(write_mlx(tmp_path / "mlx", args, weights, plan)))
    assert Checkpoint.open(out).args.quantization == plan
    again = save(tmp_path / "again", convert.open(out))
    assert hashes(out) == hashes(again)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_early_mlx_layout_gives_the_same_files(tmp_path: Path, expected: dict[str, dict[str, str]], dtype: str) -> None:
    out = save(tmp_path / "out", convert.open(write_npz(tmp_path / "npz", *model("gqa", dtype))))
    assert hashes(out) == expected["gqa" + dtype]


def test_early_quantised_mlx_layout_gives_what_todays_gives(tmp_path: Path) -> None:
    # Quantising works row by row, so it commutes with the re-ordering of rows.
    args, weights = model("gqa", "float16")
    plan = Quantization(QuantArgs(4, 32), {"model.embed_tokens": None})
    early = save(tmp_path / "one", convert.open(write_npz(tmp_path / "npz", args, weights, plan)))
    today = save(tmp_path / "two", convert.open(write_mlx(tmp_path / "mlx", args, weights, plan)))
    assert hashes(early) == hashes(today)


NPZ_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "objects": (lambda d: d.replace(b"'<f2'", b"'|O8'", 1), "no array of numbers"),
    "big-endian numbers": (lambda d: d.replace(b"'<f2'", b"'>f2'", 1), "no array of numbers"),
    "another item size": (lambda d: d.replace(b"'<f2'", b"'<f4'", 1), "does not have the bytes"),
    "code in the header": (
        lambda d: d.replace(b"'<f2', 'fortran_order': False", b"__import__('os').abort()#####"),
        "no arr",
    ),
    "another magic": (lambda d: d.replace(b"\x93NUMPY", b"\x93NUMPI", 1), "is no array"),
    "an endless header": (lambda d: d.replace(b"\x93NUMPY\x01\x00\x76", b"\x93NUMPY\x01\x00\xff", 1), "no array|bytes"),
    "cut short": (lambda d: d[:-50], "its end is missing"),
    "another tensor": (lambda d: d.replace(b"layers.1.attention.wq", b"layers.7.attention.wq"), "(does|do) not belong"),
}


@pytest.mark.parametrize("damage", NPZ_DAMAGE)
def test_damaged_npz_is_an_error(tmp_path: Path, damage: str) -> None:
    folder = write_npz(tmp_path / "npz", *model("gqa", "float16"))
    convert.open(folder)
    act, message = NPZ_DAMAGE[damage]
    before = (folder / "weights.npz").read_bytes()
    after = act(before)
    assert after != before
    (folder / "weights.npz").write_bytes(after)
    with pytest.raises(CheckpointError, match=message):
        convert.open(folder)


def test_rows_of_any_range_are_those_of_the_whole(tmp_path: Path) -> None:
    args, weights = model("gqa")
    stream = convert.open(write_meta(tmp_path / "meta", args, weights, shards=4))
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.1.{part}.weight"
        whole, bits = stream.read(name), weights[name].data
        n = len(bits)
        for start, stop in ((0, 1), (5, 7), (n // 4 - 1, n // 4 + 1), (1, n - 1)):
            rows = np.asarray(memoryview(stream.rows(name, start, stop).view(mx.uint16)))
            np.testing.assert_array_equal(rows, bits[start:stop])
        assert whole.shape == bits.shape


def test_shards_are_joined_by_number_in_whatever_order_a_folder_lists_them(
    tmp_path: Path, expected: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights, shards=8)
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(real(self, pattern), reverse=True)))
    assert hashes(save(tmp_path / "out", convert.open(folder))) == expected["gqabfloat16"]


def test_record_holds_hashes_of_every_input(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights, shards=2)
    stream = convert.open(folder)
    save(tmp_path / "out", stream)
    record = json.loads((tmp_path / "out" / "run.json").read_text())["source"]
    assert record["layout"] == "meta"
    for name, digest in record["sha256"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert record["sha256"].keys() == {"params.json", "tokenizer.model"}
    files = record["weights"]["files"]
    # Recomputed here from the shards' own arrays, in our order of tensors.
    order = [meta_name(name) for name in args.tensor_shapes()]
    for rank, shard in enumerate(meta_shards(args, weights, 2)):
        whole = [n for n in order if rank == 0 or shard[n].data.ndim == 2]  # vectors are taken from the first shard
        digest = hashlib.sha256(b"".join(shard[n].data.tobytes() for n in whole)).hexdigest()
        assert files[f"consolidated.{rank:02d}.pth"]["tensors_sha256"] == digest


def test_names_agree_with_the_table_of_the_tests() -> None:
    args = tiny_args()
    table = meta_tensors(args.num_hidden_layers)
    assert list(table) == list(args.tensor_shapes())
    assert {name: meta.name for name, meta in table.items()} == {name: meta_name(name) for name in table}


# ── configuration ───────────────────────────────────────────────────────────────────────────────────────────────────


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    data |= changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def test_theta_is_never_guessed(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights)
    edit(folder / "params.json", rope_theta=...)
    with pytest.raises(ConfigError, match="rope_theta") as caught:
        convert.open(folder)
    assert "--rope-theta" in caught.value.hint
    assert convert.open(folder, rope_theta=1e6).args == args
    edit(folder / "params.json", rope_theta=1e4)
    with pytest.raises(ConfigError, match="contradicting"):
        convert.open(folder, rope_theta=1e6)


def test_variant_must_be_the_model_at_hand(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights)
    with pytest.raises(ConfigError, match="34b has hidden_size 8192, this model 96"):
        convert.open(folder, variant="34b")
    with pytest.raises(ConfigError, match="unknown variant '35b'") as caught:
        convert.open(folder, variant="35b")
    assert "34b-python" in caught.value.hint


@pytest.fixture
def small_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two released variants shrunk to test size: the tiny model stands for 70b-instruct and, at theta 1e6, for 70b."""
    args = tiny_args(n_layers=2)
    short = replace(args, rope_theta=1e4, max_position_embeddings=4096, eos_token_id=(2, 32015))
    monkeypatch.setitem(VARIANTS, "70b", replace(VARIANTS["70b"], args=args))
    monkeypatch.setitem(VARIANTS, "70b-instruct", replace(VARIANTS["70b-instruct"], args=short))


@pytest.mark.usefixtures("small_release")
def test_variant_states_what_the_files_of_70b_instruct_leave_out(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights)
    edit(folder / "params.json", rope_theta=...)
    opened = convert.open(folder, variant="70b-instruct").args
    assert (opened.rope_theta, opened.max_position_embeddings, opened.eos_token_id) == (1e4, 4096, (2, 32015))
    with pytest.raises(ConfigError, match="rope_theta"):  # every other variant's file says it
        convert.open(folder, variant="70b")
    edit(folder / "params.json", rope_theta=1e6)
    with pytest.raises(ConfigError, match=r"70b-instruct has rope_theta 10000\.0"):
        convert.open(folder, variant="70b-instruct")
    assert convert.open(folder, variant="70b").args == args


@pytest.mark.usefixtures("small_release")
def test_variant_states_the_theta_of_a_config_without_one(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_hf(tmp_path / "hf", args, weights)
    edit(folder / "config.json", rope_theta=...)
    with pytest.raises(ConfigError):
        convert.open(folder)
    assert convert.open(folder, variant="70b").args.rope_theta == 1e6


@pytest.mark.parametrize("layout", ["one safetensors file", "one bin file", "two Meta shards"])
@pytest.mark.parametrize("pieces", [271, 273])
def test_vocabulary_and_tokenizer_must_agree(tmp_path: Path, layout: str, pieces: int) -> None:
    folder = LAYOUTS[layout](tmp_path / "source", *model("gqa"))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes(pieces))
    with pytest.raises(TokenizerError, match=f"tokenizer has {pieces} pieces, the model 272") as caught:
        convert.open(folder)
    assert "tokenizer.model" in caught.value.hint


@pytest.mark.parametrize("pieces", [271, 273])
def test_a_model_with_another_tokenizer_is_not_loaded(tmp_path: Path, pieces: int) -> None:
    """With a piece less it would run, until a token comes that no text belongs to."""
    folder = write_hf(tmp_path / "hf", *model("gqa"))
    assert load_model(folder).tokenizer.vocab_size == 272
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes(pieces))
    with pytest.raises(TokenizerError, match=f"tokenizer has {pieces} pieces, the model 272"):
        load_model(folder)


def test_mlx_checkpoints_that_list_every_module_are_read(tmp_path: Path) -> None:
    # As mlx-lm wrote them from December 2024 to August 2025: every leaf module, norms and rope among them.
    args, weights = model("gqa")
    plan = Quantization(QuantArgs(4, 32), {"lm_head": None, "model.layers.1.mlp.up_proj": QuantArgs(8, 32)})
    folder = write_mlx(tmp_path / "mlx", args, weights, plan)
    plain = convert.open(folder).args
    listed: dict[str, object] = {"group_size": 32, "bits": 4, "model.embed_tokens": True, "lm_head": False}
    for i in range(args.num_hidden_layers):
        listed |= dict.fromkeys((f"model.layers.{i}.input_layernorm", f"model.layers.{i}.self_attn.rope"), False)
        listed[f"model.layers.{i}.self_attn.q_proj"] = True
    listed["model.layers.1.mlp.up_proj"] = {"group_size": 32, "bits": 8}
    edit(folder / "config.json", quantization=listed, quantization_config={**listed, "quant_method": "mlx"})
    stream = convert.open(folder)
    assert stream.args == plain
    out = save(tmp_path / "out", stream)
    assert convert.open(out).args == plain


def test_an_override_of_a_matrix_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_mlx(tmp_path / "mlx", args, weights, Quantization(QuantArgs(4, 32)))
    edit(folder / "config.json", quantization={"group_size": 32, "bits": 4, "lm_tail": {"group_size": 32, "bits": 8}})
    edit(folder / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match="lm_tail"):
        convert.open(folder)


def test_the_ends_of_generation_config_reach_the_output(tmp_path: Path) -> None:
    args, weights = model("gqa")
    folder = write_hf(tmp_path / "hf", args, weights)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    out = save(tmp_path / "out", convert.open(folder))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 9]


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite(folder: Path, shard: int, change: Callable[[Weights], Weights | None], shards: int = 4) -> None:
    """Replace one Meta shard by a changed one."""
    rank = meta_shards(*model("gqa"), shards)[shard]
    write_torch(folder / f"consolidated.{shard:02d}.pth", change(rank) or rank)


def drop(name: str) -> Callable[[Weights], None]:
    return lambda rank: rank.pop(name) and None


def put(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> Callable[[Weights], None]:
    data = np.zeros(shape, np.uint16 if dtype == "bfloat16" else dtype)
    return lambda rank: rank.__setitem__(name, Stored(dtype, data))


def poison(rank: Weights) -> None:
    rank["layers.1.attention.wk.weight"].data[0, 0] = 0x7FC0


META_DAMAGE: dict[str, tuple[Callable[[Path], object], type[CodeLlamaError], str]] = {
    "last shard missing": (lambda f: (f / "consolidated.03.pth").unlink(), CheckpointError, "has shape"),
    "middle shard missing": (lambda f: (f / "consolidated.01.pth").unlink(), CheckpointError, r"01\.pth is missing"),
    "first shard missing": (lambda f: (f / "consolidated.00.pth").unlink(), CheckpointError, r"00\.pth is missing"),
    "a stray copy": (
        lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.00 (1).pth"),
        CheckpointError,
        "not named as a shard",
    ),
    "one shard twice": (
        lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.02.pth"),
        CheckpointError,
        r"02\.pth repeats consolidated\.00\.pth",
    ),
    "a shard too many": (lambda f: write_extra(f), CheckpointError, "has shape"),
    "a tensor missing in one shard": (
        lambda f: rewrite(f, 1, drop("layers.0.feed_forward.w2.weight")),
        CheckpointError,
        "do not hold the same tensors",
    ),
    "a tensor left over in every shard": (
        lambda f: [rewrite(f, i, put("layers.2.attention.wq.weight", (24, 96))) for i in range(4)],
        CheckpointError,
        "(does|do) not belong",
    ),
    "a tensor missing in every shard": (
        lambda f: [rewrite(f, i, drop("norm.weight")) for i in range(4)],
        CheckpointError,
        r"lacks norm\.weight",
    ),
    "no output": (
        lambda f: [rewrite(f, i, drop("output.weight")) for i in range(4)],
        CheckpointError,
        r"lacks output\.weight",
    ),
    "a part of another shape": (
        lambda f: rewrite(f, 2, put("layers.0.feed_forward.w1.weight", (71, 96))),
        CheckpointError,
        r"has shape \(71, 96\), expected \(72, 96\)",
    ),
    "a part turned around": (
        lambda f: rewrite(f, 2, put("layers.0.feed_forward.w1.weight", (96, 72))),
        CheckpointError,
        "has shape",
    ),
    "a part of another dtype": (
        lambda f: rewrite(f, 2, put("layers.0.feed_forward.w1.weight", (72, 96), "float16")),
        CheckpointError,
        "is float16, elsewhere bfloat16",
    ),
    "integers": (
        lambda f: [rewrite(f, i, put("norm.weight", (96,), "int64")) for i in range(4)],
        CheckpointError,
        "stored as int64",
    ),
    "a scalar as output": (lambda f: rewrite(f, 0, put("output.weight", ())), CodeLlamaError, "."),
    "NaN": (lambda f: rewrite(f, 3, poison), NonFiniteError, r"layers\.1\.self_attn\.k_proj"),
    "params.json missing": (lambda f: (f / "params.json").unlink(), ConfigError, "does not exist"),
    "params.json no JSON": (lambda f: (f / "params.json").write_text("{"), ConfigError, "not readable JSON"),
    "params.json a list": (lambda f: (f / "params.json").write_text("[]"), ConfigError, "object"),
    "an unknown key": (lambda f: edit(f / "params.json", use_scaled_rope=True), ConfigError, "unknown keys"),
    "dim as text": (lambda f: edit(f / "params.json", dim="96"), ConfigError, "."),
    "zero heads": (lambda f: edit(f / "params.json", n_heads=0), ConfigError, "."),
    "multiple of zero": (lambda f: edit(f / "params.json", multiple_of=0), ConfigError, "wrong kind"),
    "another vocabulary": (lambda f: edit(f / "params.json", vocab_size=32000), ConfigError, "vocab_size"),
    "another width": (lambda f: edit(f / "params.json", n_kv_heads=4), CheckpointError, "has shape"),
    "more layers": (lambda f: edit(f / "params.json", n_layers=3), CheckpointError, "lacks"),
    "fewer layers": (lambda f: edit(f / "params.json", n_layers=1), CheckpointError, "(does|do) not belong"),
    "tokenizer missing": (lambda f: (f / "tokenizer.model").unlink(), TokenizerError, "."),
    "tokenizer damaged": (lambda f: (f / "tokenizer.model").write_bytes(b"\x00\xff"), TokenizerError, "."),
}


def write_extra(folder: Path) -> None:
    rank = meta_shards(*model("gqa"), 4)[3]
    rank = {name: Stored(t.dtype, t.data ^ 1 if t.dtype == "bfloat16" else t.data) for name, t in rank.items()}
    write_torch(folder / "consolidated.04.pth", rank)


@pytest.mark.parametrize("damage", META_DAMAGE)
def test_damaged_meta_folder_is_an_error_and_writes_nothing(tmp_path: Path, damage: str) -> None:
    args, weights = model("gqa")
    folder = write_meta(tmp_path / "meta", args, weights, shards=4)
    act, error, message = META_DAMAGE[damage]
    act(folder)
    with pytest.raises(error, match=message) as caught:
        save(tmp_path / "out", convert.open(folder))
    if error is not NonFiniteError and damage != "NaN":
        with pytest.raises(error, match=message):
            convert.open(folder)  # said before any weight is read
    assert str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


BIN_DAMAGE: dict[str, tuple[Callable[[Path], object], type[CodeLlamaError], str]] = {
    "a shard missing": (lambda f: (f / "pytorch_model-00002-of-00003.bin").unlink(), CheckpointError, "missing"),
    "a shard twice": (
        lambda f: shutil.copy(f / "pytorch_model-00001-of-00003.bin", f / "pytorch_model-00002-of-00003.bin"),
        CheckpointError,
        "two files hold|elsewhere",
    ),
    "a shard cut short": (
        lambda f: (f / "pytorch_model-00002-of-00003.bin").write_bytes(
            (f / "pytorch_model-00002-of-00003.bin").read_bytes()[:-100]
        ),
        CheckpointError,
        "not a whole file",
    ),
    "an unknown config key": (lambda f: edit(f / "config.json", surprise=4096), ConfigError, "unknown config"),
    "another width": (lambda f: edit(f / "config.json", intermediate_size=320), CheckpointError, "has shape"),
    "config.json missing": (lambda f: (f / "config.json").unlink(), CheckpointError, "no config"),
}


@pytest.mark.parametrize("damage", BIN_DAMAGE)
def test_damaged_bin_folder_is_an_error(tmp_path: Path, damage: str) -> None:
    args, weights = model("gqa")
    folder = write_hf(tmp_path / "hf", args, weights, kind="bin", shards=3)
    act, error, message = BIN_DAMAGE[damage]
    act(folder)
    with pytest.raises(error, match=message) as caught:
        convert.open(folder)
    assert caught.value.hint or error is ConfigError or "shape" in message or "two files" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "holds no weights"),
        ("model.gguf", "GGUF"),
        ("model.safetensors", "no config"),
        ("weights.npz", "no config"),
        ("pytorch_model.bin", "no config"),
    ],
)
def test_folder_that_is_no_release_is_named_for_what_it_is(tmp_path: Path, name: str, message: str) -> None:
    if name:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        convert.open(tmp_path)
    assert caught.value.hint


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert.open(tmp_path / "nowhere")


def test_hub_id_is_fetched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_codellama.convert import layouts

    args, weights = model("gqa")
    folder = write_hf(tmp_path / "snapshot", args, weights)
    asked: list[str] = []
    monkeypatch.setattr(layouts, "fetch", lambda repo: asked.append(repo) or folder)
    assert convert.open("codellama/CodeLlama-7b-hf").args == args
    assert asked == ["codellama/CodeLlama-7b-hf"]
