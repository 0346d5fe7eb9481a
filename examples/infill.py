"""Fill a hole from Python, first at once, then as a stream: `python examples/infill.py [MODEL]`."""

from __future__ import annotations

import sys

from mlx_codellama import load

PREFIX = "def read_lines(path):\n    with open(path"
SUFFIX = ") as file:\n        return file.read().splitlines()\n"


def main(path: str | None = None) -> None:
    model = load(path)
    result = model.infill(PREFIX, SUFFIX, max_tokens=16)
    print(PREFIX + result.text + SUFFIX)
    print(f"{result.finish_reason} after {result.stats.generated_tokens} tokens")
    for piece in model.stream_infill(PREFIX, SUFFIX, order="spm", max_tokens=16):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:2])
