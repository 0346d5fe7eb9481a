"""The architecture as a test: who may import whom, and who may touch the outside world.

LAYERS reads from bottom to top; docs/architecture.md shows the same table and is compared with it here. Every rule is
a function from sources to findings, run twice: over the real tree, where it must find nothing, and over a seeded fault,
where it must find it. Without the second run a rule that matches nothing would pass for ever.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mlx_codellama

ROOT = Path(__file__).resolve().parents[1]
PKG = "mlx_codellama"
MAPPED = ("convert", "quant")  # folders at the root, packages of mlx_codellama once installed

LAYERS = [
    {"errors", "env", "inputs"},
    {"rotary", "config_keys", "shards", "staging"},
    {"config", "storage", "tokenizer", "sandbox", "hub", "blas", "limits"},
    {"prompts", "hole", "repository", "memory", "kernels"},
    {"cache", "sampling", "lookup", "weights", "source_file", "fitting"},
    {"linear", "conversation"},
    {"fusion"},
    {"layers"},
    {"model", "lora"},
    {"placement"},
    {"loader", "engine", "snapshot"},
    {"api"},
    {"convert", "quant", "train", "selfinstruct", "eval", "server", "diagnosis"},
    {"cli"},
    {"__main__"},
]
PUBLIC = {"CodeLlama": "api", "Completion": "api", "load": "api", "CodeLlamaError": "errors", "NotSupported": "errors"}
DATA_ONLY = {"demo"}  # a package without code: the bundled checkpoint
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Third parties and the only parts that may name them. The standard library is free.
MODEL_SIDE = {
    "kernels",
    "linear",
    "fusion",
    "layers",
    "cache",
    "sampling",
    "weights",
    "model",
    "lora",
    "placement",
    "loader",
    "engine",
    "snapshot",
    "api",
}
ABOVE = {"convert", "quant", "train", "selfinstruct", "eval"}
HOMES = {
    "mlx": MODEL_SIDE | ABOVE,
    "numpy": MODEL_SIDE | ABOVE | {"tokenizer", "server"},
    "sentencepiece": {"tokenizer"},
    "huggingface_hub": {"hub"},
    "safetensors": {"weights"},
    "click": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "mlx_codellama_cpu": {"kernels"},
}


@dataclass(frozen=True)
class Source:
    """One module: its dotted name, the package it resolves relative imports against, and its syntax tree."""

    name: str
    package: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """mlx_codellama.kernels.rope → kernels; the package itself → ''."""
        return part_of(self.name)

    @property
    def exempt_strings(self) -> set[int]:
        """Identities of docstrings: prose may name what code may not."""
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        return {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
        }


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def parse(name: str, text: str, *, is_package: bool = False) -> Source:
    return Source(name, name if is_package else name.rpartition(".")[0], ast.parse(text))


def real_sources() -> list[Source]:
    found = []
    for base, prefix in [(ROOT / PKG, PKG), *((ROOT / name, f"{PKG}.{name}") for name in MAPPED)]:
        for path in sorted(base.rglob("*.py")):
            inner = path.relative_to(base)
            if base.name == PKG and inner.parts[0] in MAPPED:
                continue  # a developer's links; the real folders are visited under their own names
            parts = [prefix, *inner.with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(parse(name, path.read_text(encoding="utf-8"), is_package=is_package))
    return found


# ── what a source says ──────────────────────────────────────────────────────────────────────────────────────────────


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, '' where it is rooted in something else than a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        root = dotted(node.value)
        return f"{root}.{node.attr}" if root else ""
    return ""


def typing_only(source: Source) -> set[int]:
    """Identities of the nodes under `if TYPE_CHECKING:`, which never run."""
    return {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(source: Source, *, at_run_time: bool = False) -> Iterator[tuple[str, int]]:
    """Every absolute module name a source imports, at any depth; through importlib too where it is written out."""
    skipped = typing_only(source) if at_run_time else set()
    for node in ast.walk(source.tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            steps = source.package.split(".")
            anchor = steps[: len(steps) - node.level + 1] if node.level else []
            base = ".".join([*anchor, *([node.module] if node.module else [])])
            if base == PKG:  # from mlx_codellama import model
                yield from ((f"{PKG}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield base, node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno


def strings(source: Source) -> Iterator[tuple[str, int]]:
    """Every string constant that is not a docstring."""
    exempt = source.exempt_strings
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt:
            yield node.value, node.lineno


def nodes(sources: list[Source], *, outside: Collection[str]) -> Iterator[tuple[Source, ast.AST]]:
    """Every node of every source that is not in one of these parts."""
    for source in sources:
        if source.part not in outside:
            yield from ((source, node) for node in ast.walk(source.tree))


# ── the rules: sources in, findings out ─────────────────────────────────────────────────────────────────────────────


def imports_point_down(sources: list[Source]) -> Iterator[str]:
    """A module imports from lower layers or from its own package, never sideways. A public name counts as its home."""
    for source in sources:
        here = source.part
        if here and here not in LEVEL and here not in DATA_ONLY:
            yield f"{source.name} is in no layer: add it to LAYERS, with a decision"
            continue
        for target, line in imports(source):
            there = PUBLIC.get(part_of(target), part_of(target))
            if target.split(".")[0] != PKG or not here or not there or there in {here, "__version__"}:
                continue
            if there in DATA_ONLY:
                continue
            if there not in LEVEL:
                yield f"{source.name}:{line}: {there} is no module of a layer; import it from its home"
            elif here in DATA_ONLY or LEVEL[there] >= LEVEL[here]:
                yield f"{source.name}:{line}: {here} may not import {there}"


def third_parties_live_at_home(sources: list[Source]) -> Iterator[str]:
    """Also for type checkers, but for typing_extensions: they bring it along, an install need not."""
    for source in sources:
        run_time = set(imports(source, at_run_time=True))
        for target, line in imports(source):
            root = target.split(".")[0]
            if root == "typing_extensions" and (target, line) not in run_time:
                continue
            if root == PKG or root == "__future__" or root in sys.stdlib_module_names:
                continue
            if source.part not in HOMES.get(root, set()):
                yield f"{source.name}:{line}: {source.part or 'the package'} may not import {root}"


def kernels_know_arrays_only(sources: list[Source]) -> Iterator[str]:
    """mx.fast.*_kernel only in kernels/, and kernels/ without mlx.nn."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in ("metal_kernel", "cuda_kernel"):
                if source.part != "kernels":
                    yield f"{source.name}:{node.lineno}: {node.attr} outside kernels/"
            elif (
                isinstance(node, ast.ImportFrom)
                and node.module == "mlx.fast"
                and source.part != "kernels"
                and any(alias.name.endswith("_kernel") for alias in node.names)
            ):
                yield f"{source.name}:{node.lineno}: a kernel of mlx.fast outside kernels/"
        if source.part == "kernels":
            names = {alias.name for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
            if any(target.startswith("mlx.nn") for target, _ in imports(source)) or "nn" in names:
                yield f"{source.name}: kernels know arrays, not modules"


def environment_is_read_in_env(sources: list[Source]) -> Iterator[str]:
    banned = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for source, node in nodes(sources, outside={"env"}):
        if isinstance(node, ast.Attribute) and dotted(node).startswith("os.") and node.attr in banned:
            yield f"{source.name}:{node.lineno}: {dotted(node)} outside env"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in banned:
                    yield f"{source.name}:{node.lineno}: os.{alias.name} outside env"


def only_the_cli_prints(sources: list[Source]) -> Iterator[str]:
    for source, node in nodes(sources, outside={"cli", "__main__"}):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield f"{source.name}:{node.lineno}: print outside cli"
        elif isinstance(node, ast.Attribute) and dotted(node) in ("sys.stdout", "sys.stderr"):
            yield f"{source.name}:{node.lineno}: {dotted(node)} outside cli"


def checkpoints_are_written_by_weights(sources: list[Source]) -> Iterator[str]:
    """Nobody else calls a writer of safetensors, npz or torch files."""
    writers = {"save_safetensors", "save_file", "save_weights", "savez", "savez_compressed", "save_gguf"}
    for source, node in nodes(sources, outside={"weights"}):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = dotted(node.func)
            if name.split(".")[-1] in writers or name in ("mx.save", "np.save", "torch.save"):
                yield f"{source.name}:{node.lineno}: {name} outside weights"


# Modules that open for reading what no user hands over, or that keep `inputs`' rules by descriptors of their own.
READ_THEIR_OWN = {
    f"{PKG}.inputs",
    f"{PKG}.memory",  # /proc and /sys
    f"{PKG}.staging",  # to lock what a killed process left, without following links
    f"{PKG}.kernels.gpu.source",  # sources of the package
    f"{PKG}.repository.inside",  # relative to a folder's descriptor, without following links
}


def files_are_read_by_inputs(sources: list[Source]) -> Iterator[str]:
    """Elsewhere a FIFO would hang and a huge file fill the memory. Writing and folders are not meant."""
    for source in sources:
        if source.name in READ_THEIR_OWN:
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            name, last = dotted(node.func), getattr(node.func, "attr", "")
            modes = node.args[1:] if isinstance(node.func, ast.Name) else node.args
            texts = [a.value for a in modes if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            texts += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            writes = any(re.fullmatch(r"[wax]b?\+?|r\+b?|rb\+", str(text)) for text in texts)
            flags = {n.attr for a in node.args for n in ast.walk(a) if isinstance(n, ast.Attribute)}
            read = last in ("read_bytes", "read_text") and not name.startswith("inputs.")
            read |= name in ("open", "io.open") and not writes
            read |= last == "open" and any(text in ("r", "rb", "rt") for text in texts)
            of_a_folder = any(word in ast.unparse(node).partition(",")[0] for word in ("folder", "parent"))
            read |= name == "os.open" and not of_a_folder and not flags & {"O_WRONLY", "O_RDWR", "O_DIRECTORY"}
            read |= name in ("np.load", "np.fromfile", "np.memmap", "mmap.mmap")
            of_a_descriptor = any(k.arg == "closefd" for k in node.keywords)
            if read and not of_a_descriptor:
                yield f"{source.name}:{node.lineno}: a file is read outside inputs"


def files_are_written_by_staging(sources: list[Source]) -> Iterator[str]:
    """Nobody else replaces, renames or writes a file by its name. hub keeps huggingface_hub's own cache."""
    banned = {"write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", "rmtree", "copyfile", "copytree", "savetxt"}
    for source, node in nodes(sources, outside={"staging", "hub"}):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func) or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
        last = name.split(".")[-1]
        modes = node.args[1:2] if isinstance(node.func, ast.Name) else node.args[:1]
        texts = [a.value for a in modes if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        texts += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        written = last == "open" and name != "os.open"
        written &= any(re.fullmatch(r"[wax][bt]?\+?|r[bt]?\+[bt]?", str(text)) for text in texts)
        renamed = last in ("rename", "replace") and len(node.args) == (2 if name.startswith("os.") else 1)
        if last in banned or written or (renamed and not name.startswith("dataclasses.") and not node.keywords):
            yield f"{source.name}:{node.lineno}: {name} outside staging"


FOREIGN = re.compile(
    r"tok_embeddings|attention\.w[qkvo]\b|(?<!chunk_size_)feed_forward|ffn_norm|attention_norm|\bw[qkvo123]\.weight|rope\.freqs"
    r"|rotary_emb|transformer\.h\b|blk\.\d"
)


def foreign_names_live_in_convert_names(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.name == f"{PKG}.convert.names":
            continue
        for text, line in strings(source):
            if FOREIGN.search(text):
                yield f"{source.name}:{line}: another project's tensor name, {text[:40]!r}"


def engine_speaks_ids(sources: list[Source]) -> Iterator[str]:
    """Text begins at api: below it, no module that handles arrays knows the tokenizer or the prompts."""
    silent = {"layers", "cache", "sampling", "lookup", "weights", "model", "lora", "engine"}
    for source in sources:
        if source.part in silent:
            for target, line in imports(source):
                if target in (f"{PKG}.tokenizer", f"{PKG}.prompts"):
                    yield f"{source.name}:{line}: {source.part} speaks token ids, not text"


def no_module_has_a_public_functions_name(sources: list[Source]) -> Iterator[str]:
    """Importing a submodule rebinds the attribute of its package: a function of that name would vanish."""
    modules = {source.name for source in sources}
    for source in sources:
        if source.name != source.package:  # not an __init__
            continue
        bound: dict[str, int] = {}
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound[node.name] = node.lineno
            elif isinstance(node, ast.ImportFrom) and node.module not in (source.name, None):
                bound |= {alias.asname or alias.name: node.lineno for alias in node.names}
            elif isinstance(node, ast.Assign) and any(dotted(target) == "__all__" for target in node.targets):
                bound |= dict.fromkeys(ast.literal_eval(node.value), node.lineno)
        for name, line in bound.items():
            if f"{source.name}.{name}" in modules:
                yield f"{source.name}:{line}: {name} is a public name and a module"


def names_say_something(sources: list[Source]) -> Iterator[str]:
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    for source in sources:
        if source.name.split(".")[-1] in empty:
            yield f"{source.name}: a module is named after what it holds"


RULES: list[Callable[[list[Source]], Iterator[str]]] = [
    imports_point_down,
    third_parties_live_at_home,
    kernels_know_arrays_only,
    environment_is_read_in_env,
    only_the_cli_prints,
    checkpoints_are_written_by_weights,
    files_are_read_by_inputs,
    files_are_written_by_staging,
    foreign_names_live_in_convert_names,
    engine_speaks_ids,
    no_module_has_a_public_functions_name,
    names_say_something,
]

# (rule, module, its text): each must be found by its rule. A name ending in "/" is a package's __init__.
FAULTS = [
    (imports_point_down, "cache", "from mlx_codellama.api import load"),
    (imports_point_down, "cache", "def f():\n    from .engine import Step"),
    (imports_point_down, "convert.names", "import mlx_codellama.quant.plan"),
    (imports_point_down, "convert.names", "from ..quant import plan"),
    (imports_point_down, "cache", "from mlx_codellama import sampling"),
    (imports_point_down, "cache", "from mlx_codellama import load"),
    (imports_point_down, "cli.bench", "from mlx_codellama import nothing_known"),
    (imports_point_down, "errors", "import importlib\nimportlib.import_module('mlx_codellama.config')"),
    (imports_point_down, "surprise", "x = 1"),
    (third_parties_live_at_home, "prompts", "import sentencepiece"),
    (third_parties_live_at_home, "config", "import numpy as np"),
    (third_parties_live_at_home, "convert.hf", "from huggingface_hub import hf_hub_download"),
    (third_parties_live_at_home, "api", "if True:\n    import torch"),
    (third_parties_live_at_home, "layers", "import mlx_codellama_cpu"),
    (third_parties_live_at_home, "api", "from typing_extensions import Unpack"),
    (third_parties_live_at_home, "layers", "if TYPE_CHECKING:\n    import click"),
    (third_parties_live_at_home, "train.loop", "from rich.progress import Progress"),
    (kernels_know_arrays_only, "layers", "import mlx.core as mx\nk = mx.fast.metal_kernel(name='x')"),
    (kernels_know_arrays_only, "model", "from mlx.fast import cuda_kernel"),
    (kernels_know_arrays_only, "kernels.rope", "import mlx.nn as nn"),
    (kernels_know_arrays_only, "kernels.rope", "from mlx import nn"),
    (environment_is_read_in_env, "config", "import os\nx = os.environ['HOME']"),
    (environment_is_read_in_env, "hub", "from os import getenv"),
    (only_the_cli_prints, "train.loop", "print('loss')"),
    (only_the_cli_prints, "hub", "import sys\nsys.stderr.write('x')"),
    (checkpoints_are_written_by_weights, "train.loop", "import mlx.core as mx\nmx.save_safetensors('a', {})"),
    (checkpoints_are_written_by_weights, "loader", "def f(model):\n    model.save_weights('a')"),
    (files_are_read_by_inputs, "tokenizer", "def f(path):\n    return path.read_bytes()"),
    (files_are_read_by_inputs, "cli.cursor", "text = Path('a').read_text(encoding='utf-8')"),
    (files_are_read_by_inputs, "hub", "def f(path):\n    with path.open('rb') as file:\n        file.read()"),
    (files_are_read_by_inputs, "weights.header", "file = open('a', 'rb')"),
    (files_are_read_by_inputs, "weights.reading", "import os\nfd = os.open('a', os.O_RDONLY | os.O_CLOEXEC)"),
    (files_are_written_by_staging, "cli.chat", "def f(path):\n    path.write_text('x')"),
    (
        files_are_written_by_staging,
        "train.loop",
        "def f(path):\n    with path.open('a') as log:\n        log.write('x')",
    ),
    (files_are_written_by_staging, "weights.run", "open('run.json', mode='w')"),
    (files_are_written_by_staging, "weights.run", "def f(partial, path):\n    partial.replace(path)"),
    (files_are_written_by_staging, "weights.saving", "import shutil\nshutil.rmtree('out')"),
    (files_are_written_by_staging, "cli.cursor", "import os\nos.replace('a', 'b')"),
    (foreign_names_live_in_convert_names, "convert.meta", "NAME = 'layers.0.attention.wq.weight'"),
    (foreign_names_live_in_convert_names, "loader", "def f(i):\n    return f'layers.{i}.feed_forward.w1'"),
    (engine_speaks_ids, "engine", "from mlx_codellama.tokenizer import Tokenizer"),
    (no_module_has_a_public_functions_name, "quant/", "from mlx_codellama.quant.rope import rope"),
    (no_module_has_a_public_functions_name, "quant/", "__all__ = ['rope']"),
    (no_module_has_a_public_functions_name, "quant/", "def rope(): ..."),
    (names_say_something, "train.utils", ""),
]

# Looks like a fault and is none: a rule that cries here would be switched off by the next person in a hurry.
INNOCENT = [
    ("cli.bench", "import click\nfrom mlx_codellama.api import load\nprint('x')"),
    ("cli.bench", "from mlx_codellama import load"),
    ("api", "if TYPE_CHECKING:\n    from typing_extensions import Unpack"),
    ("kernels.rope", "import mlx.core as mx\nfrom mlx_codellama.kernels import dispatch\nk = mx.fast.metal_kernel()"),
    ("convert.meta", '"""Reads layers.0.attention.wq.weight of Meta."""\nfrom .names import to_ours'),
    ("weights", "import mlx.core as mx\nmx.save_safetensors('a', {})"),
    ("env", "import os\nx = os.environ.get('A')"),
    ("hub", "import os\nos.replace('a', 'b')"),
    ("hub", "from mlx_codellama import inputs\nx = inputs.read_bytes('a', 9)\nwith path.open('wb') as f: ..."),
    ("hub", "with open('a', 'x', encoding='utf-8') as file: ..."),
    ("weights.saving", "import os\nfd = os.open('a', os.O_RDONLY | os.O_DIRECTORY)"),
    ("weights.saving", "import os\nfd = os.open(folder, os.O_RDONLY)"),
    ("cli.cursor", "x = 'a'.replace('b', 'c')"),
    ("quant.plan", "from dataclasses import replace\nx = replace(args, bits=4)"),
]

REAL = real_sources()


def test_the_tree_was_found() -> None:
    # A wrong ROOT would make every rule below pass on nothing.
    assert {"", "errors", "config", "convert", "quant"} <= {source.part for source in REAL}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_the_tree(rule: Callable[[list[Source]], Iterator[str]]) -> None:
    assert list(rule(REAL)) == []


@pytest.mark.parametrize(("rule", "module", "text"), FAULTS, ids=[f"{f[0].__name__}-{i}" for i, f in enumerate(FAULTS)])
def test_rule_finds_a_seeded_fault(rule: Callable[[list[Source]], Iterator[str]], module: str, text: str) -> None:
    is_package = module.endswith("/")
    fault = parse(f"{PKG}.{module.rstrip('/')}", text, is_package=is_package)
    beside = parse(f"{PKG}.quant.rope", "")
    assert list(rule([fault, beside])), f"{rule.__name__} overlooks {text!r} in {module}"


@pytest.mark.parametrize(("module", "text"), INNOCENT)
def test_no_rule_cries_at_the_innocent(module: str, text: str) -> None:
    source = parse(f"{PKG}.{module}", text)
    assert [finding for rule in RULES for finding in rule([source])] == []


def test_every_rule_has_a_seeded_fault() -> None:
    assert {rule.__name__ for rule in RULES} == {fault[0].__name__ for fault in FAULTS}


def test_public_names_and_their_homes_are_those_of_the_package() -> None:
    homes = {name: home.removeprefix(f"{PKG}.") for name, home in mlx_codellama._HOMES.items()}
    assert homes == PUBLIC


def test_architecture_page_shows_the_same_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert [set(re.findall(r"`([a-z_]+)/?`", names)) for _, names in rows] == LAYERS
    assert [int(level) for level, _ in rows] == list(range(len(LAYERS)))


def test_architecture_page_shows_the_same_homes() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Third parties")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == set(HOMES)
