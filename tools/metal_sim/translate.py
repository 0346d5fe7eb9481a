"""MSL → C++ that clang compiles against the shim: includes, threadgroup variables, function constants, the entry point.

Everything else of the language is left to shim/msl.h. Line numbers are kept: a finding names the line of the text that
MLX would hand to Apple's compiler.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from metal_sim.toolchain import SHIM, MetalError

KERNEL_FILE = "kernel.metal"
NUMBERS = (  # attributes that are one number
    *("dispatch_quadgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup", "quadgroup_index_in_threadgroup"),
    *("quadgroups_per_threadgroup", "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup"),
    *("thread_execution_width", "threads_per_simdgroup", "thread_index_in_quadgroup", "thread_index_in_simdgroup"),
    "thread_index_in_threadgroup",
)
TRIPLES = (
    *("dispatch_threads_per_threadgroup", "grid_origin", "grid_size", "thread_position_in_grid"),
    *("thread_position_in_threadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid", "threads_per_grid"),
    "threads_per_threadgroup",
)
HEADERS = re.compile(r"\s*#\s*include\s*<(metal_\w+|simd/simd\.h)>")
SCALARS = "char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|bool"


class Parameter(NamedTuple):
    """One of a kernel's: `kind` is attribute, pointer or reference; `slot` the buffer's index."""

    kind: str
    name: str
    slot: int
    attribute: str


class Kernel(NamedTuple):
    """The C++ text of a kernel and what to pass it; `lines` is the MSL text that reports quote."""

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    lines: tuple[str, ...]

    def buffer_names(self) -> dict[int, str]:
        return {p.slot: p.name for p in self.parameters if p.kind != "attribute"}


def without_comments(text: str) -> str:
    """The text with comments blanked, every other character in its place."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", flags=re.DOTALL)
    return blank.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def flatten(text: str, folders: Sequence[Path], name: str = KERNEL_FILE, seen: set[Path] | None = None) -> str:
    """Quoted includes become their text, the shim's stand-ins first; <metal_…> go: the shim is all of them."""
    seen = set() if seen is None else seen
    out = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        quoted = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        if quoted:
            path = next((d / quoted[1] for d in (SHIM, *folders) if (d / quoted[1]).exists()), None)
            if path is None:
                raise MetalError(f"{name}:{number}: no header {quoted[1]}")
            if path not in seen:
                seen.add(path)
                out.append(flatten(path.read_text(encoding="utf-8"), folders, quoted[1], seen))
            out.append(f'#line {number + 1} "{name}"')
        elif HEADERS.match(line) or re.match(r"\s*#\s*pragma\s+once", line):
            out.append("")
        elif re.match(r"\s*#\s*include", line):
            raise MetalError(f"{name}:{number}: {line.strip()}: MSL has no such header")
        else:
            out.append(line)
    return "\n".join(out)


def _threadgroup_variables(text: str) -> str:
    """`threadgroup T name[n];` of a function → a reference into the threadgroup's memory."""
    declaration = re.compile(
        r"(?<=[;{}\n])(\s*)threadgroup\s+([^;(){}=]*?[\w>])\s*"
        r"((?:\b\w+\s*(?:\[[^\];]*(?:\[[^\]]*\][^\];]*)*\]\s*)*,?\s*)+);"
    )
    variable = re.compile(r"(\w+)\s*((?:\[(?:[^\[\]]|\[[^\]]*\])*\]\s*)*)")
    out, done = [], 0
    for match in declaration.finditer(without_comments(text)):
        space, type_name, names = match.groups()
        if "*" in type_name or "&" in type_name:
            continue
        made = [space]
        for name, extents in variable.findall(names):
            made.append(
                f"typedef {type_name} gpu_t_{name} {extents.strip()}; threadgroup gpu_t_{name}& {name} = "
                f'*(threadgroup gpu_t_{name}*)gpu_threadgroup("{name}", __COUNTER__, sizeof(gpu_t_{name})); '
            )
        lost = match[0].count("\n") - space.count("\n")
        out += [text[done : match.start()], *made, "\n" * lost]
        done = match.end()
    return "".join(out) + text[done:]


