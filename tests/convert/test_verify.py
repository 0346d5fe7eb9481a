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
from oracles.checkpoints import random_weights, tiny_args, write_hf

from mlx_codellama import convert
from mlx_codellama.config import ModelArgs, QuantArgs, Quantization
from mlx_codellama.convert.verify import _hashes, verify
from mlx_codellama.errors import CheckpointError
from mlx_codellama.model import Model
from mlx_codellama.quant import RECIPES, apply, recipe
from mlx_codellama.rotary import RopeScaling
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
IDS = [1, 77, 130, 5, 5, 0, 42]


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
    report = verify(source, out, ids=IDS)
    assert report.problems == []
    assert [t.name for t in report.tensors] == list(ARGS.tensor_shapes())
    assert report.logits is not None
    if name is None:
        assert (report.logits.relative_error, report.logits.mean_kl, report.logits.top1_agreement) == (0, 0, 1)
        assert all(t.relative_rms == t.max_abs == 0 for t in report.tensors)


@pytest.fixture
def random_pair(tmp_path: Path):
    """Makes (source checkpoint, output folder) of a random model in Hugging Face's layout."""

    def make(plan: str, group_size: int | None = None, *, seed: int = 0, **dimensions: Any) -> tuple[Checkpoint, Path]:
        args = tiny_args(**dimensions)
        write_hf(tmp_path / "source", args, random_weights(args, seed=seed))
        source = convert.open(tmp_path / "source")
        save(tmp_path / "out", apply(recipe(plan, args, group_size=group_size), source))
        return source, tmp_path / "out"

    return make


@pytest.mark.parametrize("seed", [0, 1])
def test_four_bits_under_a_wide_head_pass_with_a_margin(random_pair, seed: int) -> None:
    """Most weights are the 8-bit table and head: their error says nothing about what 4-bit layers do to the logits."""
    report = verify(*random_pair("mixed", seed=seed, vocab_size=32016))
    assert report.problems == []
    assert report.logits is not None
    assert report.logits.limit is not None
    assert 1.5 < report.logits.limit / report.logits.relative_error < 6


@pytest.mark.parametrize(("plan", "group_size"), [*((name, None) for name in RECIPES), ("q4", 32), ("q3", 32)])
@pytest.mark.parametrize(("n_layers", "gqa"), [(2, False), (17, True)])
def test_good_outputs_pass_with_a_margin(random_pair, plan: str, group_size: int | None, n_layers: int, gqa: bool):
    """The limit is 3 times what a twin is off by; a good output was off by 0.7 to 1.1 of that. None says nothing."""
    report = verify(*random_pair(plan, group_size, n_layers=n_layers, gqa=gqa, seed=n_layers))
    assert report.problems == []
    assert report.logits is not None
    assert (report.logits.limit or 9) > 2 * report.logits.relative_error
    assert report.logits.limit is not None or report.logits.relative_error > 0.2  # only where errors are that large


