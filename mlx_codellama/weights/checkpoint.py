"""A checkpoint as a stream: rows of tensors, held to what the configuration says must be there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_codellama import inputs
from mlx_codellama.config import DTYPES, ModelArgs, Quantization, load_config
from mlx_codellama.errors import CheckpointError, ConfigError
from mlx_codellama.weights.header import read_header
from mlx_codellama.weights.reading import BlockReader, FileRows, InputFile, Rows, read_rows, stored_bytes
from mlx_codellama.weights.specs import FLOATS, Block, TensorSpec, tensor_specs, tensors_that

INDEX = "model.safetensors.index.json"
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
    """A model on disk whose tensors are complete, in shape, and none left over. A Stream.

    args  as stored: `dtype` is that of most of the weights, `quantization` lists what is not quantised
    rows  one reader per tensor name; `Checkpoint.open` makes them from safetensors, mlx_codellama.convert from others
    """

    def __init__(
        self,
        args: ModelArgs,
        rows: Mapping[str, Rows],
        *,
        files: Mapping[str, Path] | None = None,
        record: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        """Hold rows to args. dtype casts every floating-point tensor, else each keeps its own.

        Raises CheckpointError for missing, leftover or misshapen tensors, ConfigError for an unknown dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}", hint=f"known: {', '.join(DTYPES)}")
        self.args, self.specs = _agreed(args, rows, dtype)
        self.files = dict(files or {})
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
        return cls(args, safetensors_rows(folder), files=files, dtype=dtype)

    @property
    def record(self) -> dict[str, Any]:
        """Provenance. Digests of the weights are there once blocks() is exhausted."""
        inputs = {file.path.name: {"bytes": file.size} for rows in self._rows.values() for file in rows.files}
        for name, digest in self._reader.digests.items():
            inputs[name] |= {"tensors_sha256": digest}  # type: ignore[dict-item]
        return {**self._record, "weights": {"rule": DIGEST_RULE, "files": dict(sorted(inputs.items()))}}

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
    """Raise CheckpointError for a release that only `convert` reads, so that nobody looks for a missing config.json."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        for pattern in ("consolidated*.pth", "pytorch_model*.bin", "weights.npz"):
            if any(folder.glob(pattern)):
                raise CheckpointError(
                    f"{folder} is not converted yet: it holds {pattern}, no safetensors",
                    hint=f"mlx-codellama convert {folder} OUT",
                )


def _agreed(args: ModelArgs, rows: Mapping[str, Rows], dtype: str | None) -> tuple[ModelArgs, list[TensorSpec]]:
    """args and specs as the stored tensors have them, after holding one to the other."""
    if args.quantization:
        # As in MLX's own loader, a module without scales is not quantised, whether config.json lists it or not.
        # Some checkpoints say of modules without a matrix (norms, rope) that they are not quantised: nothing to do.
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
        if (found.dtype in FLOATS) != (spec.dtype in FLOATS) or found.dtype not in (spec.dtype, *FLOATS):
            raise CheckpointError(f"{spec.name} is stored as {found.dtype}, expected {spec.dtype}")
        if found.dtype in FLOATS:
            stored[found.dtype] += stored_bytes(found)
    args = replace(args, dtype=dtype or stored.most_common(1)[0][0])
    return args, [
        replace(spec, dtype=dtype or rows[spec.name].dtype) if spec.dtype in FLOATS else spec for spec in specs
    ]


def safetensors_rows(folder: Path) -> dict[str, Rows]:
    """Readers of every tensor in a folder of safetensors. Raises as `shard_rows`, also for damaged headers."""

    def of_file(path: Path) -> dict[str, Rows]:
        file = InputFile(path)
        return {name: FileRows(file, i.offset, i.dtype, i.shape) for name, i in read_header(path).items()}

    return shard_rows(folder, INDEX, "*.safetensors", of_file)


def shard_rows(
    folder: Path, index: str, pattern: str, of_file: Callable[[Path], Mapping[str, Rows]]
) -> dict[str, Rows]:
    """Readers of every tensor in a folder of shards; `of_file` gives those of one shard.

    The shards are the files of the index, else all that match pattern. Buffers that models compute (`….inv_freq`) are
    left out. Raises CheckpointError for missing or unlisted shards and for tensors that two files hold.
    """
    listed = _read_index(folder / index) if (folder / index).exists() else None
    rows: dict[str, Rows] = {}
    for path in _shard_paths(folder, index, pattern, listed):
        for name, found in of_file(path).items():
            if name in rows:
                raise CheckpointError(f"two files hold {name[:200]!r}, one is {path}")
            if listed is not None and listed.pop(name, path.name) != path.name:
                raise CheckpointError(f"{path} holds {name[:200]!r}, which {index} says is elsewhere")
            rows[name] = found
    if listed:
        raise CheckpointError(tensors_that(sorted(listed), f"of {index} is in no file", f"of {index} are in no file"))
    return {name: found for name, found in rows.items() if not name.endswith(".inv_freq")}


def _read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: tensor name → file name beside it. Raises CheckpointError."""
    try:
        data = inputs.read_json(path)
        listed = data["weight_map"]
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise ValueError("weight_map is no table of file names")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {error}") from None
    for name in set(listed.values()):
        if not name or name != Path(name).name or "\\" in name or name in (".", ".."):
            raise CheckpointError(f"{path} names {name[:200]!r}, which is no plain file name")
    return dict(listed)


def _shard_paths(folder: Path, index: str, pattern: str, listed: Mapping[str, str] | None) -> list[Path]:
    """The files that hold a checkpoint's weights, complete: those that the index lists, else all that match pattern."""
    present = {path.name for path in folder.glob(pattern) if not path.name.startswith(".")}
    if listed is not None:
        wanted = set(listed.values())
        if unlisted := sorted(name for name in present - wanted if _numbered(name)):
            raise CheckpointError(f"{unlisted[0]} is beside {index} but not listed in it", hint="remove stale shards")
    else:
        wanted = set(present)
        for match in filter(None, map(_numbered, present)):
            wanted |= {f"{match[1]}-{i:05d}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)}
    if not wanted:
        raise CheckpointError(f"{folder} holds no weights", hint=f"expected {pattern}")
    if missing := sorted(wanted - present):
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} weight files are missing, first {missing[0]}",
            hint="fetch the missing shard",
        )
    return [folder / name for name in sorted(wanted)]


def _numbered(name: str) -> re.Match[str] | None:
    """Parts of a shard's name: model-00002-of-00007.safetensors → model, 00002, 00007, .safetensors."""
    return re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)", name)
