"""Files and folders are replaced as a whole, and nothing is touched that this program did not make."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_codellama import staging
from mlx_codellama.errors import OutputError, OutputExistsError
from mlx_codellama.staging import folder_beside, place_folder, replacing, staging_name, write_file


def beside(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def anything(entry: Path) -> bool:
    return entry.is_file()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("private", [True, False])
def test_a_new_file_has_the_mode_that_was_asked_for(tmp_path: Path, private: bool) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"new", private=private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == (0o600 if private else 0o640)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o751])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_file(path, b"new", private=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert beside(path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="extended attributes have another interface elsewhere")
def test_a_replaced_file_keeps_its_extended_attributes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    try:
        os.setxattr(path, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has none")
    write_file(path, b"new")
    assert os.getxattr(path, "user.note") == b"mine"


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "real").write_bytes(b"old")
    (tmp_path / "middle").symlink_to("deeper/real")
    (tmp_path / "link").symlink_to("middle")
    (tmp_path / "new").symlink_to("deeper/not yet")
    write_file(tmp_path / "link", b"new")
    write_file(tmp_path / "new", b"born")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert (tmp_path / "deeper" / "real").read_bytes() == b"new"
    assert (tmp_path / "new").is_symlink()
    assert (tmp_path / "deeper" / "not yet").read_bytes() == b"born"


@pytest.mark.parametrize("what", ["a named pipe", "a socket", "a folder", "a device"])
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    if what == "a named pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    else:
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    with pytest.raises(OutputError, match=f"is {what}, which is not replaced"):
        write_file(path, b"new")
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert beside(path) == ["a"]


def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(OutputError, match="is read-only"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_never_replaces_one_also_not_one_that_comes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OutputExistsError), replacing(path, new=True):
        path.write_bytes(b"theirs")
    with pytest.raises(OutputExistsError):
        write_file(path, b"new", new=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputExistsError):
        write_file(tmp_path / "link", b"new", new=True)
    assert path.read_bytes() == b"theirs"
    assert beside(path) == ["a", "link"]


def test_a_pipe_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="named pipe"), replacing(tmp_path / "a"):
        os.mkfifo(tmp_path / "a")
    assert beside(tmp_path / "a") == ["a"]


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only: choose another place"),
        (errno.ELOOP, "links lead in a circle"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.EACCES, "permissions"),
    ],
)
def test_each_refusal_of_the_system_has_a_hint_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match=os.strerror(code)) as caught:
        write_file(tmp_path / "a", b"new")
    assert hint in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_links_in_a_circle_a_missing_folder_and_too_long_a_name_are_said(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path, hint in (("a", "circle"), ("no/file", "make the folder"), ("x" * 300, "shorter name")):
        with pytest.raises(OutputError, match="cannot write") as caught:
            write_file(tmp_path / path, b"new")
        assert hint in caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "\udcff.py", ".hidden"])
def test_every_name_that_the_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, b"one")
    leftover = staging_name(tmp_path / name, "partial")
    leftover.write_bytes(b"of a killed process")
    write_file(tmp_path / name, b"two")
    assert os.listdir(tmp_path) == [name]


# ── what lies beside ────────────────────────────────────────────────────────────────────────────────────────────────


def plant_link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def plant_folder(path: Path, precious: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years")


def plant_pipe(path: Path, precious: Path) -> None:
    os.mkfifo(path)


def plant_other_users(path: Path, precious: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    path.write_text("theirs")
    os.chown(path, 4321, 1234)


def plant_hard_link(path: Path, precious: Path) -> None:
    os.link(precious / "thesis.tex", path)


PLANTS = [plant_link, plant_folder, plant_pipe, plant_other_users]


@pytest.mark.parametrize("plant", [*PLANTS, plant_hard_link])
@pytest.mark.parametrize("name", [".a.partial", ".a.old", ".a.0123456789abcdef-0123456789abcdef.partial"])
def test_names_without_the_mark_are_left_alone(tmp_path: Path, plant: Callable[[Path, Path], None], name: str) -> None:
    precious, work = tmp_path / "precious", tmp_path / "work"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    work.mkdir()
    plant(work / name, precious)
    before = os.lstat(work / name)
    write_file(work / "a", b"new")
    (work / "a").unlink()
    with folder_beside(work / "a", anything) as folder:
        (folder / "x").write_text("new")
        place_folder(folder, work / "a", anything, lambda old: None)
    assert os.lstat(work / name) == before or plant is plant_hard_link
    assert os.listdir(precious) == ["thesis.tex"]
    assert (precious / "thesis.tex").read_text() == "years"
    assert sorted(os.listdir(work)) == sorted([name, "a"])


@pytest.mark.parametrize("what", ["partial", "old"])
@pytest.mark.parametrize("plant", PLANTS)
def test_the_mark_alone_does_not_make_it_ours(tmp_path: Path, plant: Callable[[Path, Path], None], what: str) -> None:
    """Links, pipes, other users' files, and folders that hold what is not ours."""
    precious, target = tmp_path / "precious", tmp_path / "work" / "a"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    target.parent.mkdir()
    target.write_bytes(b"old")
    planted = staging_name(target, what)
    plant(planted, precious)
    write_file(target, b"new")
    target.unlink()
    target.mkdir()
    with folder_beside(target, lambda entry: entry.name == "model"):
        pass
    assert os.path.lexists(planted)
    assert os.listdir(precious) == ["thesis.tex"]
    assert beside(target) == sorted([planted.name, "a"])


def test_what_a_killed_process_left_is_removed_also_by_who_writes_another_file_there(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        staging_name(tmp_path / name, "partial").write_bytes(b"half")
    write_file(tmp_path / "c.py", b"whole")
    assert os.listdir(tmp_path) == ["c.py"]


def test_what_a_living_process_writes_is_left_to_it(tmp_path: Path) -> None:
    writer = "import sys; from mlx_codellama.staging import replacing\n"
    writer += "with replacing('a') as fd: print('writing', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", writer]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        (being_written,) = os.listdir(tmp_path)
        with pytest.raises(OutputError, match="another process is writing"):
            write_file(tmp_path / "a", b"mine")
        write_file(tmp_path / "b", b"mine")
        assert sorted(os.listdir(tmp_path)) == sorted([being_written, "b"])
        process.kill()
    write_file(tmp_path / "a", b"mine")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exchange", [True, False])
def test_what_comes_into_a_folder_while_it_is_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model").write_text("old")
    asked: list[Path] = []

    def check(folder: Path) -> None:
        asked.append(folder)
        if len(asked) == 2:
            (folder / "notes.md").write_text("written at the last moment")
            raise OutputExistsError("notes.md")

    with folder_beside(out, anything) as folder:
        (folder / "model").write_text("new")
        with pytest.raises(OutputExistsError):
            place_folder(folder, out, anything, check)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "model": "old",
        "notes.md": "written at the last moment",
    }
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("flags", [True, False])
def test_a_rename_to_a_new_name_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: bool
) -> None:
    if not flags:
        monkeypatch.setattr(staging, "_rename_with", lambda *args: errno.ENOSYS)
    for name in ("one", "other", "third"):
        (tmp_path / name).mkdir()
    with pytest.raises(OutputExistsError):
        staging.rename_new(tmp_path / "one", tmp_path / "other")  # an empty folder, which rename(2) would replace
    (tmp_path / "other").rmdir()
    staging.rename_new(tmp_path / "one", tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "third"]
