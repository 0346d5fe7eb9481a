"""Fetch a model from the Hugging Face hub: only the files that a conversion reads, and no byte twice.

We use huggingface_hub's cache, tokens and mirrors, so other programs share what we fetch. Its recent versions delete an
unfinished file when the process ends, which is expensive for a shard of 13 GB. So we write large files to
`blobs/<etag>.part`, beside the finished blobs of huggingface_hub. This process or a later one resumes them with a range
request, checks their sha256 and renames them; then `hf_hub_download` finds them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit

from mlx_codellama import inputs, shards
from mlx_codellama.errors import CheckpointError, DownloadError
from mlx_codellama.shards import BIN, SAFETENSORS, candidates
from mlx_codellama.staging import open_own

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# We take only the first form that exists of safetensors, .bin and these, because releases contain the same weights in
# two or three forms.
OTHER_WEIGHTS = ("consolidated.*.pth", "weights.npz")
RESUMED_BYTES = 8 * 2**20  # smaller files are fetched again from the start
HEAD_BYTES = 128 * 2**10  # first request for a header; enough for most
MOST_HEADER_BYTES = 8 * 2**20  # a longer one is damaged; the reader reports it

_HUB_URL = re.compile(
    r"(?:https?://)?(\w[\w-]*(?:\.[\w-]+)+(?::\d+)?)/([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/([^/]+)(?:/.*)?)?"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# name of the file, its bytes so far, its size in bytes
Progress = Callable[[str, int, int], None]


def looks_like_hub_id(text: str) -> bool:
    """Whether text is `owner/name` or the address of a model page, and not an existing path."""
    return _parsed(text) is not None and not Path(text).exists()


def _parsed(text: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) of a hub id or the address of a hub page; None for anything else."""
    text = text.partition("?")[0].partition("#")[0].rstrip("/") if "://" in text else text.removesuffix("/")
    if _HUB_ID.fullmatch(text) and ".." not in text:
        return text, None
    match = _HUB_URL.fullmatch(text)
    if match is None or not _HUB_ID.fullmatch(match[2]) or ".." in match[2]:
        return None
    if match[1].lower() not in _hosts():
        return None
    return match[2], unquote(match[3]) if match[3] else None


def _hosts() -> set[str]:
    """Host names of the hub: the configured one and, if that is a mirror, the hub itself."""
    try:
        constants = _library().constants
    except DownloadError:
        return set()
    addresses = (constants.ENDPOINT, getattr(constants, "_HF_DEFAULT_ENDPOINT", ""))
    return {urlsplit(address).netloc.lower() for address in addresses if address}


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """Fetch a model into huggingface_hub's cache and return the folder of the snapshot.

    repo_id   `owner/name`, or the address of a model's page, which may name a revision
    revision  branch, tag or commit; default: main
    endpoint  another hub, such as a mirror; default: huggingface_hub's own setting
    patterns  globs of files to fetch, instead of the default (config, tokenizer, and weights as safetensors, else .bin,
              else .pth)
    A broken transfer is resumed a few times within the call, and by the next call. Without network, a complete snapshot
    in the cache is used. Raises DownloadError.
    """
    hub = _library()
    folder: Path | None = None
    repo_id, revision = _identified(repo_id, revision)
    with _explained(hub, repo_id, revision):
        listed = _listed(hub, repo_id, revision, endpoint, patterns)
        if isinstance(listed, Path):
            return listed
        names, commit = listed

        def get(name: str) -> Path:
            return _get(hub, repo_id, name, commit, endpoint, progress)

        for name in choose(names, patterns, read=lambda name: _text(get(name))):
            path = get(name)
            folder = folder or path.parents[name.count("/")]
    assert folder is not None  # choose returns at least one file
    return folder


@contextmanager
def outline(
    repo_id: str, *, revision: str | None = None, endpoint: str | None = None, progress: Progress | None = None
) -> Iterator[Path]:
    """A temporary folder like a model's snapshot, for callers that do not read its weights.

    It fetches only the headers of safetensors that are not in the cache, by range requests, and adds holes of the right
    length: kilobytes for a model of any size. Other weights have no header and are fetched completely, as by `fetch`.
    Raises DownloadError.
    """
    hub = _library()
    repo_id, revision = _identified(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="mlx-codellama-") as made:
        folder = Path(made)
        with _explained(hub, repo_id, revision):
            listed = _listed(hub, repo_id, revision, endpoint, None)
            if isinstance(listed, Path):
                folder = listed
            else:
                names, commit = listed

                def get(name: str) -> Path:
                    return _get(hub, repo_id, name, commit, endpoint, progress)

                for name in choose(names, None, read=lambda name: _text(get(name))):
                    cached = isinstance(hub.try_to_load_from_cache(repo_id, name, revision=commit), str)
                    if cached or not name.endswith(".safetensors"):
                        (folder / name).symlink_to(get(name))
                    else:
                        _head(hub, hub.hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint), folder / name)
        yield folder


