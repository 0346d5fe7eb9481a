"""run.json: what a checkpoint folder says about how it was made and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_codellama import inputs
from mlx_codellama.errors import CheckpointError
from mlx_codellama.staging import write_file

TOOL = "mlx-codellama"  # what run.json says of a folder that this program wrote


def run_text(data: Mapping[str, Any]) -> str:
    """The file's text: JSON, which has no NaN and no infinity, so these become null."""
    return json.dumps(_finite(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_run(folder: str | Path, name: str = "run.json") -> dict[str, Any]:
    """What the folder's run.json says; nothing where there is none. Raises CheckpointError where it is no object."""
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
    """Put entries into the folder's run.json, replacing those of the same name; the file is replaced atomically.

    A folder without run.json (a checkpoint from elsewhere) gets one. Raises CheckpointError where what is there is not
    an object, OutputError where it cannot be written; the old file is kept then.
    """
    text = run_text({**read_run(folder), **entries})
    write_file(Path(folder) / "run.json", text.encode())
