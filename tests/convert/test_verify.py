"""Verification finds every kind of damage and raises no false alarm, on weights that are made to be nasty."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.config import ModelArgs, QuantArgs, Quantization
from mlx_codellama.convert.verify import _hashes, verify
from mlx_codellama.errors import CheckpointError
from mlx_codellama.quant import RECIPES, apply, recipe
from mlx_codellama.weights import Block, Checkpoint, TensorSpec, read_header, save

ARGS = ModelArgs(
    hidden_size=192,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=320,
    vocab_size=131,
    rope_theta=1e6,
    max_position_embeddings=256,
    dtype="bfloat16",
)


class Weights:
    """A Stream: groups of every kind (normal, one-sided, constant, zero, tiny, heavy-tailed) in every matrix."""

    def __init__(self, args: ModelArgs) -> None:
        rng = np.random.default_rng(11)
        self.args, self.files, self.record = args, dict[str, Path](), dict[str, Any]()
        self.specs = [TensorSpec(name, shape, args.dtype) for name, shape in args.tensor_shapes().items()]
        self.arrays: dict[str, mx.array] = {}
        for spec in self.specs:
            w = 0.05 * rng.standard_normal(spec.shape)
            if len(spec.shape) == 1:
                w += 1
            else:
                w[1], w[2], w[3], w[4] = np.abs(w[1]), -np.abs(w[2]), 0.25, 0
                w[5], w[6] = w[5] * 1e-7, 0.05 * rng.standard_cauchy(w[6].shape).clip(-1000, 1000)
                w[7] = 0.5 + 1e-5 * w[7]
                w[8, ::32] = 5 / 16  # mxfp4 can do no worse
                w[9] *= 2e-4  # float16 holds scales of such groups as subnormals
            self.arrays[spec.name] = mx.array(w.astype(np.float32)).astype(getattr(mx, args.dtype))
        self.total_bytes = self.done_bytes = 0

    def blocks(self) -> Iterator[Block]:
        for name, array in self.arrays.items():
            yield Block(name, 0, array)


@pytest.fixture
def pair(tmp_path: Path):
    """Makes (source checkpoint, output folder) of a plan and a dtype."""

    def make(plan: str | Quantization | None = None, dtype: str = "bfloat16", args: ModelArgs = ARGS):
        weights = Weights(replace(args, dtype=dtype))
        if isinstance(plan, str):
            plan = recipe(plan, args)
        save(tmp_path / "source", weights)
        save(tmp_path / "out", apply(plan, weights))
        return Checkpoint.open(tmp_path / "source"), tmp_path / "out"

    return make


def damage(folder: Path, name: str, change) -> None:
    """Rewrite one tensor's bytes in place: change(raw uint8 array) alters it."""
    path = folder / "model.safetensors"
    info = read_header(path)[name]
    raw = np.memmap(path, np.uint8, "r+", offset=info.offset, shape=(info.nbytes,))
    change(raw)
    raw.flush()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", [None, *RECIPES])
def test_a_good_output_is_good(pair, name: str | None, dtype: str) -> None:
    source, out = pair(name, dtype)
    report = verify(source, out)
    assert report.problems == []
    assert [t.name for t in report.tensors] == list(ARGS.tensor_shapes())
    if name is None:
        assert all(t.relative_rms == t.max_abs == 0 for t in report.tensors)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_alarm_at_any_width_and_group(pair, bits: int, group_size: int) -> None:
    source, out = pair(Quantization(QuantArgs(bits, group_size)))
    report = verify(source, out)
    assert report.problems == []
    assert report.bits_per_weight > bits


