"""Which files of a folder, or of a repository on the hub, are a model's weights. Names only; nothing is opened here.

Folders hold more than that: adapters, the state of an optimiser, a second precision, Mistral's own form. What counts is
what the index lists if all of it is there, else the one whole file, else a complete set of numbered shards, else what
is named as weights are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from mlx_codellama import inputs
from mlx_codellama.errors import CheckpointError


class Form(NamedTuple):
    """How one format names its files. patterns: the first that matches anything is taken."""

    whole: str
    listing: str  # the index
    patterns: tuple[str, ...]


SAFETENSORS = Form(
    "model.safetensors",
    "model.safetensors.index.json",
    ("model*.safetensors", "weights*.safetensors", "*.safetensors"),
)
BIN = Form("pytorch_model.bin", "pytorch_model.bin.index.json", ("pytorch_model*.bin",))
OTHERS = ("adapter*", "consolidated*", "optimizer*", "scheduler*")  # never a model in this form


class Chosen(NamedTuple):
    """names are the weights, sorted; listed is the index (tensor → file) where it was followed; aside is what else has
    the form's ending."""

    names: list[str]
    listed: dict[str, str] | None
    aside: list[str]


def candidates(names: Iterable[str], form: Form) -> list[str]:
    """The names that may be weights in this form, sorted."""
    return sorted(name for name in _of_form(names, form) if not any(fnmatchcase(name, p) for p in OTHERS))


def _of_form(names: Iterable[str], form: Form) -> list[str]:
    return [
        name
        for name in names
        if not name.startswith(".") and "/" not in name and any(fnmatchcase(name, p) for p in form.patterns)
    ]


def choose(names: Iterable[str], form: Form, *, read: Callable[[str], bytes | str], where: object) -> Chosen:
    """The weights among the names of a folder's files. `read` returns the text of the index; `where` names the folder.

    Raises CheckpointError for an index that is none, for missing and for stale shards, and where there are no weights.
    """
    present = set(names)
    found = candidates(present, form)

    def chosen(wanted: Iterable[str], listed: dict[str, str] | None = None) -> Chosen:
        taken = sorted(wanted)
        return Chosen(taken, listed, sorted(set(_of_form(present, form)) - set(taken)))

    if form.listing in present:
        listed = parse_index(read(form.listing), form.listing, where)
        wanted = set(listed.values())
        if not (missing := sorted(wanted - present)):
            if stale := [name for name in found if numbered(name) and name not in wanted]:
                raise CheckpointError(
                    f"{stale[0]} is beside {form.listing} in {where} but not listed in it", hint="remove stale shards"
                )
            return chosen(wanted, listed)
        if form.whole not in found:
            raise _missing(missing, wanted, where)
    if form.whole in found:
        return chosen([form.whole])
    for pattern in form.patterns:
        matching = [name for name in found if fnmatchcase(name, pattern)]
        shards = [match for match in map(numbered, matching) if match]
        if shards:
            wanted = {f"{m[1]}-{i:05d}-of-{m[3]}{m[4]}" for m in shards for i in range(1, int(m[3]) + 1)}
            if missing := sorted(wanted - present):
                raise _missing(missing, wanted, where)
            return chosen(wanted)
        if matching:
            return chosen(matching)
    raise CheckpointError(f"{where} holds no weights", hint=f"expected {form.patterns[0]}")


def _missing(missing: list[str], wanted: set[str], where: object) -> CheckpointError:
    return CheckpointError(
        f"{len(missing)} of {len(wanted)} weight files of {where} are missing, first {missing[0]}",
        hint="fetch the missing shard",
    )


def parse_index(text: bytes | str, name: str, where: object) -> dict[str, str]:
    """weight_map of an index: tensor name → file name beside it. Raises CheckpointError."""
    try:
        listed = inputs.parse_json(text)["weight_map"]
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise ValueError("weight_map is no table of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} of {where} is no index of shards: {error}") from None
    for file in set(listed.values()):
        if not file or "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
            raise CheckpointError(f"{name} of {where} names {file[:200]!r}, which is no plain file name")
    return dict(listed)


def numbered(name: str) -> re.Match[str] | None:
    """Parts of a shard's name: model-00002-of-00007.safetensors → model, 00002, 00007, .safetensors."""
    return re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)", name)
