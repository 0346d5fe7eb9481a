"""Read files as blocks of rows: positioned reads, a finiteness check, hashes, and one thread that reads ahead.

No file is mapped into memory, so resident memory is N_BUFFERS blocks, whatever the size of the model.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_codellama import inputs
from mlx_codellama.errors import CheckpointError, NonFiniteError
from mlx_codellama.weights.specs import BLOCK_BYTES, Block, TensorSpec

Bytes = NDArray[np.uint8]

N_BUFFERS = 3  # one with the consumer, one ready, one being read
EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # all bits set: NaN or infinity
CHECK_BYTES = 4 << 20
BESIDE_BYTES = 1 << 18  # reads of this size or more use a second thread
MAX_GAP = 1 << 16  # a gap between reads up to this size is read too, so that the checksum can continue
CHUNK = 1 << 18  # items per finiteness check; fits L2


_reader = threading.local()  # hashes: whether this thread reads for a BlockReader; beside: its helper thread


class InputFile:
    """One file of a checkpoint, read at positions. BlockReader's thread also hashes what it reads and compares it with
    the checksums that the file states for its parts (`expect`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest: Any = None
        self._sums: dict[int, _Sum] = {}  # by offset
        self._starts: list[int] = []
        self._fd = -1
        try:
            self._fd = inputs.open_regular(path)
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, out: Bytes) -> None:
        """Fill out (contiguous bytes) from `offset`. Raises CheckpointError if the file ends or the disk fails."""
        view = out.reshape(-1).data
        self._fill(offset, view)
        if self._digest is not None and getattr(_reader, "hashes", False):
            if self._sums and len(view) >= BESIDE_BYTES:  # hash and checksum take about as long, so each gets a core
                checked = _reader.beside.submit(self._check, offset, view)
                self._digest.update(view)
                checked.result()
            else:
                self._digest.update(view)
                self._check(offset, view)
            if hasattr(os, "posix_fadvise"):
                # We read once, so return the pages: with a full page cache, finding room costs more than reading.
                os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _fill(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends at {offset + done} bytes, in the middle of a tensor", hint="fetch the file again"
                )
            done += got

    def expect(self, offset: int, nbytes: int, crc: int) -> None:
        """Register the expected CRC-32 of a part of the file. Parts do not overlap."""
        self._sums[offset] = _Sum(offset, nbytes, crc)
        self._starts = sorted(self._sums)

    def begin(self) -> None:
        """Start hashing and checking what the reader's thread reads."""
        self._digest = hashlib.sha256()
        for part in self._sums.values():
            part.done = part.value = 0
            part.touched = False

    def end(self) -> str:
        """The sha256 of what was read since `begin`."""
        digest, self._digest = self._digest, None
        return str(digest.hexdigest())

    def check_rest(self) -> None:
        """Read the rest of parts that were read partly or out of order. Raises CheckpointError."""
        for part in self._sums.values():
            while part.touched and part.done < part.nbytes:
                piece = np.empty(min(CHECK_BYTES, part.nbytes - part.done), np.uint8)
                at = part.offset + part.done
                self._fill(at, piece.data)
                self._count(part, at, piece.data)

    def _check(self, offset: int, view: memoryview) -> None:
        at = bisect.bisect_right(self._starts, offset) - 1
        if at >= 0:
            part = self._sums[self._starts[at]]
            if offset + len(view) <= part.offset + part.nbytes:
                part.touched = True
                missing = offset - part.offset - part.done
                if 0 < missing <= MAX_GAP:  # the header that an array is stored with
                    gap = np.empty(missing, np.uint8)
                    self._fill(offset - missing, gap.data)
                    self._count(part, offset - missing, gap.data)
                self._count(part, offset, view)

    def _count(self, part: _Sum, offset: int, view: memoryview) -> None:
        """Extend the checksum of a part, if these bytes continue it."""
        known = part.offset + part.done - offset
        if 0 <= known < len(view):
            part.value = zlib.crc32(view[known:], part.value)
            part.done += len(view) - known
            if part.done == part.nbytes and part.value != part.crc:
                raise CheckpointError(
                    f"{self.path}: the {part.nbytes:,} bytes from {part.offset:,} on do not match the file's checksum",
                    hint="the file is damaged; fetch it again",
                )


@dataclass
class _Sum:
    """A part of a file, its expected CRC-32, and the progress of the check."""

    offset: int
    nbytes: int
    crc: int
    done: int = 0
    value: int = 0
    touched: bool = False


class Rows(Protocol):
    """A tensor that can be read by rows of axis 0, wherever its bytes are stored.

    dtype, shape  as stored
    step          rows come in multiples of this (an attention head whose rows are permuted, say)
    files         every file that read() touches
    read()        fill out [stop - start, row bytes] (uint8, contiguous)
    """

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def files(self) -> list[InputFile]: ...
    def read(self, start: int, stop: int, out: Bytes) -> None: ...


