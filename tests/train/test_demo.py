"""The demo's recipe from end to end, at a size that takes a second: sources → run → checkpoint that infills."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from mlx_codellama import load
from mlx_codellama.errors import CheckpointError, CodeLlamaError, ConfigError, OutputError, OutputExistsError
from mlx_codellama.staging import alone_in
from mlx_codellama.train import demo
from mlx_codellama.train.trainer import TrainArgs

ARGS = TrainArgs(steps=4, warmup=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """80 files (one in 50 is held out by its name), enough of them different to learn 640 pieces from."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(80):
        words = [f"{'abcdefghij'[i % 10]}{'klmnopqrst'[j]}{'uvwxyzabcd'[(i * j) % 10]}e{i % 7}" for j in range(10)]
        body = "".join(f"def {w}(x):\n    return x.{w[::-1]} + {j}\n\n\n" for j, w in enumerate(words))
        (folder / f"m{i}.py").write_text(body)
    return folder


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    small = replace(demo.MODEL, hidden_size=24, num_hidden_layers=1, intermediate_size=40, vocab_size=640, head_dim=6)
    monkeypatch.setattr(demo, "MODEL", small)
    for name, value in {"TOKENS": 96, "LONGEST": 48, "STAGES": (demo.Stage(0, 20, 120), demo.Stage(2, 20, 80))}.items():
        monkeypatch.setattr(demo, name, value)


def train(sources, out, args=ARGS, **options):
    return demo.train_demo(sources, out, args, on_report=lambda report: None, **options)


def test_a_run_leaves_a_checkpoint_that_loads_and_infills(sources, tmp_path):
    trainer = train(sources, tmp_path)
    folder = demo.export(trainer, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert log[-1]["held_out_loss"] > 0
    model = load(folder)
    assert model.args.dtype == "float16"
    assert model.can_infill
    assert model.infill("def f(x):\n    return ", "\n", max_tokens=3).stats.generated_tokens > 0
    assert json.loads((folder / "run.json").read_text())["source"]["trained"]["step"] == 4


def test_an_interrupted_run_goes_on_to_the_same_weights(sources, tmp_path):
    whole = train(sources, tmp_path / "whole")
    asked = iter([False, False, True])
    stopped = train(sources, tmp_path / "parts", cancel=lambda: next(asked))
    assert stopped.step == 2
    resumed = train(sources, tmp_path / "parts")
    assert resumed.step == 4
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert bool((a == b).all()), name


def test_a_batch_is_a_function_of_seed_and_step(sources, tmp_path):
    run = demo.prepare(sources, tmp_path, ARGS)
    other = demo.prepare(sources, tmp_path, replace(ARGS, seed=1))

    def ids(run, step):
        return run.batch(run.corpus.train, step).ids.tolist()

    assert ids(run, 5) == ids(run, 5)
    assert ids(run, 5) != ids(run, 6)
    assert ids(run, 5) != ids(other, 5)


def test_it_learns_from_the_training_files_and_is_judged_on_the_others(sources, tmp_path, monkeypatch):
    read = []
    batch = demo.DemoRun.batch
    monkeypatch.setattr(demo.DemoRun, "batch", lambda self, documents, step: (
        read.append((documents is self.corpus.held_out, documents is self.corpus.train, step)),
        batch(self, documents, step),
    )[1])  # fmt: skip
    train(sources, tmp_path)
    held_out = [step for is_held_out, _, step in read if is_held_out]
    trained = [step for _, is_train, step in read if is_train]
    assert len(held_out) + len(trained) == len(read)
    assert trained == list(range(ARGS.steps))
    assert len(held_out) == len(set(held_out)) > 1
    assert min(held_out) > 10**9  # no step of a run draws them


def test_a_run_that_goes_on_adds_to_its_log(sources, tmp_path):
    train(sources, tmp_path, replace(ARGS, steps=2))
    tokenizer = (tmp_path / "tokenizer.model").stat().st_mtime_ns
    train(sources, tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert (tmp_path / "tokenizer.model").stat().st_mtime_ns == tokenizer  # a new one would change every id


def test_a_log_goes_on_where_the_state_does(sources, tmp_path):
    """A killed run has reported more than it saved, and was cut off in a line."""
    train(sources, tmp_path, replace(ARGS, steps=2))
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + "a note of mine\n" + '{"step": 3}\n' + '{"step": 4, "lo')
    train(sources, tmp_path)
    lines = log.read_text().splitlines()
    assert "\n".join(lines[:2]) == whole + "a note of mine"
    assert [json.loads(line)["step"] for line in lines[2:]] == [4]


def test_another_tokenizer_in_a_runs_folder_is_refused(sources, tmp_path, small_tokenizer):
    """Its ids would be read outside of the model's table."""
    train(sources, tmp_path, replace(ARGS, steps=1))
    before = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    with pytest.raises(CheckpointError, match="not the tokenizer that this run made"):
        train(sources, tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_model_that_the_run_did_not_make_is_not_replaced(sources, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    trainer = train(sources, run, replace(ARGS, steps=1))
    demo.export(train(sources, other, replace(ARGS, steps=1, seed=7)), other)
    (other / "model").rename(run / "model")  # also not one of another run
    before = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    with pytest.raises(OutputExistsError, match="a model that this run did not make"):
        train(sources, run)  # said before it trains
    with pytest.raises(OutputExistsError, match="a model that this run did not make"):
        demo.export(trainer, run, overwrite=True)
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == before
    shutil.rmtree(run / "model")
    demo.export(trainer, run)
    demo.export(train(sources, run), run, overwrite=True)  # its own


@pytest.mark.parametrize("name", ["state.safetensors", "log.jsonl", "tokenizer.model"])
def test_a_link_or_a_pipe_in_a_runs_folder_costs_nothing(sources, tmp_path, name):
    out, precious = tmp_path / "out", tmp_path / "thesis.tex"
    train(sources, out, replace(ARGS, steps=1))
    precious.write_text("years")
    (out / name).unlink()
    (out / name).symlink_to(precious)
    with pytest.raises(CodeLlamaError):
        train(sources, out)
    assert precious.read_text() == "years"
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises(OutputError, match="named pipe"):
        train(sources, out)


def test_two_processes_do_not_train_in_one_folder(sources, tmp_path):
    train(sources, tmp_path, replace(ARGS, steps=1))
    with alone_in(tmp_path), pytest.raises(OutputError, match="another process is writing"):
        train(sources, tmp_path)


def test_a_run_of_another_model_or_of_other_files_is_not_resumed(sources, tmp_path, monkeypatch):
    train(sources, tmp_path / "out", replace(ARGS, steps=1))
    monkeypatch.setattr(demo, "MODEL", replace(demo.MODEL, intermediate_size=56))
    with pytest.raises(CheckpointError):
        train(sources, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ConfigError):
        train(tmp_path, tmp_path / "none")


def test_a_run_does_not_go_on_with_other_files(sources, tmp_path):
    other = shutil.copytree(sources, tmp_path / "other")
    (other / "m3.py").write_text("x = 1\n" * 40)
    train(sources, tmp_path / "out", replace(ARGS, steps=1))
    with pytest.raises(CheckpointError, match="trained on other files"):
        train(other, tmp_path / "out")
