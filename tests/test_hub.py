"""Fetching from a hub, against a small one on loopback that speaks what huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest
from click.testing import CliRunner
from oracles.checkpoints import random_weights, tiny_args, write_hf

from mlx_codellama import hub
from mlx_codellama.cli.group import group
from mlx_codellama.errors import CheckpointError, CodeLlamaError, DownloadError
from mlx_codellama.weights import read_header

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/Small-Llama"
BIG = bytes(np.random.default_rng(1).integers(0, 256, 70_001, dtype=np.uint8))
OTHER = bytes(np.random.default_rng(2).integers(0, 256, 30_011, dtype=np.uint8))
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.model": b"pieces",
    "README.md": b"not needed",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": OTHER,
    "pytorch_model.bin": b"the same again",
    "consolidated.00.pth": b"and again",
    "original/consolidated.00.pth": b"and again",
}


class Hub(ThreadingHTTPServer):
    """One repository. `breaks` counts transfers to be cut after `cut_at` bytes; `log` holds (method, file, range)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.log: list[tuple[str, str, str]] = []
        self.sent: dict[str, int] = {}
        self.breaks, self.cut_at = 0, 20_000
        self.refusal: tuple[int, str] | None = None
        self.bad_byte = False
        self.ranges = True
        self.store = ""  # where large files are redirected to
        self.tokens_at_store: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, location: str, data: bytes) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, *, body: bool) -> None:
        hub_ = self.server
        path = self.path.partition("?")[0]
        if hub_.refusal:
            return self.refuse(*hub_.refusal)
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if repo != REPO:
                return self.refuse(404, "RepoNotFound")
            if revision not in ("", "main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub_.files]
            data = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None
        name = path.removeprefix(f"/{REPO}/resolve/").partition("/")[2]
        if path.startswith("/store/"):
            name = path.removeprefix("/store/")
            hub_.tokens_at_store.append(self.headers.get("Authorization"))
        elif hub_.store and name.endswith(".safetensors"):
            return self.redirect(f"{hub_.store}/store/{name}", hub_.files[name])
        if name not in hub_.files:
            return self.refuse(404, "EntryNotFound")
        data, wanted = hub_.files[name], self.headers.get("Range", "")
        hub_.log.append((self.command, name, wanted))
        wanted = wanted if hub_.ranges else ""
        begin, _, last = wanted.removeprefix("bytes=").partition("-")
        first, end = int(begin or 0), min(int(last or len(data)) + 1, len(data))
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return None
        if hub_.bad_byte:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if hub_.breaks and len(data) - first > hub_.cut_at:
            hub_.breaks -= 1
            part = data[first : first + hub_.cut_at]
            self.close_connection = True
        else:
            part = data[first:end]
        hub_.sent[name] = hub_.sent.get(name, 0) + len(part)
        self.wfile.write(part)
        return None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(hub, "RESUMED_BYTES", 25_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "")
    running = Hub()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_conversion_reads_is_fetched(server: Hub) -> None:
    folder = hub.fetch(REPO, endpoint=server.url)
    shards = set(INDEX["weight_map"].values())
    assert names(folder) == {"config.json", "tokenizer.model", "model.safetensors.index.json", *shards}
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == BIG
    assert all((folder / name).read_bytes() == FILES[name] for name in names(folder))
    assert {name for method, name, _ in server.log if method == "GET"} == names(folder)


def test_a_second_fetch_moves_no_file(server: Hub) -> None:
    first = hub.fetch(REPO, endpoint=server.url)
    server.log.clear()
    assert hub.fetch(REPO, endpoint=server.url) == first
    assert [entry for entry in server.log if entry[0] == "GET"] == []


def test_a_broken_transfer_is_resumed_within_the_call(server: Hub) -> None:
    server.breaks = 2
    folder = hub.fetch(REPO, endpoint=server.url)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == BIG
    ranges = [r for method, name, r in server.log if method == "GET" and name.endswith("1-of-00002.safetensors")]
    assert ranges[0] == ""
    assert all(r.startswith("bytes=") for r in ranges[1:])
    assert len(ranges) == 3


def test_a_later_call_goes_on_where_the_first_stopped(server: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    server.breaks, server.cut_at = 1, 50_000
    server.files["model-00001-of-00002.safetensors"] = BIG

    class Unplugged(BaseException):
        """As good as kill -9: nothing in between catches it."""

    def unplug(*_: object) -> None:
        raise Unplugged

    huggingface_hub.file_download.time.sleep = unplug  # called between retries; the fixture restores it
    with pytest.raises(Unplugged):
        hub.fetch(REPO, endpoint=server.url)
    huggingface_hub.file_download.time.sleep = lambda _: None
    parts = list((Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*.part"))
    kept = parts[0].stat().st_size
    assert 40_000 < kept <= 50_000
    server.log.clear()
    folder = hub.fetch(REPO, endpoint=server.url)
    assert (folder / name).read_bytes() == BIG
    assert [r for method, n, r in server.log if (method, n) == ("GET", name)] == [f"bytes={kept}-"]
    assert not list((Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*.part"))


@pytest.mark.parametrize("what", ["a symbolic link", "a named pipe", "another user's"])
def test_a_part_that_is_not_ours_is_not_written_to(server: Hub, tmp_path: Path, what: str) -> None:
    server.files = {"model.safetensors": BIG}
    blobs = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    part, precious = blobs / f"{hashlib.sha256(BIG).hexdigest()}.part", tmp_path / "thesis.tex"
    precious.write_text("years")
    if what == "a symbolic link":
        part.symlink_to(precious)
    elif what == "a named pipe":
        os.mkfifo(part)
    elif os.geteuid() == 0:
        part.write_bytes(b"theirs")
        os.chown(part, 4321, 1234)
    else:
        pytest.skip("only root may give files away")
    with pytest.raises(CodeLlamaError, match=f"is {what}, and nothing is written to it"):
        hub.fetch(REPO, endpoint=server.url)
    assert precious.read_text() == "years"
    assert os.path.lexists(part)


def test_a_transfer_that_keeps_breaking_says_to_run_again(server: Hub) -> None:
    server.breaks, server.cut_at = 1000, 0
    server.files = {"config.json": b"{}", "model.safetensors": BIG}
    with pytest.raises(DownloadError, match="broke off") as caught:
        hub.fetch(REPO, endpoint=server.url)
    assert "goes on where it stopped" in caught.value.hint


def test_a_damaged_file_is_refused_and_not_kept(server: Hub) -> None:
    server.bad_byte = True
    server.files = {"model.safetensors": BIG}
    with pytest.raises(DownloadError, match="damaged"):
        hub.fetch(REPO, endpoint=server.url)
    assert not list((Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*.part"))
    server.bad_byte = False
    assert (hub.fetch(REPO, endpoint=server.url) / "model.safetensors").read_bytes() == BIG


def test_the_token_stays_with_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.store = server.url.replace("127.0.0.1", "localhost")
    folder = hub.fetch(REPO, endpoint=server.url)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == BIG
    assert server.tokens_at_store
    assert set(server.tokens_at_store) == {None}


def test_progress_counts_every_byte(server: Hub) -> None:
    seen: list[tuple[str, int, int]] = []
    hub.fetch(REPO, endpoint=server.url, progress=lambda *state: seen.append(state))
    big = [state for state in seen if state[0] == "model-00001-of-00002.safetensors"]
    assert [done for _, done, _ in big] == sorted(done for _, done, _ in big)
    assert big[-1][1:] == (len(BIG), len(BIG))
    assert len(big) > 10


def test_patterns_replace_the_choice(server: Hub) -> None:
    assert names(hub.fetch(REPO, endpoint=server.url, patterns=["config.json"])) == {"config.json"}
    with pytest.raises(DownloadError, match=r"matches \*\.gguf"):
        hub.fetch(REPO, endpoint=server.url, patterns=["*.gguf"])


@pytest.mark.parametrize(
    ("refusal", "repo", "revision", "message", "hint"),
    [
        ((403, "GatedRepo"), REPO, None, "gated", "hf auth login"),
        ((401, ""), REPO, None, "no model someone/Small-Llama, or it is private|refuses access", "HF_TOKEN"),
        ((401, "GatedRepo"), REPO, None, "gated", "accept it"),
        (None, "someone/else", None, "no model someone/else", "spelling"),
        (None, REPO, "v9", "no revision 'v9'", "branches, tags"),
        ((503, ""), REPO, None, "cannot reach", "network"),
        (None, "no-owner", None, "not the id", "owner/name"),
    ],
)
def test_refusals_say_what_to_do(
    server: Hub, refusal: tuple[int, str] | None, repo: str, revision: str | None, message: str, hint: str
) -> None:
    server.refusal = refusal
    with pytest.raises(DownloadError, match=message) as caught:
        hub.fetch(repo, revision=revision, endpoint=server.url)
    assert hint in caught.value.hint


def test_without_network_the_cache_serves_what_is_complete(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch(REPO, endpoint=server.url)
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    assert hub.fetch(REPO, endpoint=nowhere) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DownloadError, match="only in part") as caught:
        hub.fetch(REPO, endpoint=nowhere)
    assert "HF_HUB_OFFLINE" in caught.value.hint
    with pytest.raises(DownloadError, match="not in the cache"):
        hub.fetch("someone/never-seen", endpoint=nowhere)


def real_model(server: Hub, folder: Path) -> Path:
    """The server holds a tiny checkpoint in two shards, their headers longer than what is asked for first."""
    args = tiny_args(n_layers=1)
    write_hf(folder, args, random_weights(args), shards=2)
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder


def test_an_outline_has_the_headers_and_fetches_no_tensor(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = real_model(server, tmp_path / "source")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    monkeypatch.setattr(hub, "HEAD_BYTES", 300)  # less than the headers, so that a second request is needed
    with hub.outline(REPO, endpoint=server.url) as folder:
        assert names(folder) == {path.name for path in source.iterdir()}
        for name in shards:
            assert read_header(folder / name) == read_header(source / name)
            header = 8 + int.from_bytes(server.files[name][:8], "little")
            assert server.sent[name] == header  # not a byte more
            assert (folder / name).stat().st_size == len(server.files[name]) > 2 * header
        assert (folder / "tokenizer.model").read_bytes() == server.files["tokenizer.model"]
    assert not folder.exists()
    monkeypatch.setattr(hub, "HEAD_BYTES", 10**6)  # more than there is
    with hub.outline(REPO, endpoint=server.url) as folder:
        assert read_header(folder / shards[0]) == read_header(source / shards[0])


def test_an_outline_takes_from_the_cache_what_is_there(server: Hub, tmp_path: Path) -> None:
    source = real_model(server, tmp_path / "source")
    hub.fetch(REPO, endpoint=server.url)
    server.sent.clear()
    for endpoint in (server.url, "http://127.0.0.1:9"):
        with hub.outline(REPO, endpoint=endpoint) as folder:
            assert all((folder / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    assert server.sent == {}


def test_an_outline_has_files_without_headers_whole_and_damage_as_it_is(server: Hub) -> None:
    server.files = {"config.json": b"{}", "pytorch_model.bin": BIG}
    with hub.outline(REPO, endpoint=server.url) as folder:
        assert (folder / "pytorch_model.bin").read_bytes() == BIG
    for damaged in (b"", b"1234", b"\xff" * 8 + OTHER):  # shorter than a length; a length beyond everything
        server.files = {"config.json": b"{}", "model.safetensors": damaged}
        with hub.outline(REPO, endpoint=server.url) as folder, pytest.raises(CheckpointError, match="not a whole"):
            read_header(folder / "model.safetensors")


def test_an_outline_of_a_hub_that_sends_no_parts_is_an_error(server: Hub) -> None:
    server.ranges = False
    with pytest.raises(DownloadError, match="sends no part of model-00001"), hub.outline(REPO, endpoint=server.url):
        pass


def test_the_token_for_an_outline_stays_with_the_hub(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_model(server, tmp_path / "source")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.store = server.url.replace("127.0.0.1", "localhost")
    with hub.outline(REPO, endpoint=server.url):
        pass
    assert set(server.tokens_at_store) == {None}


def test_inspect_and_plan_of_a_hub_id_fetch_no_weights(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = real_model(server, tmp_path / "source")
    monkeypatch.setattr(hub, "HEAD_BYTES", 300)
    for function in (hub.fetch, hub.outline):
        monkeypatch.setattr(hub, function.__name__, partial(function, endpoint=server.url))
    remote, local = (
        json.loads(CliRunner().invoke(group, ["inspect", str(which), "--json"]).stdout) for which in (REPO, source)
    )
    assert (remote.pop("model"), remote.pop("path")) == (REPO, None)
    del local["model"], local["path"]
    assert remote == local
    assert f"model       {REPO}\n" in CliRunner().invoke(group, ["inspect", REPO]).stdout
    weights = sum(len(data) for name, data in server.files.items() if name.endswith(".safetensors"))
    assert sum(n for name, n in server.sent.items() if name.endswith(".safetensors")) < weights / 4
    server.sent.clear()
    assert CliRunner().invoke(group, ["plan", REPO]).exit_code == 0
    assert not any(name.endswith(".safetensors") for name in server.sent)


CHOICES = [
    (["model.safetensors", "pytorch_model.bin", "config.json", "x.gguf"], ["config.json", "model.safetensors"]),
    (["pytorch_model.bin", "consolidated.00.pth", "params.json"], ["params.json", "pytorch_model.bin"]),
    (["consolidated.01.pth", "consolidated.00.pth", "b.pth"], ["consolidated.00.pth", "consolidated.01.pth"]),
    (["weights.00.safetensors", "config.json"], ["config.json", "weights.00.safetensors"]),
    (["model.safetensors", "model-00001-of-00002.safetensors"], ["model.safetensors"]),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],) * 2,
    # An index whose shards are not there, beside the whole file.
    (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
    # What lies beside the weights and is not them.
    (
        ["adapter_model.safetensors", "optimizer.safetensors", "model.fp16.safetensors", "model.safetensors"],
        ["model.safetensors"],
    ),
    (["consolidated.safetensors", "adapters.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
    (["consolidated.safetensors", "consolidated.00.pth", "params.json"], ["params.json", "consolidated.00.pth"]),
]


@pytest.mark.parametrize(("present", "chosen"), CHOICES)
def test_one_form_of_the_weights_is_chosen(present: list[str], chosen: list[str]) -> None:
    assert hub.choose(present, None, read=lambda _: json.dumps(INDEX)) == chosen


def test_incomplete_repositories_are_refused() -> None:
    with pytest.raises(DownloadError, match="no weights") as caught:
        hub.choose(["config.json", "model.gguf"], None, read=lambda _: "")
    assert "safetensors" in caught.value.hint
    with pytest.raises(DownloadError, match="1 of 3 weight files"):
        hub.choose(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None, read=lambda _: "")
    present = ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    with pytest.raises(DownloadError, match=r"first model-00002-of-00002"):
        hub.choose(present, None, read=lambda _: json.dumps(INDEX))
    for damaged in ("{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": []}}'):
        with pytest.raises(DownloadError, match="no index of shards"):
            hub.choose(present, None, read=lambda _, text=damaged: text)  # type: ignore[misc]


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub.looks_like_hub_id("codellama/CodeLlama-7b-hf")
    for text in ("models/mine", "./a/b", "/a/b", "a", "a/b/c", "../b", "~/b", "a/..", ""):
        assert not hub.looks_like_hub_id(text), text


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("owner/name/", ("owner/name", None)),
        ("https://hub.test/owner/name", ("owner/name", None)),
        ("https://hub.test/owner/name/", ("owner/name", None)),
        ("hub.test/owner/name", ("owner/name", None)),
        ("https://hub.test/owner/name/tree/main", ("owner/name", "main")),
        ("https://hub.test/owner/name/blob/v1.0/config.json?download=true", ("owner/name", "v1.0")),
        ("https://hub.test/owner/name/tree/refs%2Fpr%2F3", ("owner/name", "refs/pr/3")),
        ("https://elsewhere.test/owner/name", None),
        ("https://hub.test/datasets/owner/name", None),
        ("https://hub.test/owner", None),
        ("owner/name//", None),
        ("owner/../name", None),
    ],
)
def test_addresses_of_the_hub_are_ids(
    text: str, meant: tuple[str, str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.test")
    assert hub.looks_like_hub_id(text) == (meant is not None)
    assert hub._parsed(text) == meant


def test_a_model_is_fetched_by_its_address(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hosts", lambda: {"hub.test"})
    folder = hub.fetch(REPO, endpoint=server.url)
    assert hub.fetch(f"https://hub.test/{REPO}/tree/main", endpoint=server.url) == folder
    assert hub.fetch(f"{REPO}/", endpoint=server.url) == folder


def test_importing_hub_does_not_import_the_library() -> None:
    code = "import sys, mlx_codellama.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