class FileRows:
    """A tensor whose rows are contiguous in one file."""

    step = 1

    def __init__(self, file: InputFile, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.file, self.offset, self.dtype, self.shape = file, offset, dtype, shape
        self.files = [file]
        self.row_bytes = TensorSpec("", shape, dtype).row_bytes
        if offset < 0 or offset + TensorSpec("", shape, dtype).nbytes > file.size:
            raise CheckpointError(f"{file.path} is too short for its tensors", hint="fetch the file again")

    def read(self, start: int, stop: int, out: Bytes) -> None:
        self.file.read(self.offset + start * self.row_bytes, out)


def stored_bytes(rows: Rows) -> int:
    return TensorSpec("", rows.shape, rows.dtype).nbytes


def row_bytes(rows: Rows) -> int:
    return TensorSpec("", rows.shape, rows.dtype).row_bytes


def check_finite(raw: Bytes, dtype: str, name: str) -> None:
    """Raise NonFiniteError if raw (contiguous bytes of float16, bfloat16 or float32) holds NaN or infinity."""
    mask = EXPONENT.get(dtype)
    if mask is None:
        return
    items = raw.reshape(-1).view(np.uint32 if dtype == "float32" else np.uint16)
    scratch = np.empty(min(CHUNK, items.size), items.dtype)
    for i in range(0, items.size, CHUNK):
        part = items[i : i + CHUNK]
        if np.bitwise_and(part, items.dtype.type(mask), out=scratch[: part.size]).max() == mask:
            raise NonFiniteError(
                f"{name} holds NaN or infinity",
                hint="the weights are damaged; fetch the files again or take another copy",
            )


def to_array(raw: Bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """A copy of raw bytes as an MLX array."""
    numbers = raw.reshape(-1).view(np.uint16 if dtype == "bfloat16" else np.dtype(dtype)).reshape(shape)
    array = mx.array(numbers)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def cast(array: mx.array, dtype: str, name: str) -> mx.array:
    """array in another floating-point dtype. Raises NonFiniteError if a finite weight overflows it."""
    wanted = getattr(mx, dtype)
    if array.dtype == wanted:
        return array
    array = array.astype(wanted)
    if not mx.all(mx.isfinite(array)).item():
        raise NonFiniteError(
            f"{name} has weights too large for {dtype}", hint="convert to bfloat16, which has the range of float32"
        )
    return array


def read_rows(rows: Rows, spec: TensorSpec, start: int, stop: int) -> mx.array:
    """Rows start .. stop of one tensor, checked and in spec's dtype. start and stop need not be multiples of step."""
    first, last = start - start % rows.step, min(-(-stop // rows.step) * rows.step, rows.shape[0])
    raw = np.empty((last - first, row_bytes(rows)), np.uint8)
    rows.read(first, last, raw)
    raw = raw[start - first : stop - first]
    check_finite(raw, rows.dtype, spec.name)
    return cast(to_array(raw, rows.dtype, (stop - start, *rows.shape[1:])), spec.dtype, spec.name)


def keep_freed_memory() -> None:
    """Let malloc reuse blocks of up to 64 MiB and keep up to 256 MiB of free memory. Does nothing without glibc.

    By default glibc maps every large block again, and the system clears its pages one fault at a time. That takes a
    fifth of the time of a conversion (benchmarks/convert.py).
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 64 << 20)
        mallopt(trim_threshold, 256 << 20)


class BlockReader:
    """All blocks of a checkpoint, in the order of specs. A thread reads one block ahead.

    Only one pass at a time. After a complete pass, `digests` holds the sha256 of each file's tensor bytes in reading
    order. Hashing is part of reading, so no byte is read twice.
    """

    def __init__(
        self, specs: Iterable[TensorSpec], rows: Mapping[str, Rows], *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.specs, self.rows = list(specs), rows
        self.total_bytes = sum(stored_bytes(rows[spec.name]) for spec in self.specs)
        self.done_bytes = 0
        self.digests: dict[str, str] = {}
        self._block_bytes = block_bytes

    def _parts(self) -> Iterator[tuple[TensorSpec, Rows, int, int]]:
        for spec in self.specs:
            rows = self.rows[spec.name]
            count = max(1, self._block_bytes // max(1, row_bytes(rows)) // rows.step) * rows.step
            for start in range(0, rows.shape[0], count):
                yield spec, rows, start, min(start + count, rows.shape[0])

    def blocks(self) -> Iterator[Block]:
        keep_freed_memory()
        files = {id(file): file for rows in self.rows.values() for file in rows.files}.values()
        self.done_bytes, self.digests = 0, {}
        for file in files:
            file.begin()
        free: queue.SimpleQueue[Bytes | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[tuple[TensorSpec, Rows, int, int, Bytes] | BaseException | None] = queue.SimpleQueue()
        for _ in range(N_BUFFERS):
            free.put(np.empty(0, np.uint8))
        thread = threading.Thread(target=self._read_ahead, args=(free, ready), name="weights-reader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                spec, rows, start, n_rows, buffer = item
                nbytes = n_rows * row_bytes(rows)
                array = to_array(buffer[:nbytes], rows.dtype, (n_rows, *rows.shape[1:]))
                free.put(buffer)
                array = cast(array, spec.dtype, spec.name)
                self.done_bytes += nbytes
                yield Block(spec.name, start, array)
            thread.join()
            self.digests = {file.path.name: file.end() for file in files}
        finally:
            free.put(None)
            thread.join()

    def _read_ahead(self, free: queue.SimpleQueue[Any], ready: queue.SimpleQueue[Any]) -> None:
        _reader.hashes = True
        _reader.beside = ThreadPoolExecutor(1, thread_name_prefix="weights-sums")
        try:
            for spec, rows, start, stop in self._parts():
                nbytes = (stop - start) * row_bytes(rows)
                buffer = free.get()
                if buffer is None:
                    return
                if buffer.size < nbytes:
                    buffer = np.empty(nbytes, np.uint8)
                rows.read(start, stop, buffer[:nbytes].reshape(stop - start, -1))
                check_finite(buffer[:nbytes], rows.dtype, spec.name)
                ready.put((spec, rows, start, stop - start, buffer))
            for file in {id(file): file for rows in self.rows.values() for file in rows.files}.values():
                file.check_rest()
            ready.put(None)
        except BaseException as error:  # raised again in the consumer's thread
            ready.put(error)
        finally:
            _reader.beside.shutdown()
