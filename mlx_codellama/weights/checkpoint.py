"""A checkpoint as a stream: rows of tensors, checked against the configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_codellama import inputs
from mlx_codellama.config import DTYPES, ModelArgs, Quantization, load_config
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.shards import SAFETENSORS, Chosen, Form, candidates, choose
from mlx_codellama.weights.header import read_header
from mlx_codellama.weights.reading import BlockReader, FileRows, InputFile, Rows, read_rows, row_bytes, stored_bytes
from mlx_codellama.weights.specs import FLOATS, Block, TensorSpec, tensor_specs, tensors_that

INDEX = SAFETENSORS.listing
BUFFER = ".inv_freq"
COMPARE_BYTES = 4 << 20
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
DIGEST_RULE = "tensors_sha256: sha256 of the file's tensor bytes in the order of the output's tensors"


class Checkpoint:
    """A model on disk with exactly the expected tensors, in the expected shapes. A Stream.

    args  as stored: `dtype` is the dtype of most weights; `quantization` lists the modules that are not quantised
    rows  one reader per tensor name, made from safetensors (`Checkpoint.open`) or other formats (mlx_codellama.convert)
    """

    def __init__(
        self,
        args: ModelArgs,
        rows: Mapping[str, Rows],
        *,
        files: Mapping[str, Path] | None = None,
        record: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        aside: Sequence[str] = (),
    ) -> None:
        """Check rows against args. dtype casts every floating-point tensor; by default each keeps its own. aside names
        files that look like weights but were skipped.

        Raises CheckpointError for missing, leftover or misshapen tensors, ConfigError for an unknown dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}", hint=f"known: {', '.join(DTYPES)}")
        rows = _without_tied_head(args, rows)
        self.args, self.specs = _agreed(args, rows, dtype)
        self.files, self.aside = dict(files or {}), list(aside)
        self._rows = dict(rows)
        self._record = dict(record or {})
        self._by_name = {spec.name: spec for spec in self.specs}
        self._reader = BlockReader(self.specs, self._rows)

    @classmethod
    def open(cls, folder: str | Path, *, rope_theta: float | None = None, dtype: str | None = None) -> Checkpoint:
        """A folder with config.json and safetensors (one file, or several with or without an index).

        Raises ConfigError or CheckpointError; opening reads headers only.
        """
        folder = Path(folder)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file", hint="name the folder that holds config.json and the weights")
        _refuse_unconverted(folder)
        args = load_config(folder, rope_theta=rope_theta)
        files = {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
        chosen = weight_files(folder, SAFETENSORS)
        return cls(args, safetensors_rows(folder, chosen), files=files, dtype=dtype, aside=chosen.aside)

    @property
    def record(self) -> dict[str, Any]:
        """Provenance. It includes digests of the weights once blocks() is exhausted."""
        inputs = {file.path.name: {"bytes": file.size} for rows in self._rows.values() for file in rows.files}
        for name, digest in self._reader.digests.items():
            inputs[name] |= {"tensors_sha256": digest}  # type: ignore[dict-item]
        aside = {"left_aside": self.aside} if self.aside else {}
        return {**self._record, **aside, "weights": {"rule": DIGEST_RULE, "files": dict(sorted(inputs.items()))}}

    @property
    def total_bytes(self) -> int:
        return self._reader.total_bytes

    @property
    def done_bytes(self) -> int:
        return self._reader.done_bytes

    def blocks(self) -> Iterator[Block]:
        """Every row of every tensor once, in order. Raises CheckpointError or NonFiniteError."""
        return self._reader.blocks()

    def read(self, name: str) -> mx.array:
        """One whole tensor."""
        return self.rows(name, 0, self._spec(name).shape[0])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start .. stop of one tensor, along axis 0."""
        spec = self._spec(name)
        if not 0 <= start <= stop <= spec.shape[0]:
            raise CheckpointError(f"{name} has rows 0 to {spec.shape[0]}, not {start} to {stop}")
        return read_rows(self._rows[name], spec, start, stop)

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self._by_name[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}") from None


def _refuse_unconverted(folder: Path) -> None:
    """Raise CheckpointError for a release that only `convert` reads, instead of one about a missing config.json."""
    if folder.is_dir() and not candidates((path.name for path in folder.iterdir()), SAFETENSORS):
        for pattern in ("consolidated*.pth", "pytorch_model*.bin", "weights.npz"):
            if any(folder.glob(pattern)):
                raise CheckpointError(
                    f"{folder} is not converted yet: it holds {pattern}, no safetensors",
                    hint=f"mlx-codellama convert {folder} OUT",
                )


def _agreed(args: ModelArgs, rows: Mapping[str, Rows], dtype: str | None) -> tuple[ModelArgs, list[TensorSpec]]:
    """args and specs with the dtypes and quantisation of the stored tensors, after checking them against each other."""
    if args.quantization:
        # As in MLX's own loader, a module without scales is not quantised, whether config.json lists it or not.
        # Some checkpoints list modules without a matrix (norms, rope) as not quantised. That has no effect.
        overrides = dict(args.quantization.overrides)
        modules = {name.removesuffix(".weight") for name, shape in args.tensor_shapes().items() if len(shape) == 2}
        overrides = {path: quant for path, quant in overrides.items() if quant is not None or path in modules}
        if unknown := sorted(overrides.keys() - modules):
            raise CheckpointError(f"config.json quantises {unknown[0][:200]!r}, which the model does not have")
        for name, shape in args.tensor_shapes().items():
            path = name.removesuffix(".weight")
            if len(shape) == 2 and f"{path}.scales" not in rows and f"{path}.biases" not in rows:
                overrides[path] = None
        args = args.with_quantization(Quantization(args.quantization.default, overrides))
    specs = tensor_specs(args)
    names = [spec.name for spec in specs]
    if missing := [name for name in names if name not in rows]:
        if prefix := _wrapped(rows, missing):
            raise CheckpointError(
                f"every tensor is named {prefix[:100]!r} and then as a model's: it is the state of a wrapper",
                hint="save the state of the model inside it (`model.module` of DistributedDataParallel, `_orig_mod` of "
                "torch.compile)",
            )
        raise CheckpointError(
            tensors_that(missing, "is missing", "are missing"),
            hint="a shard may be missing, or config.json wrong",
        )
    if leftover := sorted(rows.keys() - set(names)):
        raise CheckpointError(
            tensors_that(leftover, "does not belong to this model", "do not belong to this model"),
            hint="config.json may belong to another model",
        )
    stored: Counter[str] = Counter()
    for spec in specs:
        found = rows[spec.name]
        if found.shape != spec.shape:
            raise CheckpointError(f"{spec.name} has shape {found.shape}, config.json says {spec.shape}")
        if found.dtype == "float64":
            raise CheckpointError(
                f"{spec.name} is stored as float64, which is not read", hint="save the model in float32 or bfloat16"
            )
        if (found.dtype in FLOATS) != (spec.dtype in FLOATS) or found.dtype not in (spec.dtype, *FLOATS):
            raise CheckpointError(f"{spec.name} is stored as {found.dtype}, expected {spec.dtype}")
        if found.dtype in FLOATS:
            stored[found.dtype] += stored_bytes(found)
    args = replace(args, dtype=dtype or stored.most_common(1)[0][0])
    return args, [
        replace(spec, dtype=dtype or rows[spec.name].dtype) if spec.dtype in FLOATS else spec for spec in specs
    ]


def _wrapped(rows: Mapping[str, Rows], missing: Sequence[str]) -> str:
    """The prefix of every name, if removing it would supply all missing tensors; else ""."""
    ends = [name for name in rows if name.endswith(f".{missing[0]}")]
    prefix = ends[0].removesuffix(missing[0]) if len(ends) == 1 else ""
    return prefix if prefix and all(prefix + name in rows for name in missing) else ""


def _without_tied_head(args: ModelArgs, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """rows without the head, if the head of the model is its embedding; some files hold both. Raises CheckpointError if
    the two differ."""
    left = dict(rows)
    if not args.tie_word_embeddings:
        return left
    for part in ("weight", "scales", "biases"):
        head, embedding = left.get(f"lm_head.{part}"), left.get(f"model.embed_tokens.{part}")
        if head is not None and embedding is not None:
            if not _equal(head, embedding):
                raise CheckpointError(
                    f"lm_head.{part} differs from the embedding, but config.json says that they are one",
                    hint='say "tie_word_embeddings": false in config.json if the model has a head of its own',
                )
            del left[f"lm_head.{part}"]
    return left


def _equal(one: Rows, other: Rows) -> bool:
    """Whether two tensors hold the same bytes. Reads them in blocks."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    step = math.lcm(one.step, other.step)
    count = max(1, COMPARE_BYTES // max(1, row_bytes(one)) // step) * step
    for start in range(0, one.shape[0], count):
        stop = min(start + count, one.shape[0])
        first, second = (np.empty((stop - start, row_bytes(one)), np.uint8) for _ in range(2))
        one.read(start, stop, first)
        other.read(start, stop, second)
        if not np.array_equal(first, second):
            return False
    return True


def weight_files(folder: Path, form: Form) -> Chosen:
    """The files of a folder that are its weights. Raises CheckpointError."""

    def read(name: str) -> bytes:
        try:
            return inputs.read_bytes(folder / name, inputs.JSON_BYTES)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None

    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from None
    return choose(names, form, read=read, where=folder)


def safetensors_rows(folder: Path, chosen: Chosen | None = None) -> dict[str, Rows]:
    """A reader for every tensor in a folder of safetensors. Raises like `shard_rows`, also for damaged headers."""

    def of_file(path: Path) -> dict[str, Rows]:
        file = InputFile(path)
        return {name: FileRows(file, i.offset, i.dtype, i.shape) for name, i in read_header(path).items()}

    return shard_rows(folder, chosen or weight_files(folder, SAFETENSORS), of_file)


def shard_rows(folder: Path, chosen: Chosen, of_file: Callable[[Path], Mapping[str, Rows]]) -> dict[str, Rows]:
    """A reader for every tensor in the chosen files; `of_file` returns those of one file.

    Skips buffers that models compute (`….inv_freq`), even if only the index lists them. Raises CheckpointError if two
    files hold the same tensor, or a tensor is not in the file that the index names.
    """
    listed = None if chosen.listed is None else dict(chosen.listed)
    rows: dict[str, Rows] = {}
    for path in (folder / name for name in chosen.names):
        for name, found in of_file(path).items():
            if name in rows:
                raise CheckpointError(f"two files hold {name[:200]!r}, one is {path}")
            if listed is not None and listed.pop(name, path.name) != path.name:
                raise CheckpointError(f"{path} holds {name[:200]!r}, which the index says is elsewhere")
            rows[name] = found
    if lost := sorted(name for name in listed or () if not name.endswith(BUFFER)):
        raise CheckpointError(tensors_that(lost, "of the index is in no file", "of the index are in no file"))
    return {name: found for name, found in rows.items() if not name.endswith(BUFFER)}
