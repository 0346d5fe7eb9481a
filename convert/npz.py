"""The early layout of MLX's examples, still used by many mlx-community models: weights.npz under Meta's names.

Its config.json is Meta's params.json with `model_type` and, if quantised, `quantization`. Weights keep Meta's rotary
order, so wq and wk (with their scales and biases) are reordered as in `meta`. Quantised matrices have MLX's current
layout. (ml-explore/mlx-examples, llms/llama/convert.py; numpy.lib.format for the header of an array.)
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from mlx_codellama.config import ModelArgs, Quantization, read_object
from mlx_codellama.convert.meta import HalvesRows, args_of_params
from mlx_codellama.convert.names import IGNORED, OUTPUT, meta_tensors
from mlx_codellama.convert.stored_zip import Entry, damaged, expect, read_bytes, read_directory
from mlx_codellama.convert.torch_zip import StridedRows
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.weights.reading import FileRows, InputFile, Rows
from mlx_codellama.weights.specs import TensorSpec, tensors_that

WEIGHTS = "weights.npz"
DTYPES = {"<f2": "float16", "<f4": "float32", "<u4": "uint32", "|u1": "uint8"}
MAX_HEADER_BYTES = 4096
HEADER = re.compile(
    r"\{'descr': '([<|]\w\d)', 'fortran_order': (True|False), 'shape': \(((?:\d{1,12}, ?)*(?:\d{1,12})?)\),? ?\}\s*"
)


def array_rows(path: Path) -> dict[str, Rows]:
    """A reader for every array of an npz file of stored (not compressed) arrays. Raises CheckpointError."""
    file = InputFile(path)
    rows: dict[str, Rows] = {}
    for name, entry in read_directory(file).items():
        if not name.endswith(".npy"):
            raise damaged(path, f"it holds {name[:200]!r}")
        rows[name.removesuffix(".npy")] = _array(file, entry, name)
    return rows


def _array(file: InputFile, entry: Entry, name: str) -> Rows:
    head = read_bytes(file, entry.offset, min(entry.nbytes, 12))
    form = {1: "<H", 2: "<I", 3: "<I"}.get(head[6]) if head[:6] == b"\x93NUMPY" and len(head) == 12 else None
    if form is None:
        raise damaged(file.path, f"{name[:200]!r} is no array")
    (length,) = struct.unpack_from(form, head, 8)
    start = 8 + struct.calcsize(form)
    if length > min(MAX_HEADER_BYTES, entry.nbytes - start):
        raise damaged(file.path, f"the header of {name[:200]!r} claims {length} bytes")
    match = HEADER.fullmatch(read_bytes(file, entry.offset + start, length).decode("latin-1"))
    dtype = DTYPES.get(match[1]) if match else None
    if match is None or dtype is None:
        raise damaged(file.path, f"{name[:200]!r} is no array of numbers that weights have")
    shape = tuple(int(n) for n in match[3].replace(" ", "").split(",") if n)
    expect(file, entry)
    spec = TensorSpec(name, shape, dtype)
    offset = entry.offset + start + length
    if offset + spec.nbytes != entry.offset + entry.nbytes or len(shape) not in (1, 2):
        raise damaged(file.path, f"{name[:200]!r} does not have the bytes of its shape {shape}")
    if match[2] == "True" and len(shape) == 2:
        return StridedRows(file, offset, dtype, shape, (1, shape[0]))
    return FileRows(file, offset, dtype, shape)


def npz_rows(folder: Path, *, rope_theta: float | None, variant: str | None) -> tuple[ModelArgs, dict[str, Rows]]:
    """The model of a folder with weights.npz and a reader for each tensor, under our names. Raises like `meta_rows`."""
    stored = array_rows(folder / WEIGHTS)
    output = stored.get(OUTPUT.name)
    if output is None:
        raise CheckpointError(f"{folder / WEIGHTS} lacks {OUTPUT.name}", hint="expected Meta's names of tensors")
    params, in_pairs = _params(folder / "config.json")
    quantization = params.pop("quantization", None)
    args = args_of_params(
        params, folder / "config.json", vocab_size=output.shape[0], rope_theta=rope_theta, variant=variant
    )
    if quantization is not None:
        args = args.with_quantization(Quantization.from_dict(quantization))
    rows: dict[str, Rows] = {}
    for ours, meta in meta_tensors(args.num_hidden_layers).items():
        for part in ("weight", "scales", "biases"):
            found = stored.pop(meta.name.removesuffix("weight") + part, None)
            if found is not None:
                permuted = meta.heads and in_pairs and found.shape[0] % args.head_dim == 0
                rows[ours.removesuffix("weight") + part] = HalvesRows(found, args.head_dim) if permuted else found
    if leftover := sorted(stored.keys() - IGNORED):
        raise CheckpointError(
            tensors_that(leftover, "does not belong to this model", "do not belong to this model"),
            hint="config.json may belong to another model",
        )
    return args, rows


def _params(path: Path) -> tuple[dict[str, Any], bool]:
    """config.json without the keys that are not Meta's, and whether q and k are in Meta's rotary order."""
    data = read_object(path, hint="fetch config.json of the same model")
    if data.pop("model_type", "llama") != "llama":
        raise ConfigError(f"{path} does not describe a llama model")
    return data, data.pop("rope_traditional", True) is True
