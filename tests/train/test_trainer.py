"""Steps, schedule, resuming: a run that was stopped equals one that was not."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten

from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import CheckpointError, TokenizerError
from mlx_codellama.kernels import kv_attention
from mlx_codellama.kernels.cross_entropy import IGNORE
from mlx_codellama.linear import Delta
from mlx_codellama.loader import random_model
from mlx_codellama.memory import with_bits
from mlx_codellama.train.export import ModelStream
from mlx_codellama.train.packing import Batch, pack
from mlx_codellama.train.trainer import TrainArgs, Trainer, evaluate, initialise, mean_loss, run
from mlx_codellama.weights import Checkpoint, save, write_state

MODEL = ModelArgs(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=40,
    vocab_size=31,
    rope_theta=1e4,
    max_position_embeddings=64,
    head_dim=8,
    dtype="float32",
)
ARGS = TrainArgs(steps=8, peak_lr=1e-2, warmup=2)


def batch(step):
    """Counting upwards modulo 29: easily learned, and different at every step."""
    start = np.random.default_rng(step).integers(0, 29, size=(3, 1))
    rows = (start + np.arange(14)) % 29
    targets = rows[:, 1:].astype(np.int32)
    targets[0, 5] = IGNORE
    return Batch(rows[:, :-1].astype(np.int32).reshape(-1), targets.reshape(-1), (13, 13, 13))


def trainer(args=ARGS):
    return Trainer(initialise(MODEL, seed=7), args, batch)


def parameters(t):
    return {k: np.asarray(v) for k, v in t.model.named_parameters()}


def test_the_loss_falls_and_a_wrong_target_would_not():
    t = trainer(replace(ARGS, steps=60))
    losses = [t.train_step()[0] for _ in range(60)]
    assert losses[0] == pytest.approx(np.log(31), abs=0.15)  # an untrained model knows nothing
    assert losses[-1] < 0.3 * losses[0]


def test_the_gradient_is_that_of_finite_differences():
    t = trainer()
    _, gradients = t._gradient(t.model, batch(0))
    for layer, name in ((0, "q_proj"), (1, "k_proj"), (1, "v_proj")):
        linear = t.model.model.layers[layer].self_attn[name]
        gradient = np.asarray(gradients["model"]["layers"][layer]["self_attn"][name]["weight"])
        direction = np.sign(gradient)
        weight, h = linear.weight, 1e-3
        sides = []
        for sign in (1, -1):
            linear.weight = weight + sign * h * mx.array(direction)
            sides.append(float(mean_loss(t.model, batch(0))))
        linear.weight = weight
        # the slope along sign(g) is |g|₁; float32 losses near 3.4 differ by 2.4e-7 per ulp, so 1e-3 relative is safe
        assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(np.abs(gradient).sum(), rel=2e-2, abs=5e-4)


@pytest.mark.parametrize("path", ["native", "mlx"])
def test_packed_documents_do_not_see_one_another(path, monkeypatch):
    """Loss and gradients of documents in one row are those of each alone; of one that runs on they would not be."""
    if path == "mlx":
        monkeypatch.setattr(kv_attention, "native", lambda: None)
    model, rng = initialise(MODEL, seed=3), np.random.default_rng(4)
    documents = [rng.integers(0, 31, size=n).tolist() for n in (9, 6, 2)]
    both = pack(documents, n_tokens=14, longest=14)
    assert both.lengths == (8, 5, 1)
    gradient = value_and_grad(model, mean_loss)
    total, gradients = gradient(model, both)
    parts = [gradient(model, pack([d], n_tokens=len(d) - 1, longest=14)) for d in documents]
    shares = [n / 14 for n in both.lengths]
    expected = sum(share * float(loss) for share, (loss, _) in zip(shares, parts, strict=True))
    assert float(total) == pytest.approx(expected, abs=2e-5)
    assert abs(float(mean_loss(model, both._replace(lengths=(14,)))) - expected) > 1e-4
    alone = [dict(tree_flatten(tree)) for _, tree in parts]
    for name, found in tree_flatten(gradients):
        want = sum(share * tree[name] for share, tree in zip(shares, alone, strict=True))
        np.testing.assert_allclose(np.array(found), np.array(want), atol=2e-6, err_msg=name)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    whole = trainer()
    for _ in range(8):
        whole.train_step()
    first = trainer()
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "state.safetensors")
    second = trainer()
    second.resume(tmp_path / "state.safetensors")
    assert (second.step, second.tokens) == (3, 3 * 38)
    for _ in range(5):
        second.train_step()
    for name, value in parameters(whole).items():
        np.testing.assert_array_equal(parameters(second)[name], value, err_msg=name)


def adapted(seed=2):
    """A delta on one matrix of a frozen 4-bit model, 96 wide, as a tuner makes it."""
    args = replace(MODEL, hidden_size=96, intermediate_size=320, num_hidden_layers=8, head_dim=32, vocab_size=96)
    model = random_model(with_bits(args, 4, 32), seed=seed)
    a, b = mx.random.normal((3, 96), key=mx.random.key(0)), mx.zeros((320, 3))
    model.model.layers[3].mlp.up_proj.delta = Delta(a, b, 2.0)
    model.model.layers[3].mlp.up_proj.delta.unfreeze()
    return Trainer(model, ARGS, batch)


def test_the_state_of_a_frozen_base_holds_what_is_trained_and_a_fingerprint(tmp_path):
    whole, first, path = adapted(), adapted(), tmp_path / "state.safetensors"
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    first.save(path)
    trained = 3 * (96 + 320) * 4  # bytes; and two moments of AdamW
    assert 3 * trained < path.stat().st_size < 3 * trained + 4096 < 200_000
    second = adapted()
    second.resume(path)
    for _ in range(2):
        second.train_step()
    for name, value in parameters(whole).items():
        np.testing.assert_array_equal(parameters(second)[name], value, err_msg=name)
    with pytest.raises(CheckpointError, match="on top of another model"):
        adapted(seed=3).resume(path)
    with pytest.raises(CheckpointError, match="parameters of another model"):
        trainer().resume(path)


def test_a_run_can_be_extended_but_not_otherwise_changed(tmp_path):
    t = trainer()
    t.train_step()
    t.save(tmp_path / "state.safetensors")
    longer = trainer(replace(ARGS, steps=20, decay=5))
    longer.resume(tmp_path / "state.safetensors")
    assert longer.step == 1
    with pytest.raises(CheckpointError, match="peak_lr"):
        trainer(replace(ARGS, peak_lr=0.5)).resume(tmp_path / "state.safetensors")


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    t = Trainer(initialise(MODEL, seed=3), ARGS, batch, data="one")
    t.save(tmp_path / "state.safetensors")
    Trainer(initialise(MODEL, seed=3), ARGS, batch, data="one").resume(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="other files"):
        Trainer(initialise(MODEL, seed=3), ARGS, batch, data="two").resume(tmp_path / "state.safetensors")


def test_the_rate_rises_stays_and_falls():
    args = TrainArgs(steps=100, peak_lr=3.0, warmup=10, decay=50)
    assert args.lr(0) == pytest.approx(0.3)
    assert args.lr(9) == args.lr(30) == args.lr(50) == 3.0
    assert args.lr(75) == pytest.approx(1.5)
    assert args.lr(99) == pytest.approx(0.1)
    assert TrainArgs(steps=100).lr(99) == TrainArgs(steps=100).peak_lr


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing():
    t = trainer()
    t.model.model.norm.weight = mx.full((24,), float("nan"))
    before = parameters(t)["lm_head.weight"]
    with pytest.raises(FloatingPointError, match="step 0"):
        t.train_step()
    np.testing.assert_array_equal(parameters(t)["lm_head.weight"], before)


def test_run_reports_evaluates_saves_and_can_be_cancelled(tmp_path):
    t, reports = trainer(replace(ARGS, steps=100)), []
    run(
        t,
        held_out=[batch(1000)],
        state_path=tmp_path / "state.safetensors",
        on_report=reports.append,
        report_every=3,
        evaluate_every=5,
        cancel=lambda: t.step == 7,
    )
    assert [(r.step, r.held_out_loss is not None) for r in reports] == [(3, False), (5, True), (6, False)]
    again = trainer(replace(ARGS, steps=100))
    again.resume(tmp_path / "state.safetensors")
    assert again.step == 7


def test_an_exported_model_is_a_checkpoint_with_the_same_weights(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"copied as it is")
    model = initialise(MODEL, seed=1)
    files = {"tokenizer.model": tmp_path / "tokenizer.model"}
    save(tmp_path / "out", ModelStream(model, dtype="float16", files=files, record={"trained": {"step": 5}}))
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert replace(checkpoint.args, dtype="float32") == MODEL
    for name, value in model.named_parameters():
        assert mx.array_equal(checkpoint.read(name), value.astype(mx.float16)), name
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"copied as it is"
    assert "trained" in json.dumps(json.loads((tmp_path / "out" / "run.json").read_text()))


@pytest.mark.parametrize("wrong", [31, 1 << 30, -7])
def test_ids_that_the_model_does_not_have_are_refused_before_a_step(wrong):
    for field in ("ids", "targets"):
        good = batch(0)
        array = getattr(good, field).copy()
        array[3] = wrong
        bad = good._replace(**{field: array})
        t = Trainer(initialise(MODEL, seed=7), ARGS, lambda step, bad=bad: bad)
        with pytest.raises(TokenizerError, match=rf"token id {wrong}, the model a vocabulary of 31"):
            t.train_step()
        with pytest.raises(TokenizerError, match="vocabulary of 31"):
            evaluate(t.model, [good, bad])
        assert t.step == 0


@pytest.mark.parametrize("about", ["{", "[]", "{}", '{"args": 1, "step": 1, "tokens": 1}', '{"args": {}, "step": "1"}'])
def test_a_state_that_does_not_say_what_run_it_is_of_is_refused(tmp_path, about: str) -> None:
    write_state(tmp_path / "state.safetensors", {"model.x": mx.zeros(1)}, {"train": about})
    with pytest.raises(CheckpointError, match="does not say what run"):
        trainer().resume(tmp_path / "state.safetensors")