@pytest.mark.parametrize("fault", ["swapped", "permuted", "corrupted"])
def test_the_logits_alone_show_a_fault_that_the_weights_were_not_compared_for(random_pair, fault: str, monkeypatch):
    source, out = random_pair("q8", n_layers=5)
    rows, path = source.rows, "model.layers.3"

    def faulty(name: str, start: int, stop: int) -> mx.array:
        swapped = {f"{path}.mlp.gate_proj.weight": "up_proj", f"{path}.mlp.up_proj.weight": "gate_proj"}
        if fault == "swapped" and name in swapped:
            name = f"{path}.mlp.{swapped[name]}.weight"
        array = rows(name, start, stop)
        if fault == "permuted" and name == f"{path}.self_attn.v_proj.weight":
            return array.reshape(-1, 2, array.shape[0] // 2, array.shape[1])[:, ::-1].reshape(array.shape)
        if fault == "corrupted" and name == f"{path}.mlp.down_proj.weight":
            return mx.concatenate([mx.zeros_like(array[:32]), array[32:]])
        return array

    monkeypatch.setattr(source, "rows", faulty)
    report = verify(source, out)
    assert report.logits is not None
    assert report.logits.limit is not None
    assert report.logits.relative_error > 1.5 * report.logits.limit  # errors beyond the bound do not widen the limit
    assert "the logits are off" in report.problems[-1]


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_alarm_at_any_width_and_group(pair, bits: int, group_size: int) -> None:
    source, out = pair(Quantization(QuantArgs(bits, group_size)))
    report = verify(source, out, logits=False)
    assert report.problems == []
    assert report.logits is None
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
    report = verify(source, out, ids=IDS)
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
    report = verify(source, out, logits=False)
    assert [t.n_beyond for t in report.tensors if not t.ok] == [192]


def test_one_wrong_bit_of_an_unquantised_output_is_found(pair) -> None:
    source, out = pair(None)
    damage(out, "model.layers.1.self_attn.v_proj.weight", lambda raw: raw.__setitem__(4001, raw[4001] ^ 1))
    report = verify(source, out, ids=IDS)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.layers.1.self_attn.v_proj.weight", 1)]
    assert report.logits is not None
    assert not report.logits.ok  # unquantised logits must be identical
    assert len(report.problems) == 2


def test_nan_in_a_scale_is_found(pair) -> None:
    source, out = pair("q8", "float32")

    def nan(raw) -> None:
        raw[:4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)

    damage(out, "model.layers.0.mlp.down_proj.scales", nan)
    with pytest.raises(CheckpointError, match="NaN"):
        verify(source, out, ids=IDS)


def test_nan_that_no_reader_sees_is_found_too(pair) -> None:
    source, out = pair("mxfp4")
    damage(out, "model.layers.0.mlp.down_proj.scales", lambda raw: raw.__setitem__(3, 255))  # a byte that means NaN
    with np.errstate(invalid="ignore"):
        report = verify(source, out, logits=False)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.layers.0.mlp.down_proj.weight", 32)]


def strict(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity, which Python's reader would take, are errors."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("plan", ["mxfp4", "q2"])
def test_nan_fails_and_run_json_stays_json(pair, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At two bits no limit of the logits' error applies; and of the blocks that are left out nothing else is known."""
    source, out = pair(plan, "float32")
    monkeypatch.setattr("mlx_codellama.convert.side_by_side.BLOCK_BYTES", 16 * 192 * 4)
    if plan == "mxfp4":
        damage(out, "lm_head.scales", lambda raw: raw.reshape(131, -1)[16:32].fill(255))  # a byte that means NaN
    else:
        rows = source.rows
        bad = "lm_head.weight"
        monkeypatch.setattr(source, "rows", lambda n, a, b: rows(n, a, b) * (mx.nan if (n, a) == (bad, 16) else 1))
    for every, n_problems in ((1, 2), (2, 1)):
        report = verify(source, out, ids=IDS, every=every)
        assert not report.ok
        assert report.logits is not None
        assert not report.logits.ok
        assert len(report.problems) == n_problems
        assert "logits are not finite" in report.problems[-1]
        written = strict((out / "run.json").read_text())["verify"]
        assert not written["ok"]
        assert written["logits"]["relative_error"] is None
        (wrong,) = [t for t in written["tensors"].values() if t["max_abs"] is None] or [None]
        assert (wrong is not None) == (every == 1)
    with pytest.raises(CheckpointError):
        report.raise_if_wrong()


def test_tied_embeddings_are_used_twice_and_measured_once(pair) -> None:
    source, out = pair(None, args=replace(ARGS, tie_word_embeddings=True))
    damage(out, "model.embed_tokens.weight", lambda raw: raw.__setitem__(4001, raw[4001] ^ 1))
    report = verify(source, out, ids=IDS)
    assert [(t.name, t.n_beyond) for t in report.tensors if not t.ok] == [("model.embed_tokens.weight", 1)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", [None, "q4"])
@pytest.mark.parametrize("scaling", [None, "own ntk:8", "linear:3", "yarn:4"])
def test_the_streamed_logits_are_those_of_the_models(pair, plan: str | None, tied: bool, scaling: str | None) -> None:
    """Also with the rotary scaling that a config states, or that one asks for: each moves logits by far more."""
    args = replace(ARGS, tie_word_embeddings=tied, rope_theta=1e4)
    asked = None if scaling is None else RopeScaling.parse(scaling.removeprefix("own "))
    if scaling and scaling.startswith("own "):
        assert asked is not None
        args, asked = args.with_scaling(asked), None
    source, out = pair(plan, "float32", args)
    report = verify(source, out, ids=IDS, scaling=asked)
    logits = []
    for checkpoint in (source, Checkpoint.open(out)):
        model = Model(checkpoint.args if asked is None else checkpoint.args.with_scaling(asked))
        model.load_weights([(spec.name, checkpoint.read(spec.name)) for spec in checkpoint.specs])
        logits.append(np.array(model(mx.array([IDS])))[0].astype(np.float64))
    truth, got = logits
    assert report.logits is not None
    assert report.logits.max_abs == pytest.approx(np.abs(got - truth).max(), abs=2e-4)
    assert report.logits.top1_agreement == (truth.argmax(-1) == got.argmax(-1)).mean()
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    assert report.logits.mean_kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=2e-3, abs=1e-6)
    if plan:
        assert report.logits.mean_kl > 1e-5  # the comparison above is not of zeros


def test_the_report_is_kept_in_run_json_good_or_bad(pair) -> None:
    source, out = pair("q4")
    before = json.loads((out / "run.json").read_text())
    verify(source, out, ids=IDS)
    after = json.loads((out / "run.json").read_text())
    assert after.pop("verify")["ok"] is True
    assert after == before
    damage(out, "lm_head.weight", lambda raw: raw.fill(0))
    verify(source, out, ids=IDS, record=False)
    assert json.loads((out / "run.json").read_text())["verify"]["ok"] is True
    report = verify(source, out, ids=IDS)
    kept = json.loads((out / "run.json").read_text())["verify"]
    assert kept == json.loads(json.dumps(report.to_dict()))
    assert kept["tensors"]["lm_head.weight"]["n_beyond"] > 0
    data = (out / "model.safetensors").read_bytes()
    assert kept["files"] == {"model.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def test_the_summary_has_one_line_per_kind_of_tensor(pair) -> None:
    source, out = pair("q4")
    damage(out, "model.layers.1.mlp.up_proj.weight", lambda raw: raw.fill(0))
    rows = verify(source, out, logits=False).summary()
    assert len(rows) == 12  # embeddings, nine in each layer, norm, head
    up = next(row for row in rows if "up_proj" in row[0])
    assert up[:3] == ("model.layers.*.mlp.up_proj.weight × 2", "4-bit/64", "4.50")
    assert int(up[5]) > 1000
    assert [row[5] for row in rows if row is not up] == ["0"] * 11


def test_a_copy_of_a_quantised_source_must_be_equal(pair, tmp_path: Path) -> None:
    _, out = pair("q4")
    quantised = Checkpoint.open(out)
    save(tmp_path / "copy", quantised)
    assert verify(quantised, tmp_path / "copy", ids=IDS).ok
    damage(tmp_path / "copy", "lm_head.weight", lambda raw: raw.__setitem__(7, raw[7] ^ 1))
    assert [t.n_beyond for t in verify(quantised, tmp_path / "copy", ids=IDS).tensors if not t.ok] == [1]


def test_another_model_is_not_compared(pair, tmp_path: Path) -> None:
    source, _ = pair()
    save(tmp_path / "other", Weights(replace(ARGS, rope_theta=1e4)))
    with pytest.raises(CheckpointError, match=r"another model: rope_theta is 10000\.0"):
        verify(source, tmp_path / "other")


def test_ids_outside_the_vocabulary_are_refused(pair) -> None:
    source, out = pair()
    with pytest.raises(CheckpointError, match="between 0 and 130"):
        verify(source, out, ids=[131])


def test_small_blocks_change_nothing_and_every_second_reads_half(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair("q4")
    whole = verify(source, out, ids=IDS)
    monkeypatch.setattr("mlx_codellama.convert.side_by_side.BLOCK_BYTES", 11 * 192 * 4)
    pieces = verify(source, out, ids=IDS)
    for a, b in zip(whole.tensors, pieces.tensors, strict=True):
        assert (a.n_beyond, a.max_abs) == (b.n_beyond, b.max_abs)
        assert a.relative_rms == pytest.approx(b.relative_rms, rel=1e-5)
    assert pieces.logits is not None
    assert whole.logits is not None
    assert pieces.logits.mean_kl == pytest.approx(whole.logits.mean_kl, rel=1e-3)
    read: list[str] = []
    rows = source.rows
    monkeypatch.setattr(source, "rows", lambda name, a, b: (read.append(name), rows(name, a, b))[1])
    verify(source, out, logits=False, every=2)
    assert read.count("lm_head.weight") == 6  # of 12 blocks of 11 rows


def test_progress_ends_at_the_total(pair) -> None:
    source, out = pair("q4")
    seen: list[tuple[int, int]] = []
    verify(source, out, ids=IDS, progress=lambda p: seen.append((p.done_bytes, p.total_bytes)))
    sizes = [4 * mx.array(shape).prod().item() for shape in ARGS.tensor_shapes().values()]
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    # Every tensor here is one block; then the output's files are hashed, which takes its time at full size.
    assert [done for done, _ in seen] == [*np.cumsum(sizes).tolist(), sum(sizes) + files]
    assert {total for _, total in seen} == {sum(sizes) + files}


def test_what_every_second_block_leaves_out_the_logits_notice(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pair("q8")
    monkeypatch.setattr("mlx_codellama.convert.side_by_side.BLOCK_BYTES", 16 * 192 * 4)
    assert verify(source, out, ids=IDS, every=2).problems == []

    def second_block(raw) -> None:
        raw.reshape(131, -1)[16:32] = 0

    damage(out, "lm_head.weight", second_block)
    report = verify(source, out, ids=IDS, every=2)
    assert all(t.ok for t in report.tensors)
    assert [problem[:10] for problem in report.problems] == ["the logits"]
    assert report.logits is not None
    assert report.logits.limit is not None
    assert report.logits.limit < report.logits.relative_error


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
        verify(source, out, ids=IDS, progress=press)
    assert threading.active_count() == before
    assert "verify" not in json.loads((out / "run.json").read_text())
