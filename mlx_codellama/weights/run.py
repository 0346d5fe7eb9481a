"""run.json: how a checkpoint folder was made and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_codellama import inputs
from mlx_codellama.errors import CheckpointError
from mlx_codellama.staging import write_file

TOOL = "mlx-codellama"  # value in run.json that marks a folder as written by this program


def run_text(data: Mapping[str, Any]) -> str:
    """The text of the file. JSON has no NaN or infinity, so they become null."""
    return json.dumps(_finite(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_run(folder: str | Path, name: str = "run.json") -> dict[str, Any]:
    """The contents of the folder's run.json; {} if there is none. Raises CheckpointError if it is not an object."""
    path = Path(folder) / name
    try:
        data = inputs.read_json(path)
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable: {getattr(error, 'strerror', None) or error}") from None
    return data


def update_run(folder: str | Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the folder's run.json, replacing those of the same name. The file is replaced atomically.

    A folder without run.json (a checkpoint from elsewhere) gets one. Raises CheckpointError if the existing file is not
    an object, OutputError if it cannot be written; the old file then stays.
    """
    text = run_text({**read_run(folder), **entries})
    write_file(Path(folder) / "run.json", text.encode())
