"""Writing a checkpoint: all of it or nothing.

Everything goes into a hidden folder beside the output, is synced, and takes the output's name in one rename. A killed
process leaves that folder behind, unlocked; the next save to the same place removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_codellama import inputs
from mlx_codellama.config import load_config
from mlx_codellama.errors import CheckpointError, OutputError, OutputExistsError
from mlx_codellama.weights.checkpoint import INDEX
from mlx_codellama.weights.header import header_bytes
from mlx_codellama.weights.run import run_text
from mlx_codellama.weights.specs import Block, Progress, Stream, TensorSpec

CACHE_BYTES = 256 << 20
COMPANION_BYTES = 64 << 20  # of a file that is copied; the largest, tokenizer.json, has 2 to 20 MB
MARGIN_BYTES = 4 << 20  # JSON files and the file system's own needs


def save(
    out: str | Path,
    stream: Stream,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    max_shard_bytes: int = 4 << 30,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write a stream as a checkpoint folder: model*.safetensors, config.json, stream.files and run.json.

    overwrite        replace an existing model folder, once the new one is complete
    progress         called after every block
    max_shard_bytes  tensors go to a new file where they would exceed this
    run              added to run.json beside stream.record, versions and times

    Raises OutputExistsError before any work, OutputError where the disk is full or refuses, and whatever the stream
    raises. In every case, and on Ctrl-C, the old state of `out` is kept and nothing else is left.
    """
    out = Path(os.path.abspath(out))
    specs = list(stream.specs)
    refuse_existing(out, overwrite)
    plan = _Plan(specs, max_shard_bytes)
    old = out.with_name(f".{out.name}.old")
    with _parents(out), _temporary(out.with_name(f".{out.name}.partial")) as folder:
        _recover(out, old)
        refuse_existing(out, overwrite)
        companions = {name: _companion(path) for name, path in stream.files.items()}
        _check_space(out.parent, plan.nbytes + sum(map(len, companions.values())))
        started = time.monotonic()
        _write_tensors(folder, stream, plan, progress, started)
        with _writing(out):
            for name, data in companions.items():
                _write_file(folder / name, data)
            if len(plan.files) > 1:
                _write_json(folder / INDEX, plan.index())
            _write_json(folder / "config.json", stream.args.to_dict())
            _write_file(folder / "run.json", run_text(_run_record(stream, run, time.monotonic() - started)).encode())
            load_config(folder)  # what was written can be read
            sync_folder(folder)
            _swap(folder, out, old)
            sync_folder(out.parent)
    return out


# ── what stands in the way ──────────────────────────────────────────────────────────────────────────────────────────


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise OutputExistsError where `save` would not write."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists", hint="choose another folder, or pass --overwrite")
    if out.is_symlink():
        raise OutputExistsError(
            f"{out} is a symbolic link, which is not replaced", hint="name the folder that it points to, or another one"
        )
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise OutputExistsError(
            f"{out} exists and is no model folder", hint="it is not replaced; choose another folder"
        )


def _recover(out: Path, old: Path) -> None:
    """Undo a replacement that was cut off between its two steps."""
    if old.exists():
        with _writing(out):
            if out.exists():
                shutil.rmtree(old)
            else:
                old.rename(out)


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes + MARGIN_BYTES > free:
        raise OutputError(
            f"the model takes {nbytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free",
            hint="free some space, or quantise to fewer bits",
        )


def _companion(path: Path) -> bytes:
    try:
        return inputs.read_bytes(path, COMPANION_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of the operating system as OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run the same command again"
        else:
            hint = "check the folder's permissions"
        raise OutputError(f"cannot write {out}: {error.strerror or error}", hint=hint) from error


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above out; those that were not there go again where the work fails."""
    absent = [folder for folder in out.parents if not folder.exists()]  # the innermost first
    try:
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in absent:
            with contextlib.suppress(OSError):  # not there, or somebody put something into it
                folder.rmdir()
        raise


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A locked, empty folder that is gone afterwards, unless it was renamed. Removes one that a killed run left."""
    with _writing(folder):
        lock = _locked(folder)
    try:
        with _writing(folder):
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield folder
    finally:
        try:
            if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _locked(folder: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner just finished
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OutputError(f"another process is writing {folder}", hint="wait for it, or stop it") from None
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
        os.close(lock)


def _swap(folder: Path, out: Path, old: Path) -> None:
    """Give folder the name out; an out that exists is replaced, in one step where the system can."""
    if not out.exists():
        folder.rename(out)
    elif _exchange(folder, out):
        shutil.rmtree(folder)
    else:
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux renameat2, macOS renamex_np). False where that is not to be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0)
        return bool(libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0)
    except AttributeError:
        return False


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Plan:
    """Which tensor goes where: tensors in order, a new file where max_shard_bytes would be exceeded."""

    def __init__(self, specs: list[TensorSpec], max_shard_bytes: int) -> None:
        groups: list[list[TensorSpec]] = []
        room = 0
        for spec in specs:
            if not groups or spec.nbytes > room:
                groups.append([])
                room = max_shard_bytes
            groups[-1].append(spec)
            room -= spec.nbytes
        self.files: dict[str, bytes] = {}  # name → header
        self.sizes: dict[str, int] = {}
        self.places: dict[str, tuple[str, int]] = {}  # tensor → file, offset
        for i, group in enumerate(groups, 1):
            name = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            header = header_bytes([(spec.name, spec.dtype, spec.shape, spec.nbytes) for spec in group])
            end = len(header)
            for spec in group:
                self.places[spec.name] = (name, end)
                end += spec.nbytes
            self.files[name], self.sizes[name] = header, end
        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise CheckpointError("the stream names a tensor twice")

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def index(self) -> dict[str, Any]:
        total = sum(spec.nbytes for spec in self.specs.values())
        weight_map = {name: self.places[name][0] for name in sorted(self.places)}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


