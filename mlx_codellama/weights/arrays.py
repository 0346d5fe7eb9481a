"""Several arrays in one safetensors file: written one at a time, as a whole or not at all, and checked when read.

The file also holds strings as metadata, and `checks`: the CRC-32 of the header and of each array's bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_codellama.errors import CheckpointError
from mlx_codellama.staging import replacing, write_at
from mlx_codellama.weights.header import header_bytes, read_header, read_metadata
from mlx_codellama.weights.reading import InputFile, to_array
from mlx_codellama.weights.saving import raw_bytes
from mlx_codellama.weights.specs import TensorSpec

CHECKS = "checks"


def write_arrays(
    path: Path, specs: Sequence[TensorSpec], arrays: Iterable[mx.array], metadata: Mapping[str, str]
) -> None:
    """Write arrays in the order of their specs. Each is fetched only after the one before it was written.

    A file at `path` is replaced when the new one is complete, and keeps its mode. A new file has mode 0600, because it
    holds what a prompt contained. Raises OutputError; the old file then stays.
    """
    specs = [*specs, TensorSpec(CHECKS, (1 + len(specs),), "uint32")]
    header = header_bytes([(s.name, s.dtype, s.shape, s.nbytes) for s in specs], metadata)
    with replacing(path, private=True) as fd:
        end = write_at(fd, memoryview(header), 0)
        checks = [zlib.crc32(header)]
        for spec, array in zip(specs, _and_checks(arrays, checks), strict=True):
            if (array.shape, str(array.dtype)) != (spec.shape, f"mlx.core.{spec.dtype}"):
                raise ValueError(f"{spec.name} came as {array.dtype} {array.shape}, announced as {spec}")
            data = raw_bytes(array)
            checks.append(zlib.crc32(data))
            end += write_at(fd, data, end)


def _and_checks(arrays: Iterable[mx.array], checks: list[int]) -> Iterator[mx.array]:
    yield from arrays
    yield mx.array(np.array(checks, np.uint32))


class ArraysFile:
    """A file of `write_arrays`, open. Opening reads the header only.

    Raises CheckpointError for a damaged file, on opening or when an array is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._infos = read_header(path)
        self.metadata = read_metadata(path)
        self._file = InputFile(path)
        names = [name for name in self._infos if name != CHECKS]
        info = self._infos.get(CHECKS)
        if info is None or (info.dtype, info.shape) != ("uint32", (1 + len(names),)):
            raise CheckpointError(f"{path} has no checks of its arrays")
        header, *checks = self._raw(info.offset, info.nbytes).view(np.uint32).tolist()
        if zlib.crc32(self._raw(0, min(i.offset for i in self._infos.values())).data) != header:
            raise CheckpointError(f"{path}: its header is not the one that was written")
        self._checks = dict(zip(names, checks, strict=True))
        self.specs = {name: TensorSpec(name, self._infos[name].shape, self._infos[name].dtype) for name in names}

    def read(self, name: str) -> mx.array:
        info = self._infos[name]
        raw = self._raw(info.offset, info.nbytes)
        if zlib.crc32(raw.data) != self._checks[name]:
            raise CheckpointError(f"{self.path}: the bytes of {name} are not those that were written")
        return to_array(raw, info.dtype, info.shape)

    def _raw(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        raw = np.empty(nbytes, np.uint8)
        self._file.read(offset, raw)
        return raw
