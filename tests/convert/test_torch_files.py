"""Torch's files without torch: every tensor to the bit, nothing executed, nothing believed."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles.torch_files import Stored, integer, integers, pickle_tensors, text, write_torch, zip_bytes

from mlx_codellama.convert.npz import array_rows
from mlx_codellama.convert.torch_pickle import ALLOWED, TensorRef, read_pickle
from mlx_codellama.convert.torch_zip import MAX_PICKLE_BYTES, torch_rows
from mlx_codellama.errors import CheckpointError, CodeLlamaError, UnsafePickleError
from mlx_codellama.weights.reading import BESIDE_BYTES, BlockReader, Rows, row_bytes
from mlx_codellama.weights.specs import TensorSpec

ITEM = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64, "int64": np.int64}


def numbers(rows: Rows, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
    """Rows start .. stop of a tensor, as its reader gives them."""
    stop = rows.shape[0] if stop is None else stop
    raw = np.empty((stop - start, row_bytes(rows)), np.uint8)
    rows.read(start, stop, raw)
    return raw.reshape(-1).view(ITEM[rows.dtype]).reshape(stop - start, *rows.shape[1:])


def bits(shape: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0) -> NDArray[np.generic]:
    size = int(np.prod(shape)) * np.dtype(ITEM[dtype]).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return raw.view(ITEM[dtype]).reshape(shape)


# ── what torch writes ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("byteorder", [None, "little"])
@pytest.mark.parametrize("parameters", [False, True])
def test_every_form_of_the_file_gives_the_same_bits(
    tmp_path: Path, zip64: bool, ordered: bool, byteorder: str | None, parameters: bool
) -> None:
    arrays = {f"{d}.weight": Stored(d, bits((3, 5), d, i)) for i, d in enumerate(ITEM)}
    path = tmp_path / "x.pth"
    write_torch(path, arrays, zip64=zip64, ordered=ordered, byteorder=byteorder, parameters=parameters)
    found = torch_rows(path)
    assert list(found) == list(arrays)
    for name, stored in arrays.items():
        assert (found[name].dtype, found[name].shape) == (stored.dtype, (3, 5))
        assert numbers(found[name]).tobytes() == stored.data.tobytes()
        assert numbers(found[name], 1, 3).tobytes() == stored.data[1:3].tobytes()


def test_shared_storage_is_read_through_each_view(tmp_path: Path) -> None:
    data = bits((60,))
    views = {
        "whole": Stored("bfloat16", data, (5, 12), (12, 1)),
        "transposed": Stored("bfloat16", data, (12, 5), (1, 12)),
        "columns": Stored("bfloat16", data, (5, 4), (12, 1), 3),
        "later rows": Stored("bfloat16", data, (2, 12), (12, 1), 36),
        "every other": Stored("bfloat16", data, (5, 3), (12, 2), 1),
        "vector": Stored("bfloat16", data, (7,), (1,), 50),
        "spread vector": Stored("bfloat16", data, (5,), (12,), 2),
        "one row": Stored("bfloat16", data, (1, 6), (0, 1), 4),
        "empty": Stored("bfloat16", data, (0, 6), (6, 1), 60),
    }
    write_torch(tmp_path / "x.pth", views)
    assert (tmp_path / "x.pth").stat().st_size < 5000  # the storage is there once
    for name, rows in torch_rows(tmp_path / "x.pth").items():
        view = views[name]
        expected = np.lib.stride_tricks.as_strided(
            data[view.offset :], view.shape, tuple(2 * s for s in view.strides or ())
        )
        np.testing.assert_array_equal(numbers(rows), expected, err_msg=name)
        if len(expected) > 1:
            np.testing.assert_array_equal(numbers(rows, 1, len(expected) - 1), expected[1:-1], err_msg=name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    strides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    offset=st.integers(0, 9),
    data=st.data(),
)
def test_any_strides_agree_with_numpy(
    tmp_path: Path, shape: tuple[int, int], strides: tuple[int, int], offset: int, data: st.DataObject
) -> None:
    storage = bits((offset + (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 1,))
    write_torch(tmp_path / "x.pth", {"w": Stored("bfloat16", storage, shape, strides, offset)})
    expected = np.lib.stride_tricks.as_strided(storage[offset:], shape, (2 * strides[0], 2 * strides[1]))
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    np.testing.assert_array_equal(numbers(torch_rows(tmp_path / "x.pth")["w"], start, stop), expected[start:stop])


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


class Payload:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "a shell command": lambda mark: Payload(os.system, f"touch {mark}"),
    "a file opened": lambda mark: Payload(builtins.open, str(mark), "w"),
    "code evaluated": lambda mark: Payload(builtins.eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    "an attribute fetched": lambda mark: Payload(getattr, Payload(__import__, "os"), "mkdir"),
    "inside a table": lambda mark: {"w": Payload(os.mkdir, str(mark))},
    "as a key": lambda mark: {Payload(os.mkdir, str(mark)): 1},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle_does_not_run(tmp_path: Path, kind: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(HOSTILE[kind](mark), protocol)
    write_torch(tmp_path / "x.pth", {}, pickle=payload)
    with pytest.raises(UnsafePickleError) as caught:
        torch_rows(tmp_path / "x.pth")
    assert "nothing was executed" in caught.value.hint
    assert not mark.exists()
    # The payload is live: Python's own unpickler runs it. (None of its effects leaves tmp_path.)
    if kind != "as a key":
        opened = pickle.loads(payload)
        if hasattr(opened, "close"):
            opened.close()
        assert mark.exists() or kind == "an attribute fetched"


@pytest.mark.parametrize(
    "name",
    [
        "posix system",
        "builtins eval",
        "torch.storage _load_from_bytes",
        "torch load",
        "torch FloatStorage.__init__",
        "torch._utils _rebuild_tensor_v2.__globals__",
        "collections UserDict",
        "torch.serialization OrderedDict",
        "numpy.core.multiarray _reconstruct",
    ],
)
def test_name_beyond_tensors_is_refused_as_soon_as_it_is_asked_for(name: str) -> None:
    module, attribute = name.split()
    for opcode in (f"c{module}\n{attribute}\n".encode(), text(module) + text(attribute) + b"\x93"):
        with pytest.raises(UnsafePickleError, match="no tensor"):
            read_pickle(b"\x80\x02" + opcode + b".", "x")


def test_the_list_of_names_is_short() -> None:
    # A name added here widens what an untrusted file may ask for.
    assert len(ALLOWED) == 18
    modules = {"torch", "torch._utils", "torch._tensor", "torch.nn.parameter", "collections"}
    assert {module for module, _ in ALLOWED} == modules


def tensor_pickle(**changes: bytes) -> bytes:
    """The pickle of {"w": 2 × 3 floats at offset 1 of a storage of 10}, with parts of it replaced."""
    parts = {
        "kind": text("storage"),
        "type": b"ctorch\nFloatStorage\n",
        "key": text("0"),
        "numel": integer(10),
        "end": b"t",
        "offset": integer(1),
        "shape": integers((2, 3)),
        "strides": integers((3, 1)),
        "tail": b"\x89}t",
        "name": text("w"),
    } | changes
    storage = (
        b"(" + b"".join(parts[k] for k in ("kind", "type", "key")) + text("cpu") + parts["numel"] + parts["end"] + b"Q"
    )
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + parts["offset"] + parts["shape"] + parts["strides"]
    return b"\x80\x02}" + parts["name"] + body + parts["tail"] + b"Rs."


def test_the_honest_form_of_the_lies_below_is_read() -> None:
    assert read_pickle(tensor_pickle(), "x")["w"].shape == (2, 3)


FLOAT = b"ctorch._utils\n_rebuild_tensor_v2\n"
EMPTY = b"ccollections\nOrderedDict\n)R"
NEG = b"}" + text("neg") + b"\x88s"


def arguments(*, tail: bytes = b"\x89}") -> bytes:
    """The arguments of _rebuild_tensor_v2 for 2 × 3 floats of a storage of 10, as a tuple."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(10) + b"tQ"
    return b"(" + storage + integer(1) + integers((2, 3)) + integers((3, 1)) + tail + b"t"


