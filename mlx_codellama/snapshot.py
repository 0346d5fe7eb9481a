"""Cache files: a prefilled cache on disk, so that a second question costs only its own tokens.

A file belongs to one model, one storage of keys and values and one rotary setting: keys of another model would not
fail, but give a wrong answer. So the file states what it was made with, and we refuse it if anything differs.
"""

from __future__ import annotations

import hashlib
import operator
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.errors import CacheError, CheckpointError
from mlx_codellama.model import Model
from mlx_codellama.staging import kind
from mlx_codellama.storage import KVStorage
from mlx_codellama.weights import ArraysFile, TensorSpec, read_metadata, write_arrays

FAMILY = "key-value cache"
KIND = f"{FAMILY} 1"  # increased when the layout of the file or of packed rows changes
SAMPLES = 64  # values of each tensor in the fingerprint


def save_cache(path: Path, model: Model, storage: KVStorage, cache: Sequence) -> None:
    """Write a sequence with this storage, one array at a time. Replaces an existing file when the new one is complete.

    Replaces only cache files and empty files. Raises CacheError for any other file, OutputError, and ValueError if the
    numbers of ids and tokens differ.
    """
    check_replaceable(path)
    offset, ids = cache.offset, cache.ids
    if len(ids) != offset:
        raise ValueError(f"{len(ids)} ids for a cache of {offset} tokens")
    states = cache.state()  # slices, computed when they are written
    specs = [TensorSpec("ids", (offset,), "int32")]
    for i, state in enumerate(states):
        specs += [TensorSpec(f"layers.{i}.{name}", a.shape, _dtype(a.dtype)) for name, a in state.items()]

    def arrays() -> Iterator[mx.array]:
        yield mx.array(np.array(ids, np.int32))
        for state in states:
            yield from state.values()

    metadata = {"kind": KIND, "offset": str(offset), "horizon": str(cache.horizon), **fingerprint(model, storage)}
    write_arrays(path, specs, arrays(), metadata)


def load_cache(path: Path, model: Model, storage: KVStorage) -> Sequence:
    """The sequence of `save_cache`.

    Raises CacheError for a file that is damaged, no cache file, or made with another model or setting.
    """
    try:
        file = ArraysFile(path)
        _check_origin(path, file.metadata, fingerprint(model, storage))
        return _restored(path, file, model, storage)
    except CheckpointError as error:
        hint = "it is made by saving a cache first" if not path.exists() else ""
        raise CacheError(str(error), hint=hint) from None


