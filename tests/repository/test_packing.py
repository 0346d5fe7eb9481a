"""Packing a repository: which files, in which order, how much of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_codellama.repository import header, pack, pack_before, packing, read_folder

from .conftest import tree


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


# ── headers ──


@pytest.mark.parametrize(
    ("path", "line"),
    [("a.py", "# a.py\n"), ("a.rs", "// a.rs\n"), ("q.SQL", "-- q.SQL\n"), ("r.md", "<!-- r.md -->\n")],
)
def test_a_header_is_a_comment_of_the_language(path: str, line: str) -> None:
    assert header(path) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("a\nb = 1\n.py", "# a\\nb = 1\\n.py\n"),
        ("a\x1b[31m\u2028b.js", "// a\\x1b[31m\\u2028b.js\n"),
        ("\udce9.py", "# \\udce9.py\n"),
        ("a-->b.html", "<!-- a-- >b.html -->\n"),
        ("a*/b.css", "/* a* /b.css */\n"),
        ("a?>b.php", "// a? >b.php\n"),
    ],
)
def test_no_name_leaves_its_comment(path: str, line: str) -> None:
    assert header(path) == line


# ── which kinds of file ─────────────────────────────────────────────────────────────────────────────────────────────

NO_CODE = ["LICENSE", "NOTICE", "WHEEL", "METADATA", "RECORD", "PKG-INFO", "Makefile", "Dockerfile", "README",
           "VERSION", "pyproject.toml", "README.md", "requirements.txt", "LICENSE-APACHE", "py.typed", "CHANGELOG.rst",
           "AUTHORS", "package.json", "docker-compose.yml", "CMakeLists.txt", "setup.cfg"]  # fmt: skip


@pytest.mark.parametrize("own", [None, "plain.py"])
def test_code_stands_before_all_else_however_far_it_is(tmp_path: Path, own: str | None) -> None:
    code = ["pkg/deep/er/last.rs", "pkg/util.py", *([] if own else ["plain.py"]), "web/page.ts"]
    tree(tmp_path, dict.fromkeys([*NO_CODE, *code, "plain.py", "unknown"], "some words"))
    order = paths(tmp_path, own)
    assert sorted(order[: len(code)]) == code
    assert order[len(code)] == "unknown"
    assert sorted(order[len(code) + 1 :]) == sorted(NO_CODE)
    assert order.index("pyproject.toml") < order.index("README.md") < order.index("LICENSE")


def test_who_writes_prose_sees_prose(tmp_path: Path) -> None:
    tree(tmp_path, {"docs/a.md": "x", "docs/b.md": "x", "pkg/c.py": "x", "LICENSE": "x"})
    assert paths(tmp_path, "docs/a.md") == ["docs/b.md", "pkg/c.py", "LICENSE"]


@pytest.mark.parametrize(
    ("text", "first"),
    [("from deep.b import x", "deep/b.py"), ('#include "er/c.h"', "deep/er/c.h"), ("import './web/d'", "web/d.ts")],
)
def test_a_text_without_a_file_brings_what_it_imports(tmp_path: Path, text: str, first: str) -> None:
    tree(tmp_path, {"a.py": "x", "deep/b.py": "x", "deep/er/c.h": "x", "web/d.ts": "x"})
    piece = pack(read_folder(tmp_path), None, text, budget=100, n_tokens=words).pieces[-1]
    assert (piece.path, piece.why) == (first, "imported")


def test_only_so_many_files_are_read_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {f"f{n:03}.py": "" for n in range(60)} | {"g.py": "x"})
    assert paths(tmp_path, None) == ["g.py"]
    monkeypatch.setattr(packing, "MOST_READ", 50)
    packed = pack(read_folder(tmp_path), None, "", budget=100, n_tokens=words)
    assert packed.pieces == []
    assert ["50 files were read" in skipped.why for skipped in packed.skipped] == [True]


@pytest.mark.parametrize("most", [0, 20, 40, 60, 100, 1000])
def test_a_whole_prompt_keeps_to_its_limit_and_ends_with_the_files_own_name(tmp_path: Path, most: int) -> None:
    folder = read_folder(tree(tmp_path, {f"f{n}.py": "x " * 20 for n in range(9)} | {"own.py": "x"}))

    def prompt_tokens(before: str) -> int:
        return 10 + words(before) + before.count("\n\n\n")  # joined, pieces take more than each by itself

    before, packed = pack_before(
        folder, "own.py", "x", budget=500, n_tokens=words, most_prompt=most, prompt_tokens=prompt_tokens
    )
    assert prompt_tokens(before) <= most or before == ""
    assert (before != "") == (len(packed.pieces) > 0) == (most >= 60)
    assert before == "" or before == packed.text + "# own.py\n"


def test_packing_again_says_everything_once(tmp_path: Path) -> None:
    folder = read_folder(tree(tmp_path, {"a.py": "import big", "big.py": "x " * 500, "bin.py": b"\0"}))
    first, second = (pack(folder, "a.py", "import big", budget=99, n_tokens=words) for _ in range(2))
    assert first.skipped == second.skipped
    assert [skipped.path for skipped in first.skipped] == ["bin.py", "big.py"]