DAMAGE = {
    "a tensor of zeros": ("model.layers.1.mlp.up_proj.weight", lambda raw: raw.fill(0)),
    "rows in another order": (
        "model.layers.0.self_attn.k_proj.weight",
        lambda raw: raw.__setitem__(slice(None), raw.reshape(64, -1)[::-1].reshape(-1).copy()),
    ),
    "one scale": ("model.layers.0.mlp.gate_proj.scales", lambda raw: raw.__setitem__(41, raw[41] ^ 0x10)),
    "one bias": ("model.layers.0.self_attn.q_proj.biases", lambda raw: raw.__setitem__(41, raw[41] ^ 0x80)),
    "one code, by two steps": ("lm_head.weight", lambda raw: raw.__setitem__(96 * 100 + 5, raw[96 * 100 + 5] ^ 0x02)),
    "one bit of a norm": ("model.norm.weight", lambda raw: raw.__setitem__(100, raw[100] ^ 1)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_to_one_tensor_is_found_and_named(pair, what: str) -> None:
    name, change = DAMAGE[what]
    source, out = pair("q4")
    damage(out, name, change)
    report = verify(source, out)
    assert not report.ok
    wrong = [t.name for t in report.tensors if not t.ok]
    assert wrong == [name.replace("scales", "weight").replace("biases", "weight")]
    with pytest.raises(CheckpointError, match=f"{wrong[0]} differs from the source") as caught:
        report.raise_if_wrong()
    assert "convert again" in caught.value.hint


def test_every_code_that_is_two_steps_off_is_counted(pair) -> None:
    source, out = pair("q4")

    def two_steps(raw) -> None:
        raw[96 * 100 : 96 * 101] ^= 0x22  # row 100: two codes a byte, rounding alone is half a step

    damage(out, "lm_head.weight", two_steps)
    report = verify(source, out)
    assert [t.n_beyond for t in report.tensors if not t.ok] == [192]


def test_one_wrong_bit_of_an_unquantised_output_is_found(pair) -> None:
    source, out = pair(None)
    damage(out, "model.layers.1.self_attn.v_proj.weight", lambda raw: raw.__setitem__(4001, raw[4001] ^ 1))
    report = verify(source, out)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.layers.1.self_attn.v_proj.weight", 1)]
    assert len(report.problems) == 1


def test_nan_in_a_scale_is_found(pair) -> None:
    source, out = pair("q8", "float32")

    def nan(raw) -> None:
        raw[:4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)

    damage(out, "model.layers.0.mlp.down_proj.scales", nan)
    with pytest.raises(CheckpointError, match="NaN"):
        verify(source, out)


def test_nan_that_no_reader_sees_is_found_too(pair) -> None:
    source, out = pair("mxfp4")
    damage(out, "model.layers.0.mlp.down_proj.scales", lambda raw: raw.__setitem__(3, 255))  # a byte that means NaN
    with np.errstate(invalid="ignore"):
        report = verify(source, out)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.layers.0.mlp.down_proj.weight", 32)]


def strict(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity, which Python's reader would take, are errors."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("side", ["output", "source"])
def test_nan_fails_and_run_json_stays_json(pair, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair("mxfp4", "float32")
    if side == "output":
        damage(out, "lm_head.scales", lambda raw: raw.reshape(131, -1)[16:32].fill(255))  # a byte that means NaN
    else:
        rows = source.rows
        monkeypatch.setattr(source, "rows", lambda n, a, b: rows(n, a, b) * (mx.nan if n == "lm_head.weight" else 1))
    report = verify(source, out)
    assert [t.name for t in report.tensors if not t.ok] == ["lm_head.weight"]
    written = strict((out / "run.json").read_text())["verify"]
    assert not written["ok"]
    assert written["tensors"]["lm_head.weight"]["max_abs"] is None
    with pytest.raises(CheckpointError, match="lm_head"):
        report.raise_if_wrong()


def test_tied_embeddings_are_measured_once(pair) -> None:
    source, out = pair(None, args=replace(ARGS, tie_word_embeddings=True))
    damage(out, "model.embed_tokens.weight", lambda raw: raw.__setitem__(4001, raw[4001] ^ 1))
    report = verify(source, out)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.embed_tokens.weight", 1)]


def test_the_report_is_kept_in_run_json_good_or_bad(pair) -> None:
    source, out = pair("q4")
    before = json.loads((out / "run.json").read_text())
    verify(source, out)
    after = json.loads((out / "run.json").read_text())
    assert after.pop("verify")["ok"] is True
    assert after == before
    damage(out, "lm_head.weight", lambda raw: raw.fill(0))
    verify(source, out, record=False)
    assert json.loads((out / "run.json").read_text())["verify"]["ok"] is True
    report = verify(source, out)
    kept = json.loads((out / "run.json").read_text())["verify"]
    assert kept == json.loads(json.dumps(report.to_dict()))
    assert kept["tensors"]["lm_head.weight"]["n_beyond"] > 0
    data = (out / "model.safetensors").read_bytes()
    assert kept["files"] == {"model.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def test_the_summary_has_one_line_per_kind_of_tensor(pair) -> None:
    source, out = pair("q4")
    damage(out, "model.layers.1.mlp.up_proj.weight", lambda raw: raw.fill(0))
    rows = verify(source, out).summary()
    assert len(rows) == 12  # embeddings, nine in each layer, norm, head
    up = next(row for row in rows if "up_proj" in row[0])
    assert up[:3] == ("model.layers.*.mlp.up_proj.weight × 2", "4-bit/64", "4.50")
    assert int(up[5]) > 1000
    assert [row[5] for row in rows if row is not up] == ["0"] * 11


def test_a_copy_of_a_quantised_source_must_be_equal(pair, tmp_path: Path) -> None:
    _, out = pair("q4")
    quantised = Checkpoint.open(out)
    save(tmp_path / "copy", quantised)
    assert verify(quantised, tmp_path / "copy").ok
    damage(tmp_path / "copy", "lm_head.weight", lambda raw: raw.__setitem__(7, raw[7] ^ 1))
    assert [t.n_beyond for t in verify(quantised, tmp_path / "copy").tensors if not t.ok] == [1]


def test_another_model_is_not_compared(pair, tmp_path: Path) -> None:
    source, _ = pair()
    save(tmp_path / "other", Weights(replace(ARGS, rope_theta=1e4)))
    with pytest.raises(CheckpointError, match=r"another model: rope_theta is 10000\.0"):
        verify(source, tmp_path / "other")


def test_small_blocks_change_nothing(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair("q4")
    whole = verify(source, out)
    monkeypatch.setattr("mlx_codellama.convert.verify.BLOCK_BYTES", 11 * 192 * 4)
    read: list[str] = []
    rows = source.rows
    monkeypatch.setattr(source, "rows", lambda name, a, b: (read.append(name), rows(name, a, b))[1])
    pieces = verify(source, out)
    for a, b in zip(whole.tensors, pieces.tensors, strict=True):
        assert (a.n_beyond, a.max_abs) == (b.n_beyond, b.max_abs)
        assert a.relative_rms == pytest.approx(b.relative_rms, rel=1e-5)
    assert read.count("lm_head.weight") == 12  # blocks of 11 rows


def test_the_report_says_nothing_that_it_does_not_judge(pair) -> None:
    """KL and agreement on a few tokens decided nothing and stood beside "good": `quantize --report` measures those."""
    source, out = pair("q2")
    report = verify(source, out)
    assert report.ok
    assert set(report.to_dict()) == {"ok", "problems", "bits_per_weight", "elapsed_s", "files", "tensors"}


def test_progress_ends_at_the_total(pair) -> None:
    source, out = pair("q4")
    seen: list[tuple[int, int]] = []
    verify(source, out, progress=lambda p: seen.append((p.done_bytes, p.total_bytes)))
    sizes = [4 * mx.array(shape).prod().item() for shape in ARGS.tensor_shapes().values()]
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    # Every tensor here is one block; then the output's files are hashed, which takes its time at full size.
    assert [done for done, _ in seen] == [*np.cumsum(sizes).tolist(), sum(sizes) + files]
    assert {total for _, total in seen} == {sum(sizes) + files}


def test_hashes_are_of_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_codellama.convert.verify.HASH_BYTES", 1000)
    one, other, seen = tmp_path / "a", tmp_path / "b", []
    one.write_bytes(bytes(range(250)) * 10)
    other.write_bytes(b"x" * 7)
    found = _hashes([one, other], lambda done, name: seen.append((done, name)))
    assert [found[path.name]["sha256"] for path in (one, other)] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, other)
    ]
    assert seen == [(1000, "a"), (2000, "a"), (2500, "a"), (2507, "b")]


def test_a_comparison_that_breaks_off_leaves_no_thread(pair) -> None:
    source, out = pair("q4")
    before = threading.active_count()

    def press(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(source, out, progress=press)
    assert threading.active_count() == before
    assert "verify" not in json.loads((out / "run.json").read_text())