def check_replaceable(path: Path) -> None:
    """Raise CacheError if `path` names anything but a cache file or an empty file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}", hint="name another file for the cache") from None
    if not stat.S_ISREG(found.st_mode):
        raise CacheError(
            f"{path} is {kind(found.st_mode)} and no saved key-value cache", hint="name an ordinary file for the cache"
        )
    if found.st_size and not is_cache(path):
        raise CacheError(f"{path} is not a saved key-value cache, and is kept", hint="name another file for the cache")


def is_cache(path: Path) -> bool:
    """Whether a file is a cache file, of any model or version, even if it is cut after its header."""
    try:
        return read_metadata(path).get("kind", "").startswith(FAMILY)
    except CheckpointError:
        return False


def fingerprint(model: Model, storage: KVStorage) -> dict[str, str]:
    """What must be equal for the maker and the user of a cache file.

    model    the dimensions, the dtype, and SAMPLES values of every tensor: training or quantising changes all tensors
             it touches nearly everywhere. A single altered weight may escape
    rotary   how positions become angles
    storage  bits of keys and values, and the window
    """
    args = model.args
    about = f"{args.num_attention_heads} {args.head_dim} {args.rms_norm_eps!r}"
    window = (
        "everything"
        if storage.window is None
        else f"the first {storage.sinks} and the last {storage.window} tokens in order"
    )
    scaling, context = args.rope_scaling, args.max_position_embeddings
    return {
        "model": sampled_digest(model.named_parameters(), about),
        "rotary": f"theta {args.rope_theta!r}" + ("" if scaling is None else f", {scaling} over {context} tokens"),
        "storage": f"{storage}, {window}",
    }


def sampled_digest(parameters: Iterable[tuple[str, mx.array]], about: str = "") -> str:
    """sha256 over `about` and the name, shape, dtype and SAMPLES values of each array."""
    digest, values = hashlib.sha256(about.encode()), []
    for name, array in sorted(parameters, key=operator.itemgetter(0)):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        flat = array.reshape(-1)
        picked = flat[mx.array(np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int32))]
        values.append(picked.astype(mx.float32) if mx.issubdtype(picked.dtype, mx.floating) else picked)
    mx.eval(values)
    for picked in values:
        digest.update(np.array(picked).tobytes())
    return digest.hexdigest()


def _check_origin(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    if not found.get("kind", "").startswith(FAMILY):
        raise CacheError(f"{path} is not a saved key-value cache", hint="name another file")
    if found["kind"] != KIND:
        raise CacheError(f"{path} was saved by another version of this program ({found['kind'][:40]!r})")
    if found.get("model") != wanted["model"]:
        raise CacheError(
            f"{path} was made with another model, or with this one in another type",
            hint="load the model it was made with (--model, --dtype), or name another file",
        )
    for part, option in (("rotary", "--rope-scaling"), ("storage", "--kv-bits and --window")):
        if found.get(part) != wanted[part]:
            raise CacheError(
                f"{path} has the {part} setting {found.get(part, '')[:100]!r}, here it is {wanted[part]!r}",
                hint=f"load with the same settings ({option}), or name another file",
            )


def _restored(path: Path, file: ArraysFile, model: Model, storage: KVStorage) -> Sequence:
    text = file.metadata.get("offset", "")
    offset, horizon = (_natural(file.metadata.get(name, "")) for name in ("offset", "horizon"))
    cache = make_sequence(model.args, storage)
    names = cache.encoding.names if offset else ()
    stored = _stored(file, cache)
    expected = _expected(cache, model, offset, stored)
    if offset < 0 or horizon < 0 or (offset and not cache.holds(offset, stored)) or file.specs != expected:
        raise CacheError(f"{path} does not hold the arrays of a cache of {text[:20]!r} tokens")
    ids = np.array(file.read("ids"))
    if offset and not 0 <= ids.min() <= ids.max() < model.args.vocab_size:
        raise CacheError(f"{path} holds ids outside the vocabulary")
    layers = range(model.args.num_hidden_layers)
    cache.restore(ids.tolist(), ({name: file.read(f"layers.{i}.{name}") for name in names} for i in layers))
    cache.horizon = horizon
    return cache


def _natural(text: str) -> int:
    """The natural number in text, or -1."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _stored(file: ArraysFile, cache: Sequence) -> int:
    """The number of tokens with keys and values that the file states, or -1."""
    spec = file.specs.get(f"layers.0.{cache.encoding.names[0]}")
    return spec.shape[2] if spec is not None and len(spec.shape) == 4 else -1


def _expected(cache: Sequence, model: Model, offset: int, stored: int) -> dict[str, TensorSpec]:
    """The arrays of a file with `offset` tokens, `stored` of them with keys and values, found by encoding one token."""
    args = model.args
    specs = {"ids": TensorSpec("ids", (max(0, offset),), "int32")}
    if offset <= 0:
        return specs
    token = mx.zeros((1, args.num_key_value_heads, 1, args.head_dim), model.dtype)
    encoded = dict(zip(cache.encoding.names, cache.encoding.encode(token, token), strict=True))
    for i in range(args.num_hidden_layers):
        for name, a in encoded.items():
            shape = (*a.shape[:2], stored, a.shape[3])
            specs[f"layers.{i}.{name}"] = TensorSpec(f"layers.{i}.{name}", shape, _dtype(a.dtype))
    return specs


def _dtype(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