def _head(hub: ModuleType, url: str, path: Path) -> None:
    """Write the header of the safetensors file at url, and a hole for its tensors."""
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}

    def read(first: int, end: int) -> tuple[bytes, int]:
        wanted = {**headers, "Range": f"bytes={first}-{end - 1}"}
        response = hub.utils.get_session().get(url, headers=wanted, timeout=hub.constants.DEFAULT_REQUEST_TIMEOUT)
        hub.utils.hf_raise_for_status(response)
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise DownloadError(f"the hub sends no part of {path.name}", hint="fetch the model whole: convert it")
        return response.content, int(size)

    data, size = read(0, HEAD_BYTES)
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if len(data) < 8 + length <= min(size, MOST_HEADER_BYTES):
        data += read(len(data), 8 + length)[0]
    with path.open("wb") as file:
        file.write(data[: 8 + length])
        file.truncate(size)


def _identified(text: str, revision: str | None) -> tuple[str, str | None]:
    """(owner/name, revision); an explicit revision wins over that of an address."""
    found = _parsed(text)
    if found is None:
        raise DownloadError(f"{text!r} is not the id of a model on the hub", hint="ids look like owner/name")
    return found[0], revision or found[1]


def _listed(
    hub: ModuleType, repo_id: str, revision: str | None, endpoint: str | None, patterns: Sequence[str] | None
) -> tuple[list[str], str] | Path:
    """The files of a repository and its commit; if the hub cannot be reached, those of the cached snapshot."""
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(repo_id, revision=revision)
    except (hub.errors.HTTPError, hub.errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, hub.errors.HfHubHTTPError) and _status(error) < 500:
            raise
        return _cached(hub, repo_id, revision, patterns, error)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" in names:  # also records the branch's current commit, for later use without network
        hub.hf_hub_download(repo_id, "config.json", revision=revision, endpoint=endpoint)
    return names, info.sha


def choose(names: Iterable[str], patterns: Sequence[str] | None, *, read: Callable[[str], str]) -> list[str]:
    """The files to fetch, small ones first. `read` returns the text of an index file that lists the shards.

    Raises DownloadError if there are no weights or an index names a missing file.
    """
    names = set(names)
    if patterns is not None:
        chosen = sorted(name for name in names if any(fnmatchcase(name, p) for p in patterns))
        if not chosen:
            raise DownloadError(f"no file of the repository matches {', '.join(patterns)}")
        return chosen
    small = [name for name in SMALL_FILES if name in names]
    for form in (SAFETENSORS, BIN):
        if candidates(names, form):
            try:
                weights = shards.choose(names, form, read=read, where="the repository")
            except CheckpointError as error:
                raise DownloadError(str(error), hint="the repository is incomplete; take another copy") from None
            return [*small, *([form.listing] if weights.listed is not None else []), *weights.names]
    for pattern in OTHER_WEIGHTS:
        if found := sorted(name for name in names if fnmatchcase(name, pattern)):
            return [*small, *found]
    raise DownloadError(
        "the repository holds no weights this program reads",
        hint="it reads model*.safetensors, pytorch_model*.bin and consolidated.*.pth at the top of a repository",
    )


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise DownloadError(
            "huggingface_hub is not installed", hint="pip install huggingface-hub, or pass a local folder"
        ) from None
    return huggingface_hub


def _get(
    hub: ModuleType, repo_id: str, name: str, commit: str, endpoint: str | None, progress: Progress | None
) -> Path:
    """Fetch one file of one commit. Returns its path in the snapshot."""
    cached = hub.try_to_load_from_cache(repo_id, name, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    url = hub.hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint)
    meta = hub.get_hf_file_metadata(url)
    if meta.etag and meta.size and meta.size >= RESUMED_BYTES:
        storage = Path(hub.constants.HF_HUB_CACHE) / hub.file_download.repo_folder_name(
            repo_id=repo_id, repo_type="model"
        )
        _resume(hub, url, meta, storage / "blobs" / meta.etag, name, progress)
    with _quiet(hub):
        path = Path(hub.hf_hub_download(repo_id, name, revision=commit, endpoint=endpoint))
    if progress:
        progress(name, path.stat().st_size, path.stat().st_size)
    return path