def _split(parameters: str) -> list[str]:
    """At the commas that no bracket encloses."""
    depth, parts = 0, [""]
    for c in parameters:
        depth += (c in "([<{") - (c in ")]>}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _parameters(text: str, name: str) -> tuple[Parameter, ...]:
    """Read the kernel's signature."""
    clean = without_comments(text)
    head = re.search(r"(?:\[\[\s*kernel[^;{]*?\]\]|\bkernel\b)\s*void\s+" + re.escape(name) + r"\s*\(", clean)
    if head is None:
        raise MetalError(f"no kernel {name} in the text")
    end, depth = head.end(), 1
    while depth:
        depth += (clean[end] == "(") - (clean[end] == ")")
        end += 1
    out, next_slot = [], 0
    for parameter in _split(clean[head.end() : end - 1]):
        attributes = " ".join(re.findall(r"\[\[(.*?)\]\]", parameter))
        declared = re.sub(r"\[\[.*?\]\]", "", parameter)
        word = re.search(r"(\w+)\s*(?:\[\w*\])?\s*$", declared)
        assert word is not None
        if not re.search(r"[*&\]]", declared):
            known = re.findall(r"\w+", attributes)
            if len(known) != 1 or known[0] not in (*NUMBERS, *TRIPLES):
                raise MetalError(f"kernel {name}: parameter {word[1]} has no known attribute: [[{attributes}]]")
            out.append(Parameter("attribute", word[1], -1, known[0]))
            continue
        if re.match(r"\s*(const\s+)?threadgroup\b", declared):
            raise MetalError(f"kernel {name}: threadgroup memory from the host ({word[1]}) is not simulated")
        slot = re.search(r"buffer\((\d+)\)", attributes)
        next_slot = int(slot[1]) if slot else next_slot
        out.append(Parameter("reference" if "&" in declared else "pointer", word[1], next_slot, ""))
        next_slot += 1
    return tuple(out)


def _dialect(text: str, constants: Mapping[int, int]) -> str:
    """What clang's C++ spells in another way."""
    spaces = r"(?:const\s+)?(?:constant|device|threadgroup)\b[^,;(){}*&\[\]]*"
    text = re.sub(rf"\b({spaces})\b(\w+)\s*\[[\w ]*\](?=\s*[,)])", r"\1 *\2", text)  # array parameters
    text = re.sub(
        r"(\w[\w ]*?)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;",
        lambda m: f"static {m[1]} {m[2]} = {constants.get(int(m[3]), 0)};",
        text,
    )
    text = re.sub(r"\[\[\s*threadgroup\(\d+\)\s*\]\]", "", text)  # of functions; a kernel's are refused below
    text = re.sub(r"\bvec<([\w:]+), *(\w+)>\(", r"vec_of<\1, \2>(", text)
    text = re.sub(rf"\bstatic_cast<({SCALARS})([234])>", r"metal::vec_of<\1, \2>", text)
    return re.sub(  # explicit instantiations: the entry point makes the one that runs
        r"template\s*\[\[\s*host_name\([^)]*\)\s*\]\].*?;", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )


@functools.lru_cache(maxsize=8)
def _prelude(text: str, folders: tuple[Path, ...]) -> tuple[str, frozenset[Path]]:
    """The C++ of what stands before every kernel, and the headers in it."""
    seen: set[Path] = set()
    return _dialect(flatten(text, folders, "prelude", seen), {}), frozenset(seen)


def translate(
    source: str,
    name: str,
    *,
    template: str = "",
    constants: Mapping[int, int] | None = None,
    folders: Sequence[Path] = (),
    prelude: str = "",
) -> Kernel:
    """The kernel `name` of an MSL text.

    template    its arguments, such as "<half, 128>"
    constants   function constants by index; those not named are 0
    folders     where quoted includes are looked for
    prelude     includes that stand before the text, outside its line numbers
    """
    before, included = _prelude(prelude, tuple(folders))
    flat = before + "\n" + _dialect(flatten(source, folders, seen=set(included)), constants or {})
    parameters = _parameters(flat, name)
    flat = _threadgroup_variables(flat)
    passed = []
    for p in parameters:
        if p.kind == "attribute":
            passed.append(f"gpu::{'Number' if p.attribute in NUMBERS else 'Triple'}{{at->{p.attribute}}}")
        else:
            passed.append(f"gpu::{'Buffer' if p.kind == 'pointer' else 'Reference'}{{b[{p.slot}]}}")
    entry = (
        f'extern "C" void gpu_entry(void* const* b, const gpu_place* at) {{ {name}{template}({", ".join(passed)}); }}'
    )
    text = f'#include "msl.h"\n{flat}\n#line 1 "entry"\n{entry}\n'
    return Kernel(name, text, parameters, tuple(source.split("\n")))