def table(body: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + body + b"s."


NOTES = b"}" + text("partition_dim") + b"K\x01s"
PLAIN = {
    "metadata that is empty": FLOAT + arguments(tail=b"\x89}}") + b"R",
    "no metadata": FLOAT + arguments(tail=b"\x89}N") + b"R",
    "a bit that is not set": FLOAT + arguments(tail=b"\x89}}" + text("neg") + b"\x89s") + b"R",
    "a parameter": b"ctorch._utils\n_rebuild_parameter\n(" + FLOAT + arguments() + b"R\x88" + EMPTY + b"tR",
    "a parameter with attributes": b"ctorch._utils\n_rebuild_parameter_with_state\n("
    + FLOAT + arguments() + b"R\x88" + EMPTY + NOTES + b"tR",
    "a parameter with slots": b"ctorch._utils\n_rebuild_parameter_with_state\n("
    + FLOAT + arguments() + b"R\x88" + EMPTY + NOTES + b"}\x86tR",
    "a tensor with attributes": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + FLOAT + b"ctorch\nTensor\n" + arguments() + NOTES + b"tR",
    "a buffer": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + FLOAT + b"ctorch.nn.parameter\nBuffer\n" + arguments() + b"}tR",
}  # fmt: skip


@pytest.mark.parametrize("form", PLAIN)
def test_every_form_of_a_plain_tensor_is_that_tensor(form: str) -> None:
    # All are within what torch.load(weights_only=True) reads.
    assert read_pickle(table(PLAIN[form]), "x") == read_pickle(tensor_pickle(), "x")


UNUSUAL = {
    "hooks": FLOAT + arguments(tail=b"\x89}" + text("0") + b"K\x01s") + b"R",
    "hooks that are none": FLOAT + arguments(tail=b"\x89N") + b"R",
    "a flag that is none": FLOAT + arguments(tail=b"K\x00}") + b"R",
    "metadata of another kind": FLOAT + arguments(tail=b"\x89}K\x01") + b"R",
    "the conjugate bit": FLOAT + arguments(tail=b"\x89}}" + text("conj") + b"\x88s") + b"R",
    "both bits": FLOAT + arguments(tail=b"\x89}" + NEG[:-1] + b"s" + text("conj") + b"\x88s") + b"R",
    "a bit that nobody knows": FLOAT + arguments(tail=b"\x89}}" + text("twice") + b"\x88s") + b"R",
    "hooks of a parameter": b"ctorch._utils\n_rebuild_parameter\n("
    + FLOAT + arguments() + b"R\x88}" + text("a") + b"K\x01stR",
    "other data in its state": b"ctorch._utils\n_rebuild_parameter_with_state\n("
    + FLOAT + arguments() + b"R\x88}}" + text("data") + b"K\x01stR",
    "a tensor in its state": b"ctorch._utils\n_rebuild_parameter_with_state\n("
    + FLOAT + arguments() + b"R\x88}}" + text("x") + FLOAT + arguments() + b"RstR",
    "a type that is none": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + FLOAT + b"ctorch\nFloatStorage\n" + arguments() + b"}tR",
    "a type within a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\n"
    b"ctorch\nTensor\n(" + FLOAT + b"ctorch\nTensor\n" + arguments() + b"}t}tR",
}  # fmt: skip


@pytest.mark.parametrize("form", UNUSUAL)
def test_an_argument_that_could_change_the_numbers_is_refused(form: str) -> None:
    with pytest.raises(CheckpointError):
        read_pickle(table(UNUSUAL[form]), "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torchs_negative_bit_turns_the_signs(tmp_path: Path, dtype: str) -> None:
    # What torch.save writes of torch._neg_view(w): the storage of w, and a bit that says to read it negated.
    data = np.arange(-6, 6).astype(np.float32)
    stored = (data.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else data.astype(dtype)
    plain = pickle_tensors({"w": Stored(dtype, stored, (3, 4)), "t": Stored(dtype, stored, (4, 3), (1, 4))})
    assert plain.count(EMPTY + b"tR") == 2
    negated = plain.replace(EMPTY + b"tR", EMPTY + NEG + b"tR")
    write_torch(tmp_path / "x.pth", {"w": Stored(dtype, stored)}, pickle=negated)
    rows = torch_rows(tmp_path / "x.pth")
    sign = np.uint32(1 << 31) if dtype == "float32" else np.uint16(1 << 15)
    expected = (stored.view(sign.dtype) ^ sign).reshape(3, 4)
    np.testing.assert_array_equal(numbers(rows["w"]).view(sign.dtype), expected)
    np.testing.assert_array_equal(numbers(rows["t"]).view(sign.dtype), expected.T)
    if dtype != "bfloat16":
        assert numbers(rows["w"])[0, 0] == 6  # not -6
    assert not torch_rows_are_negative(tmp_path, stored, dtype, plain)


def torch_rows_are_negative(folder: Path, stored: NDArray[np.generic], dtype: str, pickle_: bytes) -> bool:
    write_torch(folder / "plain.pth", {"w": Stored(dtype, stored)}, pickle=pickle_)
    return numbers(torch_rows(folder / "plain.pth")["w"]).tobytes() != stored.tobytes()


def test_integers_cannot_be_negated_so(tmp_path: Path) -> None:
    stored = np.arange(12)
    negated = pickle_tensors({"w": Stored("int64", stored)}).replace(EMPTY + b"tR", EMPTY + NEG + b"tR")
    write_torch(tmp_path / "x.pth", {"w": Stored("int64", stored)}, pickle=negated)
    with pytest.raises(CheckpointError, match="'w' is negated"):
        torch_rows(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("torch._utils _rebuild_meta_tensor_no_storage", "meta tensors, which have a shape and no numbers"),
        ("torch._utils _rebuild_sparse_tensor", "sparse tensors"),
        ("torch._utils _rebuild_qtensor", "torch has quantised"),
        ("torch ComplexFloatStorage", "complex numbers"),
    ],
)
def test_torchs_other_tensors_are_named_for_what_they_are(name: str, what: str) -> None:
    module, attribute = name.split()
    with pytest.raises(CheckpointError, match=f"x holds {what}|{what}") as caught:
        read_pickle(f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1"), "x")
    assert not isinstance(caught.value, UnsafePickleError)


def test_a_training_checkpoint_is_named_for_what_it_is(tmp_path: Path) -> None:
    body = tensor_pickle()
    nested = b"\x80\x02}" + text("state_dict") + body[2:-1] + b"s."
    with pytest.raises(CheckpointError, match="'state_dict' is a table of its own") as caught:
        torch_rows(with_storage(tmp_path / "x.pth", nested))
    assert "save that table alone" in caught.value.hint


def test_a_pickle_of_nothing_but_nesting_is_refused_by_its_size(tmp_path: Path) -> None:
    # Each byte is a step of the interpreter: 4 MiB of them took 15 seconds.
    path = with_storage(tmp_path / "x.pth", b"\x80\x02)" + b"\x85" * (1 << 20) + b".")
    with pytest.raises(CheckpointError, match="description takes"):
        torch_rows(path)
    of_70b = pickle_tensors(
        {f"model.layers.{i}.self_attn.q_proj.weight": Stored("bfloat16", bits((1,), seed=i)) for i in range(723)}
    )
    assert len(of_70b) < MAX_PICKLE_BYTES / 3


# ── checksums ───────────────────────────────────────────────────────────────────────────────────────────────────────


def stream(rows: dict[str, Rows], block_bytes: int = 64) -> None:
    """Read every tensor once, in blocks, as a conversion does."""
    specs = [TensorSpec(name, found.shape, found.dtype) for name, found in rows.items()]
    for _ in BlockReader(specs, rows, block_bytes=block_bytes).blocks():
        pass


def finite(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.generic]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


VIEWS: dict[str, dict[str, Stored]] = {
    "whole": {"w": Stored("float32", finite((30, 4)))},
    "two tensors": {"a": Stored("float32", finite((30, 4))), "b": Stored("float32", finite((7, 5), 1))},
    "shared": (lambda data: {"a": Stored("float32", data, (30, 4)), "b": Stored("float32", data, (30, 4))})(
        finite((120,))
    ),
    "transposed": {"w": Stored("float32", finite((120,)), (4, 30), (1, 4))},
    "sliced": {"w": Stored("float32", finite((120,)), (10, 3), (4, 1), 21)},
    "half": {"w": Stored("float32", finite((120,)), (15, 4), (4, 1), 0)},
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("form", VIEWS)
def test_one_flipped_bit_of_a_storage_is_noticed_while_streaming(tmp_path: Path, form: str, checked: bool) -> None:
    path = tmp_path / "x.pth"
    write_torch(path, VIEWS[form], checked=checked)
    whole = path.read_bytes()
    rows = torch_rows(path)  # without checksums too: torch can leave them out
    reader = [stream(rows), stream(rows)]  # a second pass begins anew
    assert reader == [None, None]
    last = list(VIEWS[form].values())[-1].data.tobytes()
    for at in (0, len(last) // 2 // 4 * 4, len(last) - 4):
        damaged = bytearray(whole)
        damaged[whole.index(last) + at] ^= 1  # of a mantissa: nothing else would notice
        path.write_bytes(damaged)
        if not checked:
            stream(torch_rows(path))
            continue
        with pytest.raises(CheckpointError, match="do not match the file's checksum"):
            stream(torch_rows(path))


def test_a_flipped_bit_of_a_large_block_is_noticed(tmp_path: Path) -> None:
    data = finite((600, 256))  # in blocks that a second thread sums
    write_torch(tmp_path / "x.pth", {"w": Stored("float32", data)})
    stream(torch_rows(tmp_path / "x.pth"), BESIDE_BYTES)
    damaged = bytearray((tmp_path / "x.pth").read_bytes())
    damaged[damaged.index(data.tobytes()) + 400 * 256 * 4] ^= 1
    (tmp_path / "x.pth").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="checksum"):
        stream(torch_rows(tmp_path / "x.pth"), BESIDE_BYTES)


def test_a_flipped_bit_of_an_npz_is_noticed_too(tmp_path: Path) -> None:
    data = finite((30, 4))
    np.savez(tmp_path / "weights.npz", a=data, b=finite((7,), 1))
    stream(array_rows(tmp_path / "weights.npz"))
    damaged = bytearray((tmp_path / "weights.npz").read_bytes())
    damaged[damaged.index(data.tobytes()) + 100] ^= 1
    (tmp_path / "weights.npz").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="checksum"):
        stream(array_rows(tmp_path / "weights.npz"))


LIES = {
    "storage too small": {"numel": integer(6)},
    "negative storage": {"numel": integer(-1)},
    "storage of half an item": {"numel": b"G" + struct.pack(">d", 10.5)},
    "storage of a huge size and shape": {"numel": integer(1 << 70), "shape": integers((1 << 69, 1))},
    "negative offset": {"offset": integer(-1)},
    "offset beyond the storage": {"offset": integer(5)},
    "offset far beyond": {"offset": integer(1 << 59)},
    "negative size": {"shape": integers((-2, 3))},
    "negative stride": {"strides": integers((-3, 1))},
    "stride beyond the storage": {"strides": integers((9, 1))},
    "sizes without strides": {"strides": integers((3,))},
    "sizes that are no numbers": {"shape": b"(" + text("2") + text("3") + b"t"},
    "sizes that are no tuple": {"shape": b"]"},
    "true as a size": {"shape": b"(\x88K\x03t"},
    "a storage that is a name": {"kind": text("module")},
    "a storage of no type": {"type": text("FloatStorage")},
    "a storage of another kind": {"type": b"ccollections\nOrderedDict\n"},
    "a storage whose key is a number": {"key": integer(0)},
    "too few arguments": {"tail": b"t"},
    "a table as a name": {"name": b"}"},
    "a tuple as a name": {"name": b")"},
}


@pytest.mark.parametrize("lie", LIES)
def test_tensor_that_lies_is_an_error(lie: str) -> None:
    with pytest.raises(CheckpointError):
        read_pickle(tensor_pickle(**LIES[lie]), "x")


def with_storage(path: Path, pickle_: bytes, storage: bytes = b"\0" * 40, **changes: Any) -> Path:
    entries = {"a/data.pkl": pickle_, "a/byteorder": b"little", "a/data/0": storage, **changes}
    path.write_bytes(zip_bytes([(name, data) for name, data in entries.items() if data is not None]))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": b"\0" * 39}, "has 39 bytes"),
        ({"storage": b"\0" * 44}, "has 44 bytes"),
        ({"a/data/0": None}, "is missing"),
        ({"a/byteorder": b"big"}, "big'-endian"),
        ({"a/byteorder": b"middle"}, "endian"),
        ({"b/data.pkl": b"}."}, "2 entries"),
        ({"pickle_": b"\x80\x02]."}, "no table of tensors"),
        ({"pickle_": b"\x80\x02}."}, "no table of tensors"),
        ({"pickle_": b"\x80\x02}" + text("w") + b"K\x01s."}, "'w' is no tensor"),
        ({"pickle_": tensor_pickle(name=text("w") + b"K\x01s" + text("w"))}, "names 'w' twice"),
        ({"pickle_": tensor_pickle(strides=integers((0, 1)))}, "stored in a way no weight is"),
        ({"pickle_": tensor_pickle(shape=integers((2, 1, 2)), strides=integers((3, 9, 2)))}, "in a way no weight is"),
        ({"pickle_": b""}, "damaged|ends early"),
    ],
)
def test_file_that_lies_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch_rows(with_storage(tmp_path / "honest.pth", tensor_pickle()))
    with pytest.raises(CheckpointError, match=message):
        torch_rows(with_storage(tmp_path / "x.pth", **{"pickle_": tensor_pickle(), **changes}))


def test_matrix_spread_too_thinly_is_refused(tmp_path: Path) -> None:
    data = bits((70 * 70 * 2,), "float32")
    write_torch(tmp_path / "x.pth", {"w": Stored("float32", data, (2, 2), (70, 4900))})
    with pytest.raises(CheckpointError, match="too thinly"):
        torch_rows(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (b"", "does not begin", "fetch"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before version 1.6", "can run code when it is loaded"),
        (pickle.dumps(print), "is a bare pickle", "can run code when it is loaded; take the safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs", "git lfs pull"),
        (b"<html>404</html>" * 10, "does not begin", "fetch"),
        (b"PK\x03\x04" + b"\0" * 100, "its end is missing", "fetch"),
    ],
)
def test_file_that_is_no_torch_zip_is_named_for_what_it_is(
    tmp_path: Path, data: bytes, message: str, hint: str
) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        torch_rows(tmp_path / "x.pth")
    assert hint in caught.value.hint


@pytest.mark.parametrize("zip64", [False, True])
def test_zip_that_torch_would_not_write_is_refused(tmp_path: Path, zip64: bool) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(zip_bytes([("a/data.pkl", b"}.")], zip64=zip64, method=8))
    with pytest.raises(CheckpointError, match="is compressed"):
        torch_rows(path)
    path.write_bytes(zip_bytes([("a/data.pkl", b"}."), ("a/data.pkl", b"}.")], zip64=zip64))
    with pytest.raises(CheckpointError, match=r"it holds 'a/data\.pkl' twice"):
        torch_rows(path)
    # An entry that holds a whole second zip, whose entry the directory lists as its own.
    inner = zip_bytes([("a/data/0", b"\0" * 40)])
    outer = bytearray(
        zip_bytes([("a/data.pkl", tensor_pickle()), ("a/more", inner), ("a/data/0", b"\0" * 40)], zip64=zip64)
    )
    path.write_bytes(outer)
    torch_rows(path)
    first, last = outer.index(b"a/data/0") - 30, outer.rindex(b"a/data/0")
    if zip64:
        struct.pack_into("<Q", outer, last + len("a/data/0") + 20, first)
    else:
        struct.pack_into("<I", outer, last - 4, first)
    path.write_bytes(outer)
    with pytest.raises(CheckpointError, match="entries overlap"):
        torch_rows(path)


def test_changed_description_is_noticed(tmp_path: Path) -> None:
    whole = zip_bytes([("a/data.pkl", tensor_pickle()), ("a/data/0", b"\0" * 40)])
    (tmp_path / "x.pth").write_bytes(whole.replace(text("w"), text("v")))
    with pytest.raises(CheckpointError, match="checksum"):
        torch_rows(tmp_path / "x.pth")


# ── fuzzing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PICKLE = pickle_tensors({n: Stored("bfloat16", bits((4, 3), seed=i)) for i, n in enumerate(("a", "b.weight"))})
FILE: dict[bool, bytes] = {}


def whole_file(tmp_path: Path, zip64: bool) -> bytes:
    if zip64 not in FILE:
        data = bits((12,))
        tensors = {"a": Stored("bfloat16", data, (4, 3)), "b": Stored("bfloat16", data, (3, 4), (1, 3))}
        write_torch(tmp_path / "whole", tensors, zip64=zip64)
        FILE[zip64] = (tmp_path / "whole").read_bytes()
    return FILE[zip64]


EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.binary(max_size=3))


