"""The bundled demo checkpoint: small, 4-bit, free of its maker's paths, and able to do what its card says."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

from mlx_codellama import load
from mlx_codellama.hole import hole_marked
from mlx_codellama.model import Model
from mlx_codellama.prompts import infill_ids
from mlx_codellama.weights import Checkpoint

DEMO = ROOT / "mlx_codellama" / "demo"


@pytest.fixture(scope="module")
def model():
    return load()


def test_it_is_four_bit_and_at_most_twelve_megabytes():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 12_000_000
    args = Checkpoint.open(DEMO).args
    assert args.quantization is not None
    assert args.quantization.default.bits == 4
    assert 5_000_000 <= args.n_parameters <= 15_000_000


def test_nothing_in_it_names_a_folder_of_the_machine_that_made_it():
    run = (DEMO / "run.json").read_text()
    assert json.loads(run)["source"]
    assert '"/' not in run


def test_it_closes_a_bracket_and_ends_by_itself(model):
    """40 tokens would be many times too many, so an end is the model's own EOT."""
    answer = model.infill("def mean(values):\n    return sum(values) / len(", "\n", order="spm", max_tokens=40)
    assert (answer.text, answer.finish_reason) == ("values)", "stop")


def test_it_fills_the_hole_of_the_example_and_does_not_write_again_what_follows(model):
    """What `make demo` shows: the same place with `(item)` behind it and with nothing."""
    hole = hole_marked((ROOT / "examples" / "stack.py").read_text(), "stack.py")
    answer = model.infill(hole.prefix, hole.suffix, order="spm", max_tokens=40)
    assert (answer.text, answer.finish_reason) == ("append", "stop")
    assert model.infill(hole.prefix, "", order="spm", max_tokens=6).text == "append(item)\n"


def test_a_colon_behind_the_hole_is_not_written_again_either(model):
    prefix, after = "def total(items):\n    n = 0\n    for item in ", ":\n        n += item\n    return n\n"
    answer = model.infill(prefix, after, max_tokens=40)
    assert (answer.text, answer.finish_reason) == ("items", "stop")
    assert model.infill(prefix, "", max_tokens=40).text != "items"


PYTHON = """
import os


def lines_of(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                yield line.rstrip()


class Counter:
    def __init__(self, start=0):
        self.value = start

    def add(self, n):
        self.value += n
        return self.value


def sizes(folder):
    return {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)}
"""


def loss(model, **change):
    """Nats per token of PYTHON under the demo's weights and a changed configuration."""
    other = Model(replace(model.args, **change))
    other.load_weights(list(model.model.named_parameters()))
    ids = model.tokenizer.encode(PYTHON, bos=True)
    logits = np.array(other(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logits[np.arange(len(ids) - 1), ids[1:]].mean()


def test_its_configuration_is_the_one_it_was_trained_with(model):
    """Any other rotation or norm predicts worse; on code as plain as this it is far from guessing (8.3 nats)."""
    own = loss(model)
    assert own < 4
    for change in ({"rope_theta": 1e6}, {"rope_theta": 1e3}, {"rms_norm_eps": 0.5}):
        assert loss(model, **change) > own + 0.002, change


def test_the_truth_is_likelier_with_the_suffix_than_without(model):
    """On lines of this project, which it never read. 31 holes of 1 to 20 tokens: luck would be even."""
    tokens, gain = model.tokenizer, 0.0
    lines = (ROOT / "mlx_codellama" / "memory.py").read_text().split("\n")
    holes = [i for i in range(8, len(lines) - 4, 6) if lines[i].strip() and lines[i + 1].strip()][:31]
    assert len(holes) > 20
    for i in holes:
        prefix, middle, after = (
            "\n".join(lines[i - 4 : i]) + "\n",
            lines[i][:60],
            "\n" + "\n".join(lines[i + 1 : i + 4]),
        )
        for suffix, sign in ((after, 1), ("", -1)):
            prompt = infill_ids(tokens, prefix, suffix)
            answer = [*tokens.encode_infilling(middle), tokens.infill.eot]
            logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1].astype(np.float64)
            gain += sign * float((logits[np.arange(len(answer)), answer] - np.log(np.exp(logits).sum(-1))).mean())
    assert gain / len(holes) > 0.02
