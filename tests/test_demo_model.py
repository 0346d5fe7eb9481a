"""The bundled demo checkpoint: small, 4-bit, free of its maker's paths, and able to do what its card says."""

import json

import pytest
from conftest import ROOT

from mlx_codellama import load
from mlx_codellama.cli.cursor import hole_marked
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


def test_it_fills_the_hole_of_the_example_and_ends_by_itself(model):
    """What `make demo` shows. 40 tokens would be many times too many, so an end is the model's own EOT."""
    hole = hole_marked((ROOT / "examples" / "mean.py").read_text(), "mean.py")
    answer = model.infill(hole.prefix, hole.suffix, max_tokens=40)
    assert answer.finish_reason == "stop"
    compile(hole.filled(answer.text), "mean.py", "exec")
    with pytest.raises(SyntaxError):
        compile(hole.filled(""), "mean.py", "exec")


def test_the_suffix_changes_the_answer(model):
    prefix = "def f(items):\n    return "
    answers = {model.infill(prefix, suffix, max_tokens=24).text for suffix in ("\n", "]\n", ")\n", ", items)\n")}
    assert len(answers) > 1
