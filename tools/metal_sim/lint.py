"""Rules of MSL that clang's C++ lets pass, read off its syntax tree of the instantiated kernel.

A heuristic over the text of `-ast-dump`, a file at a time: what stands in the kernel's own text is judged, never the
shim or MLX's headers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from metal_sim.toolchain import dump_tree, remembered
from metal_sim.translate import KERNEL_FILE, Kernel

SPACES = re.compile(r"\b(thread|device|constant|threadgroup|threadgroup_imageblock)\b")
DECLARATIONS = ("VarDecl", "ParmVarDecl", "FieldDecl", "FunctionDecl", "CXXMethodDecl")
FORBIDDEN = ("LambdaExpr", "CXXNewExpr", "CXXThrowExpr", "CXXDynamicCastExpr", "GotoStmt")
_LOCATION = re.compile(r"(?:(line):(\d+):(\d+)|(col):(\d+)|([^\s<>,:]+):(\d+):(\d+))")
_NODE = re.compile(r"^([| `-]*)(\w+) (0x[0-9a-f]+)? ?(.*)$")


class Node(NamedTuple):
    """A line of the dump: `file`, `line` and `column` are where it ends or, of a declaration, where its name stands."""

    depth: int
    kind: str
    address: str
    previous: str  # address of an earlier declaration of the same function
    rest: str
    file: str
    line: int
    column: int


def _nodes(dump: str) -> Iterator[Node]:
    """The dump's lines; each location is relative to the one printed before it."""
    file, line, column = "", 0, 0
    for text in dump.split("\n"):
        found = _NODE.match(text)
        if not found:
            continue
        indent, kind, address, rest = found.groups()
        place, rest = "", rest or ""
        earlier = re.match(r"(?:parent 0x[0-9a-f]+ )?(?:prev (0x[0-9a-f]+) )?", rest)
        assert earlier is not None
        rest = rest[earlier.end() :]
        if rest.startswith("<"):
            place, _, rest = rest.partition("> ")
        head = re.match(r"(?:line:\d+:\d+|col:\d+|[^\s<>,:]+:\d+:\d+) ", rest)
        if head:  # a declaration's name
            place += " " + head[0]
            rest = rest[head.end() :]
        for by_line, l1, c1, by_column, c2, name, l3, c3 in _LOCATION.findall(place):
            if by_line:
                line, column = int(l1), int(c1)
            elif by_column:
                column = int(c2)
            else:
                file, line, column = name.rsplit("/", 1)[-1], int(l3), int(c3)
        yield Node(len(indent), kind, address or "", earlier[1] or "", rest, file, line, column)


def _lines(text: str) -> dict[tuple[str, int], str]:
    """(file, line) → its text, as the #line directives say."""
    out: dict[tuple[str, int], str] = {}
    file, line = "", 0
    for row in text.split("\n"):
        directive = re.match(r'#line (\d+) "([^"]+)"', row)
        if directive:
            file, line = directive[2].rsplit("/", 1)[-1], int(directive[1])
        else:
            out[file, line] = row
            line += 1
    return out


def _declaration(lines: dict[tuple[str, int], str], node: Node) -> str:
    """What stands before a declared name, from the delimiter on."""
    before = lines.get((node.file, node.line), "")[: node.column - 1]
    for back in range(1, 6):
        if re.search(r"[;{}(,]", before):
            break
        before = lines.get((node.file, node.line - back), "") + " " + before
    before = re.sub(r"\(\s*([*&])\s*$", r"\1", before)  # float (&x)[4]
    return re.split(r"[;{}(,](?![^<]*>)", before)[-1]


def _pointer_without_space(lines: dict[tuple[str, int], str], node: Node) -> bool:
    """Whether a declaration spells a pointer or a reference and no address space."""
    spelled = _declaration(lines, node)
    return bool(re.search(r"[*&]\s*(const\s+)?$", spelled)) and not SPACES.search(spelled)