def mutated(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, cut, insert in edits:
        at = int(place * len(data))
        data = data[:at] + insert + data[at + cut :]
    return data


@settings(max_examples=1000, deadline=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
@example(edits=[(0.0, 0, b"")])
def test_mutated_pickles_raise_nothing_but_our_errors(edits: list[tuple[float, int, bytes]]) -> None:
    try:
        value = read_pickle(mutated(PICKLE, edits), "x")
    except CodeLlamaError:
        return
    if isinstance(value, dict):
        for tensor in value.values():
            if isinstance(tensor, TensorRef) and 0 not in tensor.shape:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
                assert tensor.offset + last < tensor.storage.numel


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=60))
def test_random_opcodes_raise_nothing_but_our_errors(data: bytes) -> None:
    with pytest.raises(CodeLlamaError) if not data.endswith(b".") else _maybe():
        read_pickle(data, "x")


class _maybe:
    """Passes with CodeLlamaError and without."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is not None and issubclass(kind, CodeLlamaError)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDIT, min_size=1, max_size=3), zip64=st.booleans())
@example(edits=[(0.0, 0, b"")], zip64=True)
def test_mutated_files_raise_nothing_but_our_errors(
    tmp_path: Path, edits: list[tuple[float, int, bytes]], zip64: bool
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(mutated(whole_file(tmp_path, zip64), edits))
    try:
        for rows in torch_rows(path).values():
            if len(rows.shape) > 0 and row_bytes(rows) * rows.shape[0] < 10_000:
                numbers(rows)
    except CodeLlamaError:
        pass


def test_every_truncation_and_every_flipped_byte_of_the_directory_is_survived(tmp_path: Path) -> None:
    whole = whole_file(tmp_path, True)
    path = tmp_path / "x.pth"
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            torch_rows(path)
    start = whole.index(b"PK\1\2")
    for at in range(start, len(whole)):
        for value in (0xFF, whole[at] ^ 0x81):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with _maybe():
                torch_rows(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\xff\xff\xff\x7f.",  # a text of 2 GB
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of 4 G entries: Python's own unpickler allocates them all
        b"\x80\x04\x95" + b"\xff" * 8 + b".",  # a frame of 16 EB
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a byte array of 1 TB
        b"\x80\x02" + b"".join(b"q%c)h%ch%c\x86" % (i, i, i) for i in range(100)) + b".",  # doubled a hundred times
        b"\x80\x02" + b"(" * 1000 + b"t" * 1000 + b".",  # nested a thousand deep
    ],
)
def test_hostile_sizes_allocate_nothing(data: bytes) -> None:
    tracemalloc.start()
    with _maybe():
        read_pickle(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_directory_that_claims_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    whole = bytearray(whole_file(tmp_path, False))
    end = whole.index(b"PK\5\6")
    path = tmp_path / "x.pth"
    with path.open("wb") as file:  # large enough for the claim to be possible; a hole on the disk
        file.write(b"PK\3\4")
        file.seek(1 << 32)
        struct.pack_into("<II", whole, end + 12, (1 << 32) - 100, 100)
        file.write(whole[end:])
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        torch_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# ── torch itself ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peers
def test_files_of_torch_are_read_to_the_bit(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shared = torch.randn(6, 10)
    state = {
        "bf16": torch.randn(5, 7).to(torch.bfloat16),
        "f16": torch.randn(5, 7).half(),
        "f32": torch.randn(5),
        "transposed": torch.randn(5, 7).t(),
        "sliced": shared[1:4, 2:9:2],
        "shared": shared,
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "int64": torch.arange(4),
    }
    torch.save(state, tmp_path / "x.pth")
    found = torch_rows(tmp_path / "x.pth")
    assert list(found) == list(state)
    for name, tensor in state.items():
        dense = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            dense = dense.view(torch.int16)
        assert numbers(found[name]).tobytes() == dense.numpy().tobytes(), name
    module = torch.nn.Linear(4, 3)
    torch.save(module.state_dict(), tmp_path / "module.bin")
    assert numbers(torch_rows(tmp_path / "module.bin")["weight"]).tobytes() == module.weight.detach().numpy().tobytes()


@pytest.mark.peers
def test_old_format_of_torch_is_an_error_with_a_hint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        torch_rows(tmp_path / "x.pth")


@pytest.mark.peers
@pytest.mark.parametrize("zip64", [False, True])
def test_files_of_the_test_writer_are_read_by_torch(tmp_path: Path, zip64: bool) -> None:
    # Otherwise reader and writer could agree on a format of their own.
    torch = pytest.importorskip("torch")
    data = bits((60,), "float32")
    stored = {"a": Stored("float32", data, (5, 12)), "b": Stored("float32", data, (12, 5), (1, 12))}
    write_torch(tmp_path / "x.pth", stored, zip64=zip64, parameters=zip64)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert loaded["a"].detach().numpy().tobytes() == data.tobytes()
    assert loaded["b"].detach().numpy().T.tobytes() == data.tobytes()
