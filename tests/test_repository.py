"""Packing a repository: which files, in which order, how much of them; and nothing from outside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_codellama.errors import PromptError
from mlx_codellama.repository import Folder, header, pack, read_folder
from mlx_codellama.repository.folder import HUGE_BYTES
from mlx_codellama.repository.ignore import is_ignored, read_rules
from mlx_codellama.repository.imports import distance, imported


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def words(text: str) -> int:
    return len(text.split())


PROJECT: dict[str, str | bytes] = {
    "app/main.py": "import json\nfrom lib.deep import tool\nfrom .near import helper\nfrom app import sibling\n",
    "app/near.py": "near = 1\n",
    "app/sibling.py": "sibling = 1\n",
    "app/other.py": "other = 1\n",
    "app/notes.md": "some words\n",
    "app/sub/below.py": "below = 1\n",
    "src/lib/deep/tool.py": "tool = 1\n",
    "src/lib/far.py": "far = 1\n",
    "tool.py": "decoy = 1\n",
}


def paths(root: Path, own: str | None = "app/main.py", budget: int = 10_000) -> list[str]:
    """Paths in the order in which they were chosen: the most important first."""
    text = str(PROJECT.get(own or "", ""))
    return [p.path for p in pack(read_folder(root), own, text, budget=budget, n_tokens=words).pieces[::-1]]


# ── order and budget ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_file_imports_comes_first_then_the_nearest(tmp_path: Path) -> None:
    tree(tmp_path, PROJECT)
    assert paths(tmp_path) == [
        "src/lib/deep/tool.py",  # imported first in the text
        "app/near.py",
        "app/sibling.py",
        "app/other.py",  # same folder
        "app/sub/below.py",  # one away
        "tool.py",  # one away too, later by name
        "src/lib/far.py",  # three away
        "app/notes.md",  # prose after code, though it is near
    ]


def test_the_most_important_file_stands_last_under_its_name_and_the_tokens_are_those_of_the_text(
    tmp_path: Path,
) -> None:
    tree(tmp_path, PROJECT)
    packed = pack(read_folder(tmp_path), "app/main.py", str(PROJECT["app/main.py"]), budget=999, n_tokens=words)
    assert packed.text.endswith("# src/lib/deep/tool.py\ntool = 1\n\n\n")
    assert packed.tokens == words(packed.text)
    assert packed.pieces[-1].why == "imported"
    assert {p.path: p.why for p in packed.pieces}["app/other.py"] == "same folder"
    assert {p.path: p.why for p in packed.pieces}["src/lib/far.py"] == "3 folders away"


@pytest.mark.parametrize("budget", [0, 23, 24, 30, 41, 60, 10_000])
def test_the_budget_is_kept_and_used(tmp_path: Path, budget: int) -> None:
    files = {f"f{n:02}.py": "x " * (5 + 3 * n) for n in range(12)}
    packed = pack(read_folder(tree(tmp_path, files)), None, "", budget=budget, n_tokens=words)  # type: ignore[arg-type]
    assert packed.tokens <= budget
    costs = sorted(words(header(name) + text) for name, text in files.items())
    left = [c for c in costs if c not in [p.tokens for p in packed.pieces]]
    assert not left or budget - packed.tokens < max(24, min(left))  # nothing that fits was left out


def test_an_import_that_does_not_fit_is_said_and_the_next_one_taken(tmp_path: Path) -> None:
    tree(tmp_path, {"a.py": "import big, small", "big.py": "x " * 500, "small.py": "y = 1"})
    packed = pack(read_folder(tmp_path), "a.py", "import big, small", budget=100, n_tokens=words)
    assert [p.path for p in packed.pieces] == ["small.py"]
    assert [(s.path, "does not fit" in s.why) for s in packed.skipped] == [("big.py", True)]


def test_a_huge_remainder_is_not_tokenised(tmp_path: Path) -> None:
    tree(tmp_path, {f"f{n:03}.py": "x " * 5000 for n in range(100)})
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return words(text)

    assert pack(read_folder(tmp_path), None, "", budget=100, n_tokens=count).pieces == []
    assert counted == []


def test_packing_twice_gives_the_same(tmp_path: Path) -> None:
    a = tree(tmp_path / "a", PROJECT)
    b = tree(tmp_path / "b", dict(reversed(PROJECT.items())))  # made in another order
    assert paths(a) == paths(b)


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_junk_is_left_out(tmp_path: Path) -> None:
    junk = {
        ".git/config.py": "", ".hidden.py": "", "node_modules/x/i.js": "", "venv/a.py": "", "__pycache__/b.py": "",
        "mine/pyvenv.cfg": "", "mine/lib/c.py": "", "d.min.js": "", "package-lock.json": "", "pkg.egg-info/e.py": "",
        "build/f.py": "", "svn/.svn/g.py": "",
    }  # fmt: skip
    assert read_folder(tree(tmp_path, {"keep.py": "", **junk})).paths == ["keep.py"]


def test_binary_huge_and_foreign_files_are_noted_not_read(tmp_path: Path) -> None:
    files = {"a.py": "x = 1", "bin.py": b"x\0y", "latin.py": "é".encode("latin-1"), "huge.py": b"#" * (HUGE_BYTES + 1)}
    tree(tmp_path, files)
    os.mkfifo(tmp_path / "pipe.py")  # opening it to read would wait for ever
    packed = pack(read_folder(tmp_path), None, "", budget=100, n_tokens=words)
    assert [p.path for p in packed.pieces] == ["a.py"]
    assert {s.path: s.why for s in packed.skipped} == {
        "bin.py": "binary", "latin.py": "not UTF-8", "huge.py": "too large", "pipe.py": "not a file"
    }  # fmt: skip


def test_nothing_outside_is_read(tmp_path: Path) -> None:
    tree(tmp_path, {"out/secret.py": "secret", "out/more/secret.py": "secret", "repo/a.py": "x = 1", "repo/d/b.py": ""})
    repo = tmp_path / "repo"
    (repo / "file.py").symlink_to(tmp_path / "out" / "secret.py")
    (repo / "up.py").symlink_to("../out/secret.py")
    (repo / "folder").symlink_to(tmp_path / "out")
    (repo / "twin.py").symlink_to("a.py")
    (repo / "loop").symlink_to(".")
    packed = pack(read_folder(repo), None, "", budget=500, n_tokens=words)
    assert [p.path for p in packed.pieces] == ["a.py"]
    assert {s.path for s in packed.skipped} == {"file.py", "up.py", "folder"}


def test_a_folder_exchanged_for_a_link_after_the_walk_leads_nowhere(tmp_path: Path) -> None:
    tree(tmp_path, {"out/b.py": "secret", "repo/d/b.py": "fine"})
    folder = read_folder(tmp_path / "repo")
    (tmp_path / "repo" / "d").rename(tmp_path / "repo" / "was")
    (tmp_path / "repo" / "d").symlink_to(tmp_path / "out")
    assert folder.read("d/b.py") is None
    folder = Folder(tmp_path / "repo", ["was/b.py"])
    assert folder.read("was/b.py") == "fine"


def test_text_is_given_with_plain_newlines_and_without_a_mark(tmp_path: Path) -> None:
    assert read_folder(tree(tmp_path, {"a.py": "\ufeffx\r\ny\r\n"})).read("a.py") == "x\ny\n"


def test_a_root_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="is not a folder"):
        read_folder(tree(tmp_path, {"a": ""}) / "a")


# ── .gitignore ──────────────────────────────────────────────────────────────────────────────────────────────────────

RULES = (
    "*.gen.py\n/top.py\ndocs/\n!docs/keep.py\na/**/z.py\n# no\nfoo?.py\n!foo1.py\nb/*.py\n"
    "[xy].py\ne[!1].py\n\\#odd.py\ntrail.py  \n"
)


def test_gitignore_means_what_git_says(tmp_path: Path) -> None:
    names = ["k.gen.py", "s/k.gen.py", "top.py", "s/top.py", "docs/a.py", "docs/keep.py", "a/z.py", "a/b/z.py",
             "a/b/c/z.py", "c/a/z.py", "foo1.py", "foo2.py", "foo.py", "b/q.py", "b/c/q.py", "x.py", "z.py", "#odd.py",
             "trail.py", "e1.py", "e2.py", "e].py", "s/docs/x.py",
             "inner/deep/skip.py", "inner/skip.py", "skip.py"]  # fmt: skip
    tree(tmp_path, {".gitignore": RULES, "inner/.gitignore": "skip.py\n", **dict.fromkeys(names, "")})
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "ls-files", "-o", "--exclude-standard"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert read_folder(tmp_path).paths == sorted(name for name in listed if not name.endswith(".gitignore"))


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?/[]!\\ #-^&", max_size=12), st.text("ab/", min_size=1, max_size=8))
@example("[?--]", "a")
@example("[--9]", "-")
def test_no_line_of_a_gitignore_is_an_error(line: str, path: str) -> None:
    assert is_ignored(path, False, read_rules(line, "")) in (True, False)


# ── imports ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KNOWN = ["pkg/__init__.py", "pkg/a.py", "pkg/b.py", "pkg/sub/__init__.py", "pkg/sub/c.py", "top.py", "src/lib/d.py",
         "src/lib/e.pyi", "x/util.h", "x/in/util.h", "ui/part.ts", "ui/index.ts", "ui/more/index.js"]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("pkg/sub/c.py", "from . import c", ["pkg/sub/__init__.py"]),
        ("pkg/sub/c.py", "from .. import a", ["pkg/a.py", "pkg/__init__.py"]),
        ("pkg/sub/c.py", "from ..b import x, y", ["pkg/b.py"]),
        ("top.py", "import pkg.sub.c as k, pkg.a", ["pkg/sub/c.py", "pkg/a.py"]),
        ("top.py", "from pkg import (\n    a,\n    b as bb,\n)", ["pkg/a.py", "pkg/b.py", "pkg/__init__.py"]),
        ("top.py", "from pkg import (a,\n", ["pkg/a.py", "pkg/__init__.py"]),  # being written
        ("top.py", "if x:\n\timport lib.d  # why\nfrom lib import e", ["src/lib/d.py", "src/lib/e.pyi"]),
        ("pkg/a.py", "import a, os, b.c, .x, 3", []),
        ("pkg/a.py", "text = 'import top'", []),
        ("x/in/main.c", '#include "util.h"\n#include <top.h>', ["x/in/util.h"]),
        ("y/main.c", '#  include "in/util.h"', ["x/in/util.h"]),
        ("ui/a.ts", "import {b} from './part.js'; const c = require('./more')", ["ui/part.ts", "ui/more/index.js"]),
        ("ui/more/b.tsx", 'import x from "..";\nimport "../part"', ["ui/index.ts", "ui/part.ts"]),
        ("notes.txt", "import top", []),
    ],
)
def test_imports_are_found(path: str, text: str, found: list[str]) -> None:
    assert imported(path, text, KNOWN) == found


def test_of_several_files_of_a_name_the_closest_is_imported() -> None:
    known = ["one/util.py", "two/util.py", "two/deep/main.py"]
    assert imported("two/deep/main.py", "import util", known) == ["two/util.py"]
    assert imported("one/x.py", "import util", known) == ["one/util.py"]


def test_distance_counts_steps_up_and_down() -> None:
    assert [distance("a/b", p) for p in ("a/b/x", "a/x", "a/b/c/x", "x", "d/x", "a/c/x")] == [0, 1, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("path", "line"),
    [("a.py", "# a.py\n"), ("a.rs", "// a.rs\n"), ("q.SQL", "-- q.SQL\n"), ("r.md", "<!-- r.md -->\n")],
)
def test_a_header_is_a_comment_of_the_language(path: str, line: str) -> None:
    assert header(path) == line
