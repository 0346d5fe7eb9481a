"""Which checkpoint a command means: a folder, a hub id, or the bundled demo."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlx_codellama.cli import output
from mlx_codellama.config import DEMO
from mlx_codellama.errors import CheckpointError, MissingThetaError

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs


def folder_of(model: str | None, patterns: tuple[str, ...] = ()) -> Path:
    """The folder (or file) of a model; a hub id is fetched first. Raises CheckpointError, DownloadError.

    patterns  the files needed from a hub; none means all that a model has
    """
    if model is None:
        return DEMO
    path = Path(model).expanduser()
    if path.exists():
        return path
    from mlx_codellama import hub

    if hub.looks_like_hub_id(model):
        with _fetching() as progress:
            return hub.fetch(model, patterns=patterns or None, progress=progress)
    raise CheckpointError(
        f"{model} does not exist", hint="name a model folder, or a hub id such as codellama/CodeLlama-7b-hf"
    )


@contextmanager
def outline_of(model: str | None) -> Iterator[Path]:
    """The folder of a model of which only descriptions are read; of a hub id no more than those are fetched."""
    from mlx_codellama import hub

    if model is None or not hub.looks_like_hub_id(model):
        yield folder_of(model)
        return
    with _fetching() as progress, hub.outline(model, progress=progress) as folder:
        yield folder


class _Fetched(NamedTuple):
    """How far a download is, as `bytes_progress` shows it."""

    name: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float


@contextmanager
def _fetching() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback that shows how far a download is."""
    from mlx_codellama.cli.progress import bytes_progress

    begun: dict[str, tuple[float, int]] = {}  # file → when, and with how many bytes, this process took it up
    with bytes_progress("fetch") as show:

        def progress(name: str, done: int, total: int) -> None:
            at, had = begun.setdefault(name, (time.monotonic(), done))
            show(_Fetched(name, done - had, total - had, time.monotonic() - at))

        yield progress


def config_of(model: str | None) -> tuple[str, ModelArgs]:
    """(name, dimensions) from config.json alone; from params.json and headers of weights if there is none of ours.

    Memory does not depend on rope_theta: if the files do not state it, a note tells what was assumed.

    model may also be meant as the name of a released model, so a hint lists those. Raises CheckpointError, ConfigError.
    """
    from mlx_codellama import hub
    from mlx_codellama.config import GEOMETRIES, UNSTATED_THETA, VARIANTS

    if model is not None and not Path(model).expanduser().exists() and not hub.looks_like_hub_id(model):
        names = list(dict.fromkeys([*VARIANTS, *GEOMETRIES]))
        near = difflib.get_close_matches(model.lower(), names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise CheckpointError(
            f"{model} is neither a folder nor a released model",
            hint=f"{guess}Name a folder, a hub id, or one of {', '.join(names)}",
        )
    folder, name = folder_of(model, ("config.json",)), name_of(model)
    try:
        return name, _args_of(folder, None)
    except MissingThetaError:
        args = _args_of(folder, UNSTATED_THETA)
    note = f"{name} does not state its rope_theta; {UNSTATED_THETA:g} is assumed, as in Meta's code. "
    note += "Memory does not depend on it"
    context = args.max_position_embeddings
    if _args_of(folder, 10 * UNSTATED_THETA).max_position_embeddings != context:
        note += f", but the {context:,} tokens of context follow from it; plan for others with --context"
    output.note(note)
    return name, args


def _args_of(folder: Path, theta: float | None) -> ModelArgs:
    from mlx_codellama.config import load_config

    if folder.is_dir() and ((folder / "weights.npz").is_file() or not (folder / "config.json").is_file()):
        from mlx_codellama import convert  # the dimensions are in params.json and in the headers of the weights

        return convert.open(folder, rope_theta=theta).args
    return load_config(folder, rope_theta=theta)


def name_of(model: str | None) -> str:
    return "demo" if model is None else model
