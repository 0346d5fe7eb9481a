from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.config import QuantArgs, Quantization
from mlx_codellama.errors import ConfigError
from mlx_codellama.quant import RECIPES, apply, pipeline, predict, recipe
from mlx_codellama.quant.affine import dequantize
from mlx_codellama.weights import Block, Checkpoint, save


def payload_bytes(folder: Path) -> int:
    """Bytes of tensors in a folder's safetensors, from the files' sizes and header lengths alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    return total


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_prediction_is_what_is_written_to_the_byte(name: str, dtype: str, weights_in, tmp_path: Path) -> None:
    weights = weights_in(dtype)
    plan = recipe(name, weights.args)
    save(tmp_path / "out", apply(plan, weights), max_shard_bytes=200_000)
    report = predict(weights.args, plan)
    assert payload_bytes(tmp_path / "out") == report.n_bytes
    record = json.loads((tmp_path / "out" / "run.json").read_text())["source"]
    assert record["quantization"]["bytes"] == report.n_bytes


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", ["q3", "q4", "mixed", "mxfp4"])
def test_pieces_of_rows_give_the_bits_of_the_whole_tensor(name: str, workers: int, weights, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 7 * 192 * 2)  # seven rows, no divisor of 50
    plan = recipe(name, weights.args)
    stream = apply(plan, weights, workers=workers)
    got: dict[str, list[Block]] = defaultdict(list)
    for block in stream.blocks():
        got[block.name].append(block)
    assert list(got) == [spec.name for spec in stream.specs]
    for tensor in predict(weights.args, plan).tensors:
        whole = weights.arrays[tensor.name]
        if tensor.quant is None:
            expected = [whole]
        else:
            q = tensor.quant
            expected = mx.quantize(whole, group_size=q.group_size, bits=q.bits, mode=q.mode, stream=mx.cpu)
        for spec, array in zip(tensor.specs, expected, strict=True):
            blocks = got[spec.name]
            ends = [b.start + len(b.array) for b in blocks]
            assert [b.start for b in blocks] == [0, *ends[:-1]]  # in order, no gap, no overlap
            joined = mx.concatenate([b.array for b in blocks])
            assert (joined.shape, str(joined.dtype)) == (spec.shape, f"mlx.core.{spec.dtype}")
            assert mx.array_equal(joined, array)


def test_the_measured_error_is_that_of_the_measured_rows(weights, monkeypatch) -> None:
    plan = Quantization(QuantArgs(3, 64))
    monkeypatch.setattr(pipeline, "MEASURED", 1)  # all rows
    stream = apply(plan, weights)
    assert stream.record["quantization"]["tensor_errors"] == {}  # nothing is measured yet
    for _ in stream.blocks():
        pass
    errors = stream.record["quantization"]["tensor_errors"]
    assert set(errors) == {t.name for t in predict(weights.args, plan).tensors if t.quant}
    name = "model.layers.2.mlp.down_proj.weight"
    w = np.array(weights.arrays[name].astype(mx.float32)).astype(np.float64)
    back = np.array(dequantize(tuple(mx.quantize(weights.arrays[name], bits=3)), QuantArgs(3, 64))).astype(np.float64)
    assert errors[name]["relative_rms"] == pytest.approx(np.linalg.norm(back - w) / np.linalg.norm(w), rel=1e-6)
    assert errors[name]["max_abs"] == pytest.approx(np.abs(back - w).max())
    assert errors[name]["n_weights"] == w.size
    assert stream.record["source"] == "seeded"


def test_more_bits_err_less(weights) -> None:
    def error(name: str) -> float:
        stream = apply(recipe(name, weights.args), weights)
        for _ in stream.blocks():
            pass
        return stream.record["quantization"]["tensor_errors"]["lm_head.weight"]["relative_rms"]

    errors = [error(f"q{bits}") for bits in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    for wide, narrow in pairwise(errors):
        assert 1.6 < wide / narrow < 5  # each bit halves the step; 6 to 8 are two bits


def test_a_quantised_source_is_refused(weights, tmp_path: Path) -> None:
    save(tmp_path / "q", apply(recipe("q4", weights.args), weights))
    source = Checkpoint.open(tmp_path / "q")
    with pytest.raises(ConfigError, match=r"already quantised \(4-bit/64\)") as caught:
        apply(recipe("q8", weights.args), source)
    assert "16-bit release" in caught.value.hint
    assert apply(None, source) is source


def test_a_quantised_stream_shows_what_its_source_shows(weights, tmp_path: Path) -> None:
    weights.files = {"tokenizer.model": tmp_path / "tokenizer.model"}
    plan = recipe("q4", weights.args)
    stream = apply(plan, weights)
    assert stream.files == weights.files
    assert stream.args == weights.args.with_quantization(plan)
    assert stream.total_bytes == weights.total_bytes
    seen = {stream.done_bytes for _ in stream.blocks()}
    assert max(seen) == weights.total_bytes
    assert len(seen) > 5


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("head", [QuantArgs(4, 32), None])
def test_a_slow_consumer_holds_the_source_back(workers: int, head: QuantArgs | None, weights, monkeypatch) -> None:
    # Also where tensors pass untouched: an unquantised head of a large model must not pile up in memory.
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 10**6)  # a block is a piece
    read: list[str] = []
    blocks_of = weights.blocks

    def counted() -> Iterator[Block]:
        for block in blocks_of():
            read.append(f"{block.name} {block.start}")
            yield block

    monkeypatch.setattr(weights, "blocks", counted)
    plan = Quantization(QuantArgs(4, 32), {"lm_head": head, "model.embed_tokens": head})
    written: set[str] = set()
    ahead = []
    for block in apply(plan, weights, workers=workers).blocks():
        written.add(f"{block.name.rpartition('.')[0]}.weight {block.start}")
        ahead.append(len(read) - len(written))
    assert len(written) == len(read)
    assert max(ahead) == 2 * workers
    assert ahead.count(2 * workers) > len(read) / 2  # it does run ahead


def test_a_reader_that_fails_stops_the_workers(weights) -> None:
    class Failing(type(weights)):  # type: ignore[misc]
        def blocks(self) -> Iterator[Block]:
            for i, block in enumerate(super().blocks()):
                if i == 9:
                    raise OSError("the disk went away")
                yield block

    before = threading.active_count()
    with pytest.raises(OSError, match="went away"):
        for _ in apply(recipe("q4", weights.args), Failing(weights.args)).blocks():
            pass
    assert threading.active_count() == before


def test_a_consumer_that_stops_early_leaves_no_thread(weights) -> None:
    before = threading.active_count()
    blocks = apply(recipe("q4", weights.args), weights).blocks()
    next(blocks)
    blocks.close()
    assert threading.active_count() == before
