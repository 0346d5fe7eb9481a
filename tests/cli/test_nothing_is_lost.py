"""What a command did not make it neither replaces nor empties, whatever options it is given."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from mlx_codellama.staging import staging_name
from mlx_codellama.weights import Checkpoint

from .conftest import Run

PROMPT = "def f(a, b):\n    return a + b\n\n"


def contents(folder: Path) -> dict[str, str | bytes]:
    """Every path below folder with its bytes, or what it links to."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else b"" if not path.is_file() else path.read_bytes()
    return found


@pytest.fixture
def made(run: Run, tiny: str, tmp_path: Path) -> Path:
    """A model folder that convert wrote."""
    assert run("convert", tiny, tmp_path / "made").exit_code == 0
    return tmp_path / "made"


# ── --overwrite ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_project_with_a_config_json_is_not_replaced(
    run: Run, tiny: str, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / ".git").mkdir()
    (project / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (project / "config.json").write_text('{"port": 1}')
    before = contents(project)
    monkeypatch.chdir(project)
    result = run(verb, tiny, ".", "--bits", 4, "--overwrite")
    assert result.exit_code == 1
    assert "is no model folder that this program wrote; it holds '.git', 'src'" in result.stderr
    assert "hint: it is not replaced; choose another folder" in result.stderr
    assert contents(project) == before


def test_a_config_json_alone_makes_no_model_folder(run: Run, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "settings"
    folder.mkdir()
    (folder / "config.json").write_text('{"port": 1}')
    result = run("quantize", tiny, folder, "--overwrite")
    assert result.exit_code == 1
    assert "it holds 'config.json'" in result.stderr
    assert contents(folder) == {"config.json": b'{"port": 1}'}


def test_a_download_is_not_replaced(run: Run, tiny: str, tmp_path: Path) -> None:
    """It has the names that `save` writes, and no run.json of ours."""
    download = shutil.copytree(tiny, tmp_path / "download")
    before = contents(download)
    for text in (None, "{}", '{"tool": "another"}', "[1]", "{"):
        if text is not None:
            (download / "run.json").write_text(text)
            before["run.json"] = text.encode()
        assert run("convert", tiny, download, "--overwrite").exit_code == 1
        assert contents(download) == before


@pytest.mark.parametrize("what", ["notes.md", ".git/HEAD", "model.safetensors/x", "tokenizer.model"])
def test_a_model_folder_with_something_of_the_users_is_not_replaced(
    run: Run, tiny: str, made: Path, tmp_path: Path, what: str
) -> None:
    path = made / what
    if what == "tokenizer.model":
        path.rename(tmp_path / "real")
        path.symlink_to(tmp_path / "real")  # this program writes no links
    elif what == "model.safetensors/x":
        path.parent.rename(tmp_path / "elsewhere")
    if what != "tokenizer.model":
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = contents(made)
    result = run("quantize", tiny, made, "--overwrite")
    assert result.exit_code == 1
    assert f"error: {made} holds what is no part of the model: '{what.partition('/')[0]}'" in result.stderr
    assert "hint: move that away, or choose another folder" in result.stderr
    assert contents(made) == before
    assert sorted(p.name for p in made.parent.iterdir() if p.name.startswith(".")) == []


def test_what_comes_into_the_folder_while_the_new_one_is_written_is_kept(
    run: Run, tiny: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Checkpoint.blocks

    def slow(self: Checkpoint) -> object:
        (made / "notes.md").write_text("mine")
        return blocks(self)

    before = contents(made)
    monkeypatch.setattr(Checkpoint, "blocks", slow)
    result = run("quantize", tiny, made, "--overwrite")
    assert result.exit_code == 1
    assert "'notes.md'" in result.stderr
    assert contents(made) == {**before, "notes.md": b"mine"}


def test_all_that_run_json_lists_and_what_a_killed_command_left_in_it_may_go(run: Run, tiny: str, made: Path) -> None:
    data = json.loads((made / "run.json").read_text())
    assert data["files"] == sorted(path.name for path in made.iterdir())
    (made / "chat_template.jinja").write_text("of a version to come")
    (made / "run.json").write_text(json.dumps({**data, "files": [*data["files"], "chat_template.jinja"]}))
    staging_name(made / "run.json", "partial").write_text("half")
    assert run("quantize", tiny, made, "--overwrite").exit_code == 0
    assert not (made / "chat_template.jinja").exists()


def test_a_read_only_model_folder_is_not_replaced(run: Run, tiny: str, made: Path) -> None:
    made.chmod(0o555)
    before = contents(made)
    result = run("quantize", tiny, made, "--overwrite")
    made.chmod(0o755)
    assert result.exit_code == 1
    assert "is read-only, and is not replaced" in result.stderr
    assert contents(made) == before
    assert os.listdir(made.parent) == ["made"]


def test_a_replaced_model_keeps_the_modes_of_its_folder_and_files(run: Run, tiny: str, made: Path) -> None:
    made.chmod(0o750)
    (made / "model.safetensors").chmod(0o600)
    assert run("quantize", tiny, made, "--overwrite").exit_code == 0
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    assert stat.S_IMODE((made / "model.safetensors").stat().st_mode) == 0o600


# ── names beside the output ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exists", [False, True])
def test_links_and_folders_beside_the_output_are_left_alone(run: Run, tiny: str, tmp_path: Path, exists: bool) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    if exists:
        assert run("convert", tiny, tmp_path / "q").exit_code == 0
    (tmp_path / ".q.partial").symlink_to(precious)
    (tmp_path / ".q.old").mkdir()
    (tmp_path / ".q.old" / "notes.md").write_text("mine")
    result = run("quantize", tiny, tmp_path / "q", *["--overwrite"] * exists)
    assert result.exit_code == 0, result.stderr
    assert contents(precious) == {"thesis.tex": b"years"}
    assert contents(tmp_path / ".q.old") == {"notes.md": b"mine"}
    assert sorted(os.listdir(tmp_path)) == [".q.old", ".q.partial", "precious", "q"]


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_verify_writes_its_verdict_beside_anything(run: Run, tiny: str, made: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    plant = made / ".run.json.partial"
    if kind == "pipe":
        os.mkfifo(plant)
    else:
        (os.symlink if kind == "link" else os.link)(tmp_path / "thesis.tex", plant)
    from mlx_codellama.weights import update_run

    update_run(made, {"note": "good"})
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert os.path.lexists(plant)
    assert json.loads((made / "run.json").read_text())["note"] == "good"


# ── a source that lies in the output ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["convert", "quantize"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_source_of_links_into_the_output_is_recognised(
    run: Run, made: Path, tmp_path: Path, verb: str, link: object
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in made.iterdir():
        assert callable(link)
        link(path, source / path.name)
    before = contents(made)
    result = run(verb, source, made, "--bits", 4, "--overwrite")
    assert result.exit_code == 1
    assert f"error: {made} holds the source {source}" in result.stderr
    assert "which would be lost" in result.stderr
    assert contents(made) == before


def test_a_source_under_another_name_of_the_output_is_recognised(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(made)
    before = contents(made)
    for source in (tmp_path / "other", tmp_path / "other" / ".." / "made"):
        result = run("convert", source, made, "--overwrite")
        assert result.exit_code == 1
        assert "would be lost" in result.stderr
    assert contents(made) == before


# ── --cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite(run: Run, tiny: str, file: Path, *, bits: int = 8) -> tuple[int, str]:
    """complete with --cache and --rewrite-cache; → exit code, stderr."""
    result = run("complete", PROMPT, "-m", tiny, "-n", 2, "--cache", file, "--rewrite-cache", "--kv-bits", bits)
    return result.exit_code, result.stderr


def test_a_new_cache_is_its_owners_alone_and_a_rewritten_one_keeps_its_mode(
    run: Run, tiny: str, tmp_path: Path
) -> None:
    file = tmp_path / "cache"
    assert rewrite(run, tiny, file)[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for mode in (0o600, 0o640):
        file.chmod(mode)
        old = file.read_bytes()
        assert rewrite(run, tiny, file, bits=16 if mode == 0o600 else 8)[0] == 0
        assert file.read_bytes() != old
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_linked_cache_stays_a_link(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    file = tmp_path / "cache"
    file.symlink_to("disk/real")
    assert rewrite(run, tiny, file)[0] == 0
    first = (tmp_path / "disk" / "real").read_bytes()
    assert rewrite(run, tiny, file, bits=16)[0] == 0
    assert os.readlink(file) == "disk/real"
    assert (tmp_path / "disk" / "real").read_bytes() != first
    assert sorted(os.listdir(tmp_path)) == ["cache", "disk"]


@pytest.mark.parametrize("what", ["a named pipe", "a socket", "a device", "a folder"])
def test_a_cache_is_no_pipe_socket_or_device(run: Run, tiny: str, tmp_path: Path, what: str) -> None:
    file = tmp_path / "cache"
    if what == "a named pipe":
        os.mkfifo(file)
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(file))
    elif what == "a device":
        file.symlink_to("/dev/null")
    else:
        file.mkdir()
    before = os.lstat(file)
    code, said = rewrite(run, tiny, file)
    assert code == (2 if what == "a folder" else 1)
    assert what == "a folder" or f"is {what} and no saved key-value cache" in said
    after = os.lstat(file)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_file_beside_the_cache_is_not_written_into(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    os.link(tmp_path / "thesis.tex", tmp_path / ".cache.partial")
    assert rewrite(run, tiny, tmp_path / "cache")[0] == 0
    assert (tmp_path / "thesis.tex").read_text() == (tmp_path / ".cache.partial").read_text() == "years"


def test_the_cache_of_python_replaces_nothing_else(tiny: str, tmp_path: Path) -> None:
    from mlx_codellama import load
    from mlx_codellama.errors import CacheError

    m = load(tiny)
    m.complete(PROMPT, max_tokens=1)
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CacheError, match="not a saved key-value cache, and is kept"):
        m.save_cache(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years"


# ── train ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tokenizer.model", "log.jsonl", "state.safetensors", "model/notes.md", "a.txt"])
def test_train_takes_no_folder_that_it_did_not_make(run: Run, tmp_path: Path, name: str) -> None:
    out, sources = tmp_path / "out", tmp_path / "sources"
    sources.mkdir()
    for i in range(80):
        (sources / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n")
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    result = run("train", out, "--sources", sources, "--steps", 1)
    assert result.exit_code == 1
    assert f"{out} was not made by train; it holds '{name.partition('/')[0]}'" in result.stderr
    assert "hint: name a new or an empty folder" in result.stderr
    assert {key: value for key, value in contents(out).items() if value} == {name: b"mine"}


def test_train_refuses_a_model_folder(run: Run, made: Path) -> None:
    before = contents(made)
    result = run("train", made, "--steps", 1)
    assert result.exit_code == 1
    assert f"{made} was not made by train" in result.stderr
    assert contents(made) == before
