"""Write a checkpoint as a whole or not at all.

We write into a hidden folder beside the output, sync it, and rename it to the output's name (`staging`). A killed
process leaves that folder behind, and the next save to the same place removes it. `overwrite` replaces a folder only if
this program wrote it and it holds nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_codellama import inputs
from mlx_codellama.config import load_config
from mlx_codellama.errors import CheckpointError, OutputError, OutputExistsError, bytes_text
from mlx_codellama.staging import folder_beside, is_staged, kind, place_folder, sync_folder, write_at, writing
from mlx_codellama.weights.checkpoint import COMPANIONS, INDEX
from mlx_codellama.weights.header import header_bytes
from mlx_codellama.weights.run import TOOL, read_run, run_text
from mlx_codellama.weights.specs import Block, Progress, Stream, TensorSpec

CACHE_BYTES = 256 << 20
COMPANION_BYTES = 64 << 20  # limit for a copied file; the largest, tokenizer.json, has 2 to 20 MB
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

    overwrite        replace an existing model folder when the new one is complete
    progress         called after every block
    max_shard_bytes  a tensor that would exceed this starts a new file
    run              added to run.json, besides stream.record, versions and times

    Raises OutputExistsError before any work, OutputError if the disk is full or fails, and whatever the stream raises.
    In each case, and on Ctrl-C, `out` stays as it was and nothing else remains.
    """
    out = Path(os.path.abspath(out))
    specs = list(stream.specs)
    refuse_existing(out, overwrite)
    plan = _Plan(specs, max_shard_bytes)
    names = {*plan.files, *stream.files, *([INDEX] if len(plan.files) > 1 else []), "config.json", "run.json"}

    def owned(entry: Path) -> bool:
        return _is_written(entry, names)

    with _parents(out), folder_beside(out, owned) as folder:
        refuse_existing(out, overwrite)
        companions = {name: _companion(path) for name, path in stream.files.items()}
        _check_space(out.parent, plan.nbytes + sum(map(len, companions.values())))
        started = time.monotonic()
        _write_tensors(folder, stream, plan, progress, started)
        with writing(out):
            for name, data in companions.items():
                _write_file(folder / name, data)
            if len(plan.files) > 1:
                _write_json(folder / INDEX, plan.index())
            _write_json(folder / "config.json", stream.args.to_dict())
            record = _run_record(stream, run, time.monotonic() - started) | {"files": sorted(names)}
            _write_file(folder / "run.json", run_text(record).encode())
            load_config(folder)  # check that it can be read
            _keep_modes(folder, out)
            sync_folder(folder)
            replaceable = {*names, *_listed(out)}
            place_folder(
                folder, out, lambda entry: _is_written(entry, replaceable), lambda old: _check_replaceable(old, out)
            )
    return out


# ── what stands in the way ──────────────────────────────────────────────────────────────────────────────────────────


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise OutputExistsError if `save` would refuse to write."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists", hint="choose another folder, or pass --overwrite")
    _check_replaceable(out, out)


def refuse_source_within(out: Path, source: Path) -> None:
    """Raise OutputExistsError if replacing `out` would delete the source, because it or its files are inside.

    Follows links and compares files by identity, so another name of the same file is found too.
    """
    if not out.is_dir() or not source.exists():
        return
    home, inside = out.resolve(), {(found.st_dev, found.st_ino) for found in _found(out)}
    files = [source, *(sorted(source.iterdir()) if source.is_dir() else [])]
    for path in files:
        where = path.resolve()
        if where.is_relative_to(home) or (path.is_file() and _identity(path) in inside):
            named = source if path == source else path
            raise OutputExistsError(
                f"{out} holds the source {named}, which would be lost",
                hint="name another folder; remove the source afterwards if you want to",
            )


