"""What git ignores: the same as git says, for generated rules and for every place where rules may stand."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_codellama.errors import PromptError
from mlx_codellama.repository import git_index, read_folder
from mlx_codellama.repository.git_excludes import MOST_EXCLUDE_BYTES, config_entries, find_excludes
from mlx_codellama.repository.ignore import MOST_GLOB_TOKENS, Rules, TooManyGlobs, is_ignored

from .conftest import git, tree

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed, so nothing to compare with")

# ── generated rules ─────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [b"a", b"b", b"ab", b"a]", b"[a", b"-", b"!", b"#", b"a b", b"a ", b"\xc3\xa9", b"a\x0cb", b"1", b"^", b"\\",
         b":a", b"a\t", b"a\r", b"*", b"a[b", b"Ba", b"\xc2\x85", b"\xe2\x80\xa8"]  # fmt: skip
ATOMS = [b"a", b"b", b"A", b"B", b"*", b"**", b"?", b"/", b"/", b"[", b"]", b"!", b"^", b"-", b"\\", b"#", b" ", b"\t",
         b"[[:upper:]]", b"[![:alpha:]]", b"[:space:]", b"[[:punct:]]", b"[!", b"[a-b]", b"[A-Z]", b"[]a]", b"**/",
         b"/**", b"*a", b"\xc3\xa9", b"\r", b"\x0c", b":", b"[:", b":]", b"1", b"[\\]]", b"a[b", b"[B-a]", b"***",
         b"\\/", b"\xff", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8"]  # fmt: skip


def generated(seed: int) -> bytes:
    chance = random.Random(seed)
    lines = [b"".join(chance.choices(ATOMS, k=chance.randint(1, 6))) for _ in range(chance.randint(1, 3))]
    before = b"\xef\xbb\xbf" if chance.random() < 0.1 else b""
    return before + (b"\r\n" if chance.random() < 0.2 else b"\n").join(lines)


def said_by_git(project: Path, paths: list[bytes], *, ignore_case: bool = False) -> dict[bytes, bool]:
    """Of each path, whether git ignores it. Only folders have to exist."""
    git(project, "init", "-q")
    case = f"core.ignorecase={str(ignore_case).lower()}"
    stdin = b"".join(b"./" + path + b"\0" for path in paths)  # or git reads `:a` as more than a path
    fields = git(project, "-c", case, "check-ignore", "--no-index", "-v", "-n", "-z", "--stdin", stdin=stdin).split(
        b"\0"
    )
    rows = [fields[at : at + 4] for at in range(0, len(fields) - 1, 4)]
    return {path[2:]: bool(rule) and not rule.startswith(b"!") for _, _, rule, path in rows}


@needs_git
@pytest.mark.parametrize("ignore_case", [False, True])
def test_generated_rules_mean_what_git_says(project: Path, ignore_case: bool) -> None:
    ours: dict[bytes, bool] = {}
    for seed in range(100):
        base = b"%03d" % seed
        content = generated(seed + 1000 * ignore_case)
        for folder in (b"a/b", b"ab"):
            os.makedirs(os.path.join(os.fsencode(project), base, folder))
        (project / base.decode() / ".gitignore").write_bytes(content)
        rules = Rules(content, base, ignore_case=ignore_case)
        files = [
            *NAMES[3:],
            *(b"a/" + name for name in NAMES if name != b"b"),
            b"b",
            b"a/b/a",
            b"a/b/Ab",
            b"ab/a",
            b"ab/b",
        ]
        for path in [b"a", b"a/b", b"ab", *files]:  # parents first
            full = base + b"/" + path
            above = ours.get(os.path.dirname(full), False)
            ours[full] = above or bool(rules.verdict(full, path in (b"a", b"a/b", b"ab")))
    theirs = said_by_git(project, list(ours), ignore_case=ignore_case)
    wrong = [path for path in ours if ours[path] != theirs[path]]
    assert [(generated(int(path[:3]) + 1000 * ignore_case), path) for path in wrong] == []
    assert 300 < sum(ours.values()) < len(ours) - 300  # and they tell apart


@needs_git
@pytest.mark.parametrize("ignore_case", [False, True])
def test_every_byte_is_in_the_sets_in_which_git_has_it(project: Path, ignore_case: bool) -> None:
    classes = b"alnum alpha blank cntrl digit graph lower print punct space upper xdigit".split()
    sets = [b"[[:%s:]]" % name for name in classes]
    sets += [
        b"[B-a]",
        b"[!B-Y]",
        b"[A]",
        b"\\A",
        b"A",
        b"?",
        b"[^a]",
        b"[\\A-\\C]",
        b"[[-]]",
        b"[--/]",
        b"[\x80-\xff]",
        b"[]-a]",
    ]
    ours = {}
    for i, rule in enumerate(sets):
        base = b"%02d" % i
        (project / base.decode()).mkdir()
        (project / base.decode() / ".gitignore").write_bytes(rule + b"*x\n")
        rules = Rules(rule + b"*x\n", base, ignore_case=ignore_case)
        paths = [base + b"/" + bytes([byte]) + b".x" for byte in range(1, 256) if byte != ord("/")]
        ours |= {path: bool(rules.verdict(path, False)) for path in paths}
    theirs = said_by_git(project, list(ours), ignore_case=ignore_case)
    assert [(sets[int(path[:2])], path) for path in ours if ours[path] != theirs[path]] == []


@pytest.mark.parametrize(
    ("rules", "matching", "others"),
    [
        (b"\xef\xbb\xbfa.py\n", [b"a.py"], []),
        (b"[[:upper:]].py", [b"A.py"], [b"a.py"]),
        (b"[![:alpha:]].py", [b"1.py"], [b"a.py", b"A.py"]),
        (rb"[\]].py", [b"].py"], [b"\\.py"]),
        (b"[]-].py", [b"].py", b"-.py"], [b"a.py"]),
        (b"a[b.py", [], [b"a[b.py", b"ab.py"]),  # a set that never ends, to git
        (rb"a\[b.py", [b"a[b.py"], []),
        (b"a\x0cb\xc2\x85c\xe2\x80\xa8d.py", [b"a\x0cb\xc2\x85c\xe2\x80\xa8d.py"], [b"a", b"b", b"c", b"d.py"]),
        (b"a.py\t", [b"a.py\t"], [b"a.py"]),
        (b"a.py  \r\n", [b"a.py"], [b"a.py  ", b"a.py\r"]),
        (b"a.py  \n", [b"a.py"], []),
        (rb"a\  " + b"\n", [b"a "], [b"a"]),
        (b"?.py", [b"a.py"], [b"\xc3\xa9.py"]),  # bytes, not characters
        (b"a**/b.py", [b"a/b.py", b"ab.py", b"ax/y/b.py"], [b"b.py"]),  # git compares the `a` by itself
        (b"x/**/z", [b"x/z", b"x/y/z", b"x/y/y/z"], [b"x", b"xz"]),
        (b"x/**", [b"x/a", b"x/a/b"], [b"x"]),
        (b"a.py\n!a.py\n", [], [b"a.py"]),
        (b"!a.py\na.py\n", [b"a.py"], []),
        (rb"\!a.py" + b"\n" + rb"\#b.py", [b"!a.py", b"#b.py"], []),
        (b"a.py\0b", [b"a.py"], []),
        (b"a\\", [], [b"a", b"a\\"]),
    ],
)
def test_rules_that_are_easily_misread(rules: bytes, matching: list[bytes], others: list[bytes]) -> None:
    read = Rules(rules)
    assert [path for path in matching + others if read.verdict(path, False)] == matching


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=12) | st.text("ab*?/[]!\\ #-^&:", max_size=12).map(str.encode), st.sampled_from(NAMES))
@example(b"[?--]", b"a")
@example(b"[--9]", b"-")
def test_no_line_of_a_gitignore_is_an_error(line: bytes, path: bytes) -> None:
    assert is_ignored(path, False, [Rules(line)]) in (True, False)


# ── where rules stand ───────────────────────────────────────────────────────────────────────────────────────────────


def untracked(folder: Path, *more: str) -> list[str]:
    """What git sees, without the files that begin with a dot. more: -c, which adds what is tracked."""
    listed = git(folder, "ls-files", "-o", *more, "-z", "--exclude-standard", ".").decode().split("\0")
    return sorted(path for path in listed if path and "/." not in f"/{path}")


@needs_git
def test_every_place_of_rules_counts_in_the_order_of_git(project: Path, home: Path) -> None:
    names = [f"{folder}{name}.py" for folder in ("", "src/", "src/in/", "other/") for name in "abcdefgh"]
    tree(project, dict.fromkeys(names, "x"))
    git(project, "init", "-q")
    tree(project, {
        ".gitignore": "a.py\n/src/b.py\n!g.py\nother/\n", "src/.gitignore": "c.py\n",
        "src/in/.gitignore": "!a.py\nd.py", ".git/info/exclude": "e.py\n!f.py\ng.py\n",
    })  # fmt: skip
    tree(home, {".gitconfig": "[core]\n\texcludesFile = ~/mine\n", "mine": "f.py\nh.py\n"})
    assert read_folder(project).paths == untracked(project) != []
    assert read_folder(project / "src").paths == untracked(project / "src")  # its parents' rules too
    assert read_folder(project / "src" / "in").paths == ["a.py", "b.py", "f.py", "g.py"]


@needs_git
@pytest.mark.parametrize(
    "config",
    [
        '[core]\nexcludesFile = "~/with space;"  # quoted\n',
        '[CORE]\n  ExcludesFile="~/with \\\nspace;"\n',
        "[core] excludesFile = ~/plain ; a remark\n",
        "[include]\npath = ~/more\n",
        '[core "x"]\nexcludesFile = ~/none\n[core]\nexcludesFile = ~/plain\n',
        "",  # ~/.config/git/ignore
        "[core]\nexcludesFile =\n",  # none at all
    ],
)
def test_the_users_excludes_are_found_as_git_finds_them(project: Path, home: Path, config: str) -> None:
    rules = {"with space;": "a.py", "plain": "b.py", "included": "c.py", "none": "e.py", ".config/git/ignore": "d.py"}
    tree(home, {".gitconfig": config, "more": "[core]\nexcludesfile = ~/included\n", **rules})
    tree(project, dict.fromkeys(("a.py", "b.py", "c.py", "d.py", "e.py"), "x"))
    git(project, "init", "-q")
    assert read_folder(project).paths == untracked(project)
    assert len(untracked(project)) == (5 if config.endswith("=\n") else 4)


@needs_git
def test_a_repositorys_own_configuration_says_whether_case_counts(project: Path) -> None:
    tree(project, {"A.py": "x", "b.PY": "x", "Cd.py": "x", ".gitignore": "a.py\n*.Py\n!c[D].py\n"})
    git(project, "init", "-q")
    for value in ("true", "false"):
        git(project, "config", "core.ignorecase", value)
        assert read_folder(project).paths == untracked(project)


@needs_git
@pytest.mark.parametrize("version", ["2", "3", "4"])
@pytest.mark.parametrize("objects", ["sha1", "sha256"])
def test_what_is_tracked_is_not_ignored(project: Path, version: str, objects: str) -> None:
    names = [f"{folder}{n}.py" for folder in ("", "all/", "all/in/", "some/", "x" * 200 + "/") for n in range(5)]
    tree(project, dict.fromkeys(names, "x"))
    git(project, "init", "-q", f"--object-format={objects}")
    git(project, "config", "index.version", version)
    git(project, "add", "1.py", "all/1.py", "all/in/2.py", "some/1.py", "some/3.py", "x" * 200 + "/0.py")
    if version == "3":  # which an entry with more flags makes
        git(project, "add", "--intent-to-add", "some/4.py")
    tree(project, {".gitignore": "all/\n1.py\n/some/*\nx*\n", "all/.gitignore": "!3.py\n"})
    assert read_folder(project).paths == untracked(project, "-c")
    assert "all/in/2.py" in read_folder(project).paths


DAMAGED = [b"", b"DIRC", b"DIRC\0\0\0\4\xff\xff\xff\xff" + b"\xff" * 500, b"DIRC\0\0\0\2\xff\xff\xff\xff"]


def test_an_index_names_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_index, "MOST_BYTES", 10_000_000)
    first = b"\0" * 62 + b"\0" + b"a/" * 2000 + b"0000\0"
    more = [b"\0" * 62 + b"\4" + b"%04d\0" % n for n in range(1, 9000)]  # each names 4 kB in 68 bytes
    found = git_index.tracked_paths(b"DIRC" + struct.pack(">II", 4, 9000) + first + b"".join(more))
    assert 1000 < sum(len(path) > 4000 for path in found) < 2000
    assert sum(map(len, found)) <= 10_000_000


@pytest.mark.parametrize("index", DAMAGED)
def test_a_damaged_index_tracks_nothing(project: Path, index: bytes) -> None:
    tree(project, {".git/HEAD": "", ".git/index": index, ".gitignore": "a.py", "a.py": "x", "b.py": "x"})
    assert read_folder(project).paths == ["b.py"]


@needs_git
def test_a_further_working_tree_has_the_excludes_of_the_first(project: Path, tmp_path: Path) -> None:
    tree(project, {"a.py": "x"})
    git(project, "init", "-q")
    git(project, "add", "a.py")
    git(project, "-c", "user.name=n", "-c", "user.email=e@f", "commit", "-qm", "one")
    git(project, "worktree", "add", "-q", str(tmp_path / "second"))
    tree(project, {".git/info/exclude": "b.py\n"})
    tree(tmp_path / "second", {"b.py": "x", "c.py": "x", "in/b.py": "x"})
    assert untracked(tmp_path / "second") == ["c.py"]
    assert read_folder(tmp_path / "second").paths == ["a.py", "c.py"]


def test_without_a_repository_and_without_git_the_rules_hold_too(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    tree(home, {".config/git/ignore": "user.py\n"})
    tree(project, {".gitignore": "a.py\n", "a.py": "", "b.py": "", "user.py": "", "in/a.py": "", "in/c.py": ""})
    assert read_folder(project).paths == ["b.py", "in/c.py"]
    assert read_folder(project / "in").paths == ["a.py", "c.py"]  # no repository, so no parents' rules


def test_nothing_of_a_repositorys_configuration_is_run(project: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = tree(tmp_path, {"script": f"#!/bin/sh\ntouch {ran}\n"}) / "script"
    script.chmod(0o755)
    keys = "".join(f"{key} = {script}\n" for key in ("fsmonitor", "pager", "sshCommand", "editor", "askPass"))
    tree(project, {".git/HEAD": "ref: refs/heads/main\n", ".git/config": f"[core]\n{keys}", "a.py": "x"})
    (project / ".git" / "objects").mkdir()
    (project / ".git" / "refs").mkdir()
    assert read_folder(project).paths == ["a.py"]
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config", "info/exclude"])
def test_a_pipe_or_device_among_gits_files_is_not_read(project: Path, name: str) -> None:
    tree(project, {".git/HEAD": "ref: refs/heads/main\n", "a.py": "x", ".git/info/other": ""})
    os.mkfifo(project / ".git" / name)
    assert read_folder(project).paths == ["a.py"]
    (project / ".git" / name).unlink()
    (project / ".git" / name).symlink_to("/dev/zero")
    assert read_folder(project).paths == ["a.py"]


def test_configuration_that_includes_itself_ends(project: Path, home: Path) -> None:
    tree(
        home,
        {".gitconfig": "[include]\npath = ~/.gitconfig\npath = .gitconfig\n[core]\nexcludesfile = ~/x", "x": "a.py"},
    )
    tree(project, {"a.py": "", "b.py": ""})
    assert read_folder(project).paths == ["b.py"]


def test_a_file_of_rules_that_cannot_be_judged_packs_nothing_and_is_said(project: Path) -> None:
    globs = "".join(f"a*{'b' * 14}\n" for _ in range(MOST_GLOB_TOKENS // 16 + 1))
    with pytest.raises(TooManyGlobs):
        Rules(globs.encode())
    for rules, why in ((globs, "characters in globs"), ("#" * (MOST_EXCLUDE_BYTES + 1), "too large")):
        tree(project, {"in/.gitignore": rules, "in/a.py": "x", "b.py": "x"})
        found = read_folder(project)
        assert found.paths == ["b.py"]
        assert [(s.path, why in s.why) for s in found.skipped] == [("in", True)]
        with pytest.raises(PromptError, match=why) as error:
            read_folder(project / "in")
        assert "mend that file" in error.value.hint
        tree(project, {".git/HEAD": ""})
        (project / "in" / "deep").mkdir(exist_ok=True)
        with pytest.raises(PromptError, match=why):
            read_folder(project / "in" / "deep")


def test_a_gitignore_that_is_a_link_is_not_followed(project: Path, tmp_path: Path) -> None:
    tree(project, {"a.py": "x", "rules": "a.py\n"})
    (project / ".gitignore").symlink_to("rules")
    assert "a.py" in read_folder(project).paths


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("[a]\nb\nc = 1 # x\n[d \"e\"]\nf = 2\n", [("a.b", "true"), ("a.c", "1")]),
        ("[a.B] C = \"3 ;\" 4 \n", [("a.b.c", "3 ; 4")]),
        ("[a]\nb = c:\\\\d\\t\\\"e\\\"\r\n", [("a.b", 'c:\\d\t"e"')]),
        ("\ufeff[a]b=", [("a.b", "")]),
        ("b = 1\n[a\nc = 1\n]\n= 3\n", []),
    ],
)  # fmt: skip
def test_configuration_is_read_as_git_writes_it(text: str, entries: list[tuple[str, str]]) -> None:
    assert list(config_entries(text)) == entries


def test_rules_of_parents_end_at_the_top_of_the_repository(tmp_path: Path, project: Path) -> None:
    tree(tmp_path, {".gitignore": "a.py\n"})
    tree(project, {".git/HEAD": "", "in/a.py": "x"})
    assert find_excludes(project / "in").top == project
    assert read_folder(project / "in").paths == ["a.py"]