class _Shards:
    """The files being written: each is opened at its first byte, synced and closed at its last."""

    def __init__(self, folder: Path, plan: _Plan) -> None:
        self._folder, self._plan = folder, plan
        self._open: dict[str, int] = {}
        self._left = {name: plan.sizes[name] - len(header) for name, header in plan.files.items()}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            write_at(self._open[name], memoryview(self._plan.files[name]), 0)
        write_at(self._open[name], data, offset)
        self._left[name] -= len(data)
        if not self._left[name]:
            fd = self._open.pop(name)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of data; → its length in bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


def _write_tensors(
    folder: Path, stream: Stream, plan: _Plan, progress: Callable[[Progress], None] | None, started: float
) -> None:
    rows = dict.fromkeys(plan.specs, 0)
    done = uncleared = 0
    shards = _Shards(folder, plan)
    blocks = stream.blocks()
    try:
        for block in blocks:
            spec = _checked(block, plan, rows)
            data = raw_bytes(block.array)
            tensor = block.name
            name, offset = plan.places[tensor]
            with _writing(folder):
                shards.write(name, offset + block.start * spec.row_bytes, data)
            done += len(data)
            uncleared += len(data)
            del block, data
            if uncleared > CACHE_BYTES:
                mx.clear_cache()  # freed blocks would otherwise stay with the allocator
                uncleared = 0
            if progress is not None:
                progress(_progress(stream, plan, done, tensor, time.monotonic() - started))
        if short := [name for name, count in rows.items() if count < plan.specs[name].shape[0]]:
            raise CheckpointError(f"{short[0]} came with {rows[short[0]]} of {plan.specs[short[0]].shape[0]} rows")
    finally:
        shards.close()
        if isinstance(blocks, contextlib.AbstractContextManager) or hasattr(blocks, "close"):
            blocks.close()


def _checked(block: Block, plan: _Plan, rows: dict[str, int]) -> TensorSpec:
    """The block's spec, if the block is the next rows of a tensor of the plan."""
    spec = plan.specs.get(block.name)
    if spec is None:
        raise CheckpointError(f"the stream yields {block.name!r}, which it did not announce")
    shape, dtype = tuple(block.array.shape), str(block.array.dtype).removeprefix("mlx.core.")
    if shape[1:] != spec.shape[1:] or dtype != spec.dtype:
        raise CheckpointError(f"{block.name} came as {dtype} {shape}, announced as {spec.dtype} {spec.shape}")
    if block.start != rows[block.name] or block.start + shape[0] > spec.shape[0]:
        raise CheckpointError(
            f"{block.name} came with rows {block.start} to {block.start + shape[0]} after {rows[block.name]} rows"
        )
    rows[block.name] += shape[0]
    return spec


def raw_bytes(array: mx.array) -> memoryview:
    """The array's bytes, row-major."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    numbers = np.ascontiguousarray(np.array(array, copy=False))
    return numbers.reshape(-1).view(np.uint8).data


def _progress(stream: Stream, plan: _Plan, written: int, name: str, elapsed_s: float) -> Progress:
    total = getattr(stream, "total_bytes", 0)
    if total:
        return Progress(stream.done_bytes, total, name, elapsed_s)
    return Progress(written, sum(spec.nbytes for spec in plan.specs.values()), name, elapsed_s)


# ── small files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _run_record(stream: Stream, run: dict[str, Any] | None, elapsed_s: float) -> dict[str, Any]:
    from mlx_codellama import __version__

    return {
        "tool": "mlx-codellama",
        "version": __version__,
        "mlx": version("mlx"),
        "python": sys.version.split()[0],
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 3),
        "source": dict(stream.record),
        **(run or {}),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    _write_file(path, (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _write_file(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_at(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
