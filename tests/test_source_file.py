"""What a target names, how much is read, and that a file keeps everything but the hole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mlx_codellama.errors import OutputError, PromptError
from mlx_codellama.source_file import read_text, replace_file, split_target
from mlx_codellama.staging import staging_name


def test_targets_are_split_but_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_target("a.py") == (Path("a.py"), None, None)
    assert split_target("a.py:3") == (Path("a.py"), 3, None)
    assert split_target("a.py:3:") == (Path("a.py"), 3, None)  # as grep and compilers write it
    assert split_target("a.py:3:7:") == (Path("a.py"), 3, 7)
    assert split_target("d/a:b.py:3:14") == (Path("d/a:b.py"), 3, 14)
    Path("a.py:3").write_text("")
    assert split_target("a.py:3") == (Path("a.py:3"), None, None)


def test_text_that_is_not_utf8_names_the_byte_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.py").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(PromptError, match=r"f\.py is not UTF-8 text \(byte 0xe9 in line 2\)") as error:
        read_text(Path("f.py"))
    assert "iconv" in error.value.hint


def test_no_more_is_read_than_any_context_holds(tmp_path: Path) -> None:
    file = tmp_path / "huge.py"
    with open(file, "wb") as out:
        out.truncate(2**40)  # a terabyte of zeros that takes no room
    with pytest.raises(PromptError, match=r"huge\.py cannot be read: it has 1,099,511,627,776 bytes"):
        read_text(file)


def test_a_file_is_replaced_in_one_step_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"old\r\n")
    path.chmod(0o751)
    inode = path.stat().st_ino
    replace_file(path, "new\r\n", was="old\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    assert path.stat().st_ino != inode  # renamed over, not written into
    assert os.listdir(tmp_path) == ["a.py"]


def test_what_a_killed_fill_left_goes_with_the_next_one_in_the_folder(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("old")
        staging_name(tmp_path / name, "partial").write_text("half")
    replace_file(tmp_path / "a.py", "new", was="old")
    assert sorted(os.listdir(tmp_path)) == ["a.py", "b.py"]


def test_a_link_goes_on_pointing_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "real.py").write_text("old")
    (tmp_path / "link.py").symlink_to("real.py")
    replace_file(tmp_path / "link.py", "new", was="old")
    assert (tmp_path / "link.py").is_symlink()
    assert (tmp_path / "real.py").read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.py"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        replace_file(path, "new", was="old")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.py"]


def test_a_file_edited_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("old, and edited")
    with pytest.raises(OutputError, match="changed while"):
        replace_file(path, "new", was="old")
    assert path.read_text() == "old, and edited"
    assert os.listdir(tmp_path) == ["a.py"]
    path.unlink()
    with pytest.raises(OutputError, match="no longer there"):
        replace_file(path, "new", was="old")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_what_must_not_be_replaced_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.py"
    path.write_text("old")
    path.chmod(0o444)
    named = {"file": path, "link": tmp_path / "link.py", "folder": tmp_path}[what]
    if what == "link":
        named.symlink_to("a.py")
    with pytest.raises(OutputError, match="no ordinary file" if what == "folder" else "read-only") as error:
        replace_file(named, "new", was="old")
    assert "--in-place" in error.value.hint
    assert path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("old")
    os.chown(path, 4321, 1234)
    path.chmod(0o2640)  # after the owner: giving a file away clears set-group-id
    replace_file(path, "new", was="old")
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4321, 1234, 0o2640)
