"""Which checkpoint a command means: a folder, a hub id, or the bundled demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_codellama.errors import CheckpointError

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs


def demo_folder() -> Path:
    return Path(__file__).parent.parent / "demo"


def folder_of(model: str | None, patterns: tuple[str, ...] = ()) -> Path:
    """The folder (or file) of a model; a hub id is fetched first. Raises CheckpointError, DownloadError.

    patterns  the files needed from a hub; none means all that a model has
    """
    if model is None:
        return demo_folder()
    path = Path(model).expanduser()
    if path.exists():
        return path
    from mlx_codellama import hub

    if hub.looks_like_hub_id(model):
        return hub.fetch(model, patterns=patterns) if patterns else hub.fetch(model)
    raise CheckpointError(
        f"{model} does not exist", hint="name a model folder, or a hub id such as codellama/CodeLlama-7b-hf"
    )


def config_of(model: str | None) -> tuple[str, ModelArgs]:
    """(name, dimensions) from config.json alone."""
    from mlx_codellama.config import load_config

    folder = folder_of(model, ("config.json",))
    return name_of(model), load_config(folder)


def name_of(model: str | None) -> str:
    return "demo" if model is None else model