def _resume(hub: ModuleType, url: str, meta: Any, blob: Path, name: str, progress: Progress | None) -> None:
    """Write the blob of one large file, resuming a part that an earlier call left."""
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(blob.name + ".part")
    location = urljoin(url, meta.location)
    headers = hub.utils.build_hf_headers()
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for the host that stores its files
    headers["Accept-Encoding"] = "identity"
    with hub.utils.WeakFileLock(part.with_suffix(".lock")):
        if blob.exists():
            return
        with os.fdopen(open_own(part, os.O_RDWR | os.O_APPEND), "ab") as file:
            if file.tell() > meta.size:
                file.truncate(0)
            target = _Watched(file, lambda done: progress(name, done, meta.size) if progress else None)
            with _quiet(hub):
                hub.file_download.http_get(
                    location, target, resume_size=file.tell(), headers=headers, expected_size=meta.size
                )
            file.flush()
            os.fsync(file.fileno())
        if re.fullmatch("[0-9a-f]{64}", meta.etag) and _sha256(part) != meta.etag:
            part.unlink()
            raise DownloadError(
                f"{name} arrived damaged: its sha256 is not {meta.etag}", hint="run the command again; it starts anew"
            )
        part.replace(blob)


class _Watched:
    """The part file that http_get writes to; reports progress."""

    def __init__(self, file: IO[bytes], tell: Callable[[int], None]) -> None:
        self._file, self._tell = file, tell

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._tell(self._file.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in inputs.pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _text(path: Path) -> str:
    """The text of an index file in the cache. Raises DownloadError."""
    try:
        return inputs.read_bytes(path, inputs.JSON_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DownloadError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _quiet(hub: ModuleType) -> Iterator[None]:
    """Turn off huggingface_hub's own progress bars."""
    if hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


def _cached(
    hub: ModuleType, repo_id: str, revision: str | None, patterns: Sequence[str] | None, error: BaseException
) -> Path:
    """The complete snapshot in the cache. Raises DownloadError if it is missing or incomplete."""
    hint = "check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies), or pass a local folder"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    try:
        folder = Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (hub.errors.LocalEntryNotFoundError, OSError):
        raise DownloadError(
            f"cannot reach the hub for {repo_id}, and it is not in the cache: {reason}", hint=hint
        ) from error
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        choose(names, patterns, read=lambda name: _text(folder / name))
    except DownloadError as incomplete:
        raise DownloadError(
            f"cannot reach the hub for {repo_id} ({reason}), and the cache holds it only in part: {incomplete}",
            hint=hint,
        ) from error
    return folder


@contextmanager
def _explained(hub: ModuleType, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub and the system into DownloadError with a hint."""
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo_id} is gated: its owner asks you to accept a licence first",
            hint=f"accept it on the page of {repo_id}, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{repo_id} has no revision {revision!r}", hint="revisions are branches, tags and commits; main is usual"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub has no model {repo_id}, or it is private",
            hint="check the spelling; for a private model set HF_TOKEN or run `hf auth login`",
        ) from error
    except errors.EntryNotFoundError as error:
        raise DownloadError(
            f"a file of {repo_id} is not there any more: {error}", hint="run the command again"
        ) from error
    except errors.HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            hint = "set HF_TOKEN to a valid token, or run `hf auth login`"
            raise DownloadError(f"the hub refuses access to {repo_id} (HTTP {status})", hint=hint) from error
        raise DownloadError(f"the hub answered with HTTP {status} for {repo_id}", hint="try again later") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(
                "the disk is full", hint="free some space, or point HF_HOME at another disk; the download goes on there"
            ) from error
        raise _broken(repo_id, error) from error
    except errors.HTTPError as error:
        raise _broken(repo_id, error) from error


def _broken(repo_id: str, error: BaseException) -> DownloadError:
    return DownloadError(
        f"the download of {repo_id} broke off: {error or type(error).__name__}",
        hint="run the command again: it goes on where it stopped",
    )


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
