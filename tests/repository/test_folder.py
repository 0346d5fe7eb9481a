"""What of a folder is read: source, nothing from outside, no secrets; and what hostile folders cost."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_codellama.errors import PromptError
from mlx_codellama.repository import Folder, pack, read_folder
from mlx_codellama.repository import folder as folder_module
from mlx_codellama.repository.folder import HUGE_BYTES, SECRETS
from mlx_codellama.repository.ignore import MOST_PATH_BYTES, Rules

from .conftest import tree


def words(text: str) -> int:
    return len(text.split())


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


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = ["id_rsa", "id_rsa.old", "id_ed25519", "server.pem", "tls.key", "TLS.KEY2.key", "prod.env", "prod.env.local",
          ".env", ".env.local", "env", ".npmrc", ".netrc", "_netrc", "credentials", "credentials.json", "secret.json",
          "Credentials.txt", "my.keystore", "a.p12", "a.pfx", "a.ppk", "service-account-x.json", "terraform.tfstate",
          "prod.tfvars", ".htpasswd", ".git-credentials", "client_secret_1.json", "server.key.bak", "x.pem~",
          "secrets.yml"]  # fmt: skip


def test_secrets_are_never_packed_and_said_once(tmp_path: Path) -> None:
    code = ["a.py", "env.ts", "environment.py", "key.py", "monkey", "secrets.py"]
    tree(tmp_path, dict.fromkeys([*SECRET, "deep/a.pem", *code], "password"))
    packed = pack(read_folder(tmp_path), None, "", budget=999, n_tokens=words)
    assert sorted(piece.path for piece in packed.pieces) == code
    assert sorted(skipped.path for skipped in packed.skipped) == sorted([*SECRET, "deep/a.pem"])
    assert {skipped.why for skipped in packed.skipped} == {SECRETS}


def test_a_secret_that_git_ignores_needs_no_word(tmp_path: Path) -> None:
    assert read_folder(tree(tmp_path, {".gitignore": "*.env\n", "prod.env": "x"})).skipped == []


def test_a_private_key_is_a_secret_under_any_name(tmp_path: Path) -> None:
    key = "-----BEGIN {}PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEA\n"
    parser = "START = '-----BEGIN PRIVATE KEY-----'\nEND = 'x'\n"
    tree(
        tmp_path, {"a.py": key.format("RSA "), "b.txt": key.format(""), "c.py": repr(key.format("EC ")), "d.py": parser}
    )
    packed = pack(read_folder(tmp_path), None, "", budget=999, n_tokens=words)
    assert [piece.path for piece in packed.pieces] == ["d.py"]
    assert {s.path: s.why for s in packed.skipped} == dict.fromkeys(("a.py", "b.txt", "c.py"), SECRETS)


# ── names, folders and links that nobody expects ────────────────────────────────────────────────────────────────────


def test_names_that_are_not_one_line_of_text_are_left_out_and_noted(tmp_path: Path) -> None:
    tree(tmp_path, {"a.py": "x", "café ☃.py": "x"})
    odd = [b"\xe9.py", b"a\nimport os\n.py", b"a\x1b]0;title\x07.py", b"a\r.py", b"a\xe2\x80\xa8.py",
           b"a\xe2\x80\xae.py", b"\xc2\x85.py"]  # fmt: skip
    try:
        for name in odd:
            os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT | os.O_WRONLY))
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"\xff", b"in"))
    except OSError:
        pytest.skip("this file system takes no such names")
    found = read_folder(tmp_path)
    assert found.paths == ["a.py", "café ☃.py"]
    assert sorted(os.fsencode(skipped.path) for skipped in found.skipped) == sorted([*odd, b"\xff"])
    assert all("UTF-8" in skipped.why for skipped in found.skipped)
    pack(found, None, "", budget=100, n_tokens=words).text.encode()


def test_a_folder_that_cannot_be_read_is_left_out_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a.py": "x", "pgdata/b.py": "x"})
    (tmp_path / "pgdata").chmod(0)
    if os.geteuid() == 0:  # who may read everything
        real = os.open

        def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if path == "pgdata":
                raise PermissionError(13, "Permission denied")
            return real(path, flags, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", refuse)
    found = read_folder(tmp_path)
    assert found.paths == ["a.py"]
    assert [(skipped.path, skipped.why) for skipped in found.skipped] == [("pgdata", "Permission denied")]
    (tmp_path / "pgdata").chmod(0o755)


def test_pipes_and_sockets_are_noted_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a.py": "x"})
    os.mkfifo(tmp_path / "pipe.py")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind("socket.py")
    found = read_folder(tmp_path)
    assert found.paths == ["a.py"]
    assert [(s.path, s.why) for s in found.skipped] == [("pipe.py", "not a file"), ("socket.py", "not a file")]


def test_links_are_not_resolved_however_long_their_chain(tmp_path: Path) -> None:
    repo = tree(tmp_path / "repo", {"a.py": "x", "sub/b.py": "x"})
    for n in range(1100):
        (repo / f"l{n}").symlink_to(f"l{n + 1}/l{n + 1}")
    (repo / "in.py").symlink_to(repo / "a.py")
    (repo / "sub" / "up.py").symlink_to("../../repo2/b.py")
    found = read_folder(repo)
    assert found.paths == ["a.py", "sub/b.py"]
    assert [skipped.path for skipped in found.skipped] == ["sub/up.py"]


# ── what hostile folders cost ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize(
    ("rules", "path", "ignored"),
    [
        ("a" + " " * 250_000 + "x", "a", None),
        ("a" + "\\ " * 250_000, "a", None),
        ("*a*a*a*a*ab", "a" * 240, None),
        ("*a*a*a*a*ab", "a" * 240 + "b", True),
        ("*a" * 60 + "b", "a" * 240, None),
        ("**/" * 25 + "x", "d/" * 25 + "y", None),
        ("**/" * 25 + "x", "d/" * 25 + "x", True),
        ("/**/a" * 25 + "/x", "a/" * 60 + "y", None),
        ("[a]" * 80_000, "a", None),
        ("[a]" * MOST_PATH_BYTES, "a" * MOST_PATH_BYTES, True),
        ("[" + "[:" * 200_000 + "x]", "[", True),
        ("[" + "a-z" * 200_000 + "]", "b", True),
        ("[" * 200_000, "b", None),
        ("*" * 500_000 + "b", "a" * 4000 + "b", True),
        ("?" * 60_000, "a" * 4000, None),
        ("\n".join(f"f{n}.py" for n in range(25_000)), "src/f24999.py", True),
        ("\n".join(f"*x{n}" for n in range(25_000)), "src/x24999", True),
        ("\n".join("!/a/b" for n in range(25_000)), "a/b", False),
    ],
    ids=lambda value: str(value)[:16],
)
def test_time_is_linear_in_the_rules_and_the_path(rules: str, path: str, ignored: bool | None) -> None:
    read = Rules(rules.encode())
    for _ in range(20):
        assert read.verdict(path.encode(), False) is ignored


@pytest.mark.usefixtures("no_hang")
def test_many_rules_and_many_files_are_looked_up(tmp_path: Path) -> None:
    rules = "".join(f"skip{n}.py\n" for n in range(25_000))
    tree(tmp_path, {".gitignore": rules, **{f"d/f{n}.py": "" for n in range(300)}, "skip77.py": ""})
    assert len(read_folder(tmp_path).paths) == 300


def test_rules_that_take_too_long_end_the_walk_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {".gitignore": "a*b*c?d\n" * 10, **{f"f{n:03}.py": "" for n in range(300)}})
    monkeypatch.setattr(folder_module, "MOST_RULE_STEPS", 1000)
    found = read_folder(tmp_path)
    assert 100 < len(found.paths) < 300
    assert [(s.path, ".gitignore take too long" in s.why) for s in found.skipped] == [("", True)]


def test_beyond_a_number_of_files_the_nearest_are_taken_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MOST_FILES", 60)
    tree(tmp_path, {f"{folder}/f{n:02}.py": "" for folder in ("a", "b", "z/near", "z") for n in range(25)})
    found = read_folder(tmp_path, "z/near")
    assert len([path for path in found.paths if path.startswith("z/")]) == 50
    assert [(s.path, "more than 60 files" in s.why) for s in found.skipped] == [("", True)]
    monkeypatch.setattr(folder_module, "MOST_ENTRIES", 30)
    assert ["more than 30 names" in s.why for s in read_folder(tmp_path, "z/near").skipped] == [True]


def test_a_very_deep_tree_ends_where_a_limit_says(tmp_path: Path) -> None:
    name = "a-folder-of-some-length"
    here = os.open(tmp_path, os.O_RDONLY)
    opened = [here]
    for depth in range(250):  # deeper than a path may be long
        if depth in (3, 240):
            os.close(os.open("a.py", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir(name, dir_fd=here)
        here = os.open(name, os.O_RDONLY, dir_fd=here)
        opened.append(here)
    try:
        found = read_folder(tmp_path)
        assert [path.count("/") for path in found.paths] == [3]
        assert [(s.path.count("/"), s.why) for s in found.skipped] == [(63, "deeper than 64 folders")]
    finally:  # from the deepest up: their names are too long for one path
        os.close(opened.pop())
        for folder in reversed(opened):
            os.rmdir(name, dir_fd=folder)
            if "a.py" in os.listdir(folder):
                os.unlink("a.py", dir_fd=folder)
            os.close(folder)


def test_a_huge_file_is_not_read_and_none_that_grows_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tree(tmp_path, {"a.py": "x"}) / "huge.py", "wb") as sparse:
        sparse.truncate(1 << 40)
    found = read_folder(tmp_path)
    assert found.read("huge.py") is None
    (tmp_path / "a.py").write_text("x" * (HUGE_BYTES + 1))
    assert found.read("a.py") is None
    assert [(s.path, s.why) for s in found.skipped] == [("huge.py", "too large"), ("a.py", "too large")]
