"""The pickle inside a torch file, read by an interpreter that knows only tensors.

We do not use Python's unpickler. This interpreter has opcodes for tables, tuples, numbers, strings, and a few named
constructors. Anything else raises UnsafePickleError and does not run. Every argument of a constructor is either used or
checked to have no effect, because an ignored argument could change the numbers.
Opcodes: Lib/pickletools.py of CPython. Constructors: torch/_utils.py, torch/_tensor.py (`_rebuild_from_type_v2`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from mlx_codellama.errors import CheckpointError, UnsafePickleError, shown

STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
REBUILD_PARAMETER_WITH_STATE = ("torch._utils", "_rebuild_parameter_with_state")
REBUILD_FROM_TYPE = ("torch._tensor", "_rebuild_from_type_v2")
ORDERED_DICT = ("collections", "OrderedDict")
TYPES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")}
REBUILDERS = {REBUILD_TENSOR, REBUILD_PARAMETER, REBUILD_PARAMETER_WITH_STATE, REBUILD_FROM_TYPE}
ALLOWED = {*REBUILDERS, *TYPES, ORDERED_DICT, *(("torch", name) for name in STORAGES)}
OTHER_TENSORS = {  # torch's own: harmless, but not plain weights
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "meta tensors, which have a shape and no numbers",
    ("torch._utils", "_rebuild_sparse_tensor"): "sparse tensors",
    ("torch._utils", "_rebuild_nested_tensor"): "nested tensors",
    ("torch._utils", "_rebuild_qtensor"): "tensors that torch has quantised",
    ("torch._utils", "_rebuild_tensor_v3"): "tensors of a type of number that is not read",
    ("torch._utils", "_rebuild_wrapper_subclass"): "tensors of a class of their own",
    ("torch", "ComplexFloatStorage"): "complex numbers",
    ("torch", "ComplexDoubleStorage"): "complex numbers",
}
LIMIT = 1 << 60  # above any size, stride or position of a real tensor


@dataclass(frozen=True)
class StorageRef:
    """A storage of the file: the record data/<key>, numel items of dtype."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor over a storage: offset and strides in items. Checked to be inside the storage.

    negative  torch's negative bit: the values are those of the storage with their signs flipped
    """

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool = False


@dataclass(frozen=True)
class _Global:
    """A name that the pickle requested. It is only a marker; nothing looks it up."""

    module: str
    name: str


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(data: bytes, source: str) -> Any:
    """The value of a torch pickle: dicts, lists, tuples, strings, numbers, None and TensorRef.

    `source` names the file in errors. Raises UnsafePickleError for any name or opcode that tensors do not need, and
    CheckpointError for a damaged pickle. Time and memory are linear in len(data).
    """
    try:
        return _Machine(data, source).run()
    except (IndexError, struct.error, UnicodeDecodeError):
        raise CheckpointError(f"{source} holds a damaged pickle", hint="fetch the file again") from None


class _Machine:
    def __init__(self, data: bytes, source: str) -> None:
        self._data, self._at, self._source = data, 0, source
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            opcode = self._take(1)
            if opcode == b".":
                value = self._stack.pop()
                if self._stack or self._at != len(self._data):
                    raise self._damaged("goes on after its end")
                return value
            step = _STEPS.get(opcode)
            if step is None:
                raise UnsafePickleError(
                    f"{self._source}: the pickle uses an instruction that tensors do not need ({opcode!r})",
                    hint="nothing was executed; take the weights from another source",
                )
            step(self)

    # reading

    def _take(self, n: int) -> bytes:
        end = self._at + n
        if end > len(self._data):
            raise self._damaged("ends early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise self._damaged("ends early")
        line = self._take(end - self._at).decode("utf-8")
        self._at += 1
        return line

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: the pickle {why}", hint="fetch the file again")

    # stack

    def _pop(self, kind: type[Any] | tuple[type[Any], ...] = object) -> Any:
        value = self._stack.pop()
        if isinstance(value, _Mark) or not isinstance(value, kind):
            raise self._damaged("has a value of the wrong kind")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise self._damaged("has a value of the wrong kind")
        return self._stack[-1]

    # instructions

    def proto(self) -> None:
        if self._number("<B") > 5:
            raise self._damaged("is of an unknown protocol")

    def frame(self) -> None:
        self._number("<Q")  # only a hint for buffering

    def unicode(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "strict"))

    def bytes_(self, form: str) -> None:
        n = self._number(form)
        if n < 0:
            raise self._damaged("has a text of negative length")
        self._push(self._take(n).decode("latin-1"))  # Python 2 wrote names this way

    def long1(self) -> None:
        self._push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def tuple_(self, n: int) -> None:
        items = [self._pop() for _ in range(n)]
        self._push(tuple(reversed(items)))

    def global_(self, module: str, name: str) -> None:
        if what := OTHER_TENSORS.get((module, name)):
            raise CheckpointError(
                f"{self._source} holds {what}", hint="save the weights as plain tensors, best as safetensors"
            )
        if (module, name) not in ALLOWED:
            raise UnsafePickleError(
                f"{self._source}: the pickle asks for {module[:100]}.{name[:100]}, which is no tensor",
                hint="nothing was executed; do not trust this file",
            )
        self._push(_Global(module, name))

    def stack_global(self) -> None:
        name, module = self._pop(str), self._pop(str)
        self.global_(module, name)

    def persistent(self) -> None:
        pid = self._pop(tuple)
        if len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Global) or pid[1].name not in STORAGES:
            raise self._damaged("refers to something that is no storage")
        key, numel = pid[2], pid[4]
        if not isinstance(key, str) or not _natural(numel):
            raise self._damaged("refers to a malformed storage")
        self._push(StorageRef(STORAGES[pid[1].name], key, numel))

    def reduce(self) -> None:
        args, function = self._pop(tuple), self._pop(_Global)
        name = (function.module, function.name)
        if name == ORDERED_DICT and not args:
            self._push({})
        else:
            self._push(self._rebuilt(name, args))

    def _rebuilt(self, name: tuple[str, str], args: Any) -> TensorRef:
        """The tensor that a constructor makes of its arguments. The unused ones are checked to have no effect."""
        if name == REBUILD_FROM_TYPE and isinstance(args, tuple) and len(args) == 4:
            inner, kind, given, state = args
            known = isinstance(inner, _Global) and isinstance(kind, _Global) and (kind.module, kind.name) in TYPES
            if known and (inner.module, inner.name) in REBUILDERS - {REBUILD_FROM_TYPE} and self._is_plain(state):
                return self._rebuilt((inner.module, inner.name), given)
        elif name in (REBUILD_PARAMETER, REBUILD_PARAMETER_WITH_STATE) and isinstance(args, tuple):
            n = 3 if name == REBUILD_PARAMETER else 4
            usual = len(args) == n and isinstance(args[0], TensorRef) and _says_nothing(args[1], args[2])
            if usual and self._is_plain(args[3] if n == 4 else None):
                return args[0]  # type: ignore[no-any-return]
        elif isinstance(args, tuple) and len(args) in (6, 7) and _says_nothing(args[4], args[5]):
            tensor = self._tensor(*args[:4])
            return replace(tensor, negative=True) if self._is_negative(*args[6:]) else tensor
        raise self._damaged(f"calls {name[1]} with something else than tensors need")

    def _is_negative(self, metadata: Any = None) -> bool:
        """Whether torch's _get_tensor_metadata sets the negative bit. Other metadata is refused."""
        if metadata is None or (isinstance(metadata, dict) and not any(metadata.values())):
            return False
        if metadata == {"neg": True}:
            return True
        raise CheckpointError(
            f"{self._source} holds a tensor with the metadata {shown(metadata)}, which is not read",
            hint="save the weights as plain tensors, best as safetensors",
        )

    def _is_plain(self, state: Any) -> bool:
        """Whether the attributes of a tensor are annotations (such as `partition_dim`) without effect on its values."""
        if state is None:
            return True
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        notes = [part for part in parts if part is not None]
        return all(isinstance(part, dict) for part in notes) and all(
            isinstance(key, str) and key not in ("data", "grad") and isinstance(value, (str, int, float, type(None)))
            for part in notes
            for key, value in part.items()
        )

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:
        if not (isinstance(storage, StorageRef) and _natural(offset) and _naturals(shape) and _naturals(strides)):
            raise self._damaged("describes a tensor with values of the wrong kind")
        if len(shape) != len(strides) or len(shape) > 8:
            raise self._damaged("describes a tensor whose shape and strides do not match")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (0 not in shape and last >= storage.numel) or offset > storage.numel:
            raise self._damaged(f"describes a tensor beyond the end of storage {storage.key[:50]}")
        return TensorRef(storage, offset, shape, strides)

    def build(self) -> None:
        self._pop(dict)  # the _metadata of a state dict: versions of modules, not weights
        self._top(dict)

    def set_items(self, items: list[Any]) -> None:
        table = self._top(dict)
        if len(items) % 2:
            raise self._damaged("has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise self._damaged("has a key that is no name")
            if key in table:
                raise self._damaged(f"names {str(key)[:200]!r} twice")
            table[key] = value

    def append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def put(self, index: int) -> None:
        if self._stack[-1] is _MARK:
            raise self._damaged("remembers a mark")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise self._damaged("recalls what it never stored")
        self._push(self._memo[index])


def _says_nothing(requires_grad: object, hooks: object) -> bool:
    """Whether the training arguments of a constructor are what torch always writes: a flag, and no hooks."""
    return isinstance(requires_grad, bool) and hooks == {}


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < LIMIT


def _naturals(values: object) -> bool:
    return isinstance(values, tuple) and all(map(_natural, values))


_STEPS: dict[bytes, Any] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b"(": lambda m: m._push(_MARK),
    b"0": lambda m: m._pop(),
    b"1": lambda m: m._pop_to_mark(),
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m.tuple_(1),
    b"\x86": lambda m: m.tuple_(2),
    b"\x87": lambda m: m.tuple_(3),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"G": lambda m: m._push(m._number(">d")),
    b"\x8a": _Machine.long1,
    b"X": lambda m: m.unicode("<I"),
    b"\x8c": lambda m: m.unicode("<B"),
    b"T": lambda m: m.bytes_("<i"),
    b"U": lambda m: m.bytes_("<B"),
    b"c": lambda m: m.global_(m._line(), m._line()),
    b"\x93": _Machine.stack_global,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"s": lambda m: m.set_items([m._pop(), m._pop()][::-1]),
    b"u": lambda m: m.set_items(m._pop_to_mark()),
    b"a": lambda m: m.append([m._pop()]),
    b"e": lambda m: m.append(m._pop_to_mark()),
    b"q": lambda m: m.put(m._number("<B")),
    b"r": lambda m: m.put(m._number("<I")),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"h": lambda m: m.get(m._number("<B")),
    b"j": lambda m: m.get(m._number("<I")),
}