def _found(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            yield path.stat()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _check_replaceable(folder: Path, out: Path) -> None:
    """Raise OutputExistsError if the folder, which is or was `out`, holds anything that we did not write."""
    mode = os.lstat(folder).st_mode
    if stat.S_ISLNK(mode):
        raise OutputExistsError(
            f"{out} is a symbolic link, which is not replaced", hint="name the folder that it points to, or another one"
        )
    if not stat.S_ISDIR(mode):
        raise OutputExistsError(
            f"{out} exists and is no model folder, but {kind(mode)}", hint="it is not replaced; choose another folder"
        )
    if not mode & 0o222 or not os.access(folder, os.W_OK | os.X_OK):  # even if root could write it
        raise OutputExistsError(
            f"{out} is read-only, and is not replaced", hint="allow writing with chmod u+w, or choose another folder"
        )
    names = sorted(os.listdir(folder))
    if not names:
        return
    made_here = _run_of(folder).get("tool") == TOOL
    listed = _listed(folder)
    foreign = [name for name in names if not _is_written(folder / name, listed)]
    if made_here and not foreign:
        return
    shown = ", ".join(repr(name) for name in (foreign or names)[:3])
    more = f" and {len(foreign or names) - 3} more" if len(foreign or names) > 3 else ""
    if made_here:
        raise OutputExistsError(
            f"{out} holds what is no part of the model: {shown}{more}",
            hint="move that away, or choose another folder",
        )
    raise OutputExistsError(
        f"{out} exists and is no model folder that this program wrote; it holds {shown}{more}",
        hint="it is not replaced; choose another folder",
    )


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_OTHERS = {INDEX, "config.json", "run.json", *COMPANIONS}


def _is_written(entry: Path, more: Collection[str]) -> bool:
    """Whether an entry of a model folder is an ordinary file of a name that `save` writes, or one of `more`."""
    try:
        if not stat.S_ISREG(os.lstat(entry).st_mode):
            return False
    except FileNotFoundError:
        return True
    return bool(_WEIGHTS.fullmatch(entry.name)) or entry.name in _OTHERS or entry.name in more or is_staged(entry)


def _listed(folder: Path) -> set[str]:
    """The files that the folder's run.json says were written, if it is ours."""
    run = _run_of(folder)
    files = run.get("files") if run.get("tool") == TOOL else None
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _run_of(folder: Path) -> dict[str, Any]:
    try:
        return read_run(folder)
    except CheckpointError:
        return {}


def _keep_modes(folder: Path, out: Path) -> None:
    """Give the new folder and its files the modes of the old ones."""
    if out.is_dir():
        for path in folder.iterdir():
            old = out / path.name
            if old.is_file():
                path.chmod(stat.S_IMODE(old.stat().st_mode))
        folder.chmod(stat.S_IMODE(out.stat().st_mode))


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes + MARGIN_BYTES > free:
        raise OutputError(
            f"the model takes {bytes_text(nbytes)} and {bytes_text(MARGIN_BYTES)} beside it, "
            f"{folder} has {bytes_text(free)} free",
            hint="free some space, or quantise to fewer bits",
        )


def _companion(path: Path) -> bytes:
    try:
        return inputs.read_bytes(path, COMPANION_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above out. If the work fails, remove those that we made."""
    absent = [folder for folder in out.parents if not folder.exists()]  # the innermost first
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in absent:
            with contextlib.suppress(OSError):  # absent, or no longer empty
                folder.rmdir()
        raise


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Plan:
    """The file and offset of each tensor: tensors in order, in files of at most max_shard_bytes."""

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
    """The files being written. Each is opened at its first byte, synced and closed at its last."""

    def __init__(self, folder: Path, plan: _Plan) -> None:
        self._folder, self._plan = folder, plan
        self._open: dict[str, int] = {}
        self._left = {name: plan.sizes[name] - len(header) for name, header in plan.files.items()}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
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
            with writing(folder):
                shards.write(name, offset + block.start * spec.row_bytes, data)
            done += len(data)
            uncleared += len(data)
            del block, data
            if uncleared > CACHE_BYTES:
                mx.clear_cache()  # otherwise the allocator keeps freed blocks
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
        "tool": TOOL,
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
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        write_at(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