def _objection(node: Node, lines: dict[tuple[str, int], str]) -> str:
    """What is wrong with one node of the tree, or nothing."""
    quoted = re.search(r"'([^']*)'", node.rest)
    type_name = quoted[1] if quoted else ""
    made_here = "gpu_threadgroup" in lines.get((node.file, node.line), "")  # by translate.py
    if node.kind in DECLARATIONS and not made_here and _pointer_without_space(lines, node):
        return "a pointer or reference without an address space"
    if node.kind in DECLARATIONS and "long long" in type_name:
        return "MSL has no `long long`"
    if node.kind == "VarDecl" and node.depth <= 2 and "__constant" not in type_name:
        return "a variable of the program that is not in the constant address space"
    if "<AddressSpaceConversion>" in node.rest and not made_here:
        return "a cast between address spaces"
    if node.kind == "TemplateArgument" and re.match(r"type '(const )?__(global|local|constant) [^*&]*'$", node.rest):
        return "an address space is deduced into a template's type: the argument lies in another space"
    if node.kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in node.rest and "<FloatingCast>" in node.rest:
        return "an implicit conversion to bfloat" if re.match(r"bfloat|__bf16", type_name) else ""
    return f"MSL has no such thing: {node.kind}" if node.kind in FORBIDDEN else ""


class _Calls:
    """Who calls whom: functions by the address of their first declaration."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self.calls: dict[str, set[str]] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.inside, self.depth = "", -1

    def visit(self, node: Node, file: str) -> None:
        if node.depth <= self.depth:
            self.inside, self.depth = "", -1
        if node.kind in ("FunctionDecl", "CXXMethodDecl"):
            self.first[node.address] = self.first.get(node.previous, node.previous) or node.address
            self.inside, self.depth = self.first[node.address], node.depth
            if node.file == file:
                name = re.sub(r"^((used|referenced|implicit) )*", "", node.rest).split(" ")[0]
                self.places.setdefault(self.inside, (name, node.line))
        elif self.inside:
            called = re.findall(r"(?:Function|CXXMethod) (0x[0-9a-f]+) '", node.rest)
            self.calls.setdefault(self.inside, set()).update(self.first.get(c, c) for c in called)

    def recursive(self) -> Iterator[tuple[str, int]]:
        """Name and line of every function from which calls lead back to it."""
        for start, place in self.places.items():
            reached: set[str] = set()
            front = self.calls.get(start, set())
            while front:
                reached |= front
                front = {c for f in front for c in self.calls.get(f, ())} - reached
            if start in reached:
                yield place


def judge(dump: str, lines: dict[tuple[str, int], str], file: str) -> list[str]:
    """Findings as "line: what", in the order of lines."""
    found: set[tuple[int, str]] = set()
    calls = _Calls()
    for node in _nodes(dump):
        calls.visit(node, file)
        if node.file == file and (what := _objection(node, lines)):
            found.add((node.line, what))
    found |= {(line, f"recursion: {name} calls itself, which MSL forbids") for name, line in calls.recursive()}
    return [f"{line}: {what}" for line, what in sorted(found)]


@functools.lru_cache(maxsize=512)
def lint(kernel: Kernel, file: str = KERNEL_FILE) -> tuple[str, ...]:
    """What is wrong with a kernel's text that clang does not mind, as sentences with the line."""
    out = []
    for finding in remembered(
        f"{file}\0{kernel.text}", Path(__file__), lambda: judge(dump_tree(kernel.text), _lines(kernel.text), file)
    ):
        line = int(finding.split(":")[0])
        quoted = kernel.lines[line - 1].strip() if file == KERNEL_FILE and 0 < line <= len(kernel.lines) else ""
        sentence = f"{kernel.name}, {file}:{finding}"
        out.append(sentence + (f"\n    {quoted}" if quoted else ""))
    return tuple(out)
