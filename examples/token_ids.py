"""Prompts as token ids, without a model: `python examples/token_ids.py [FOLDER]` (a folder with tokenizer.model)."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx_codellama
from mlx_codellama.prompts import infill_ids
from mlx_codellama.tokenizer import Tokenizer

DEMO = Path(mlx_codellama.__file__).parent / "demo"


def main(folder: str | Path = DEMO) -> None:
    tok = Tokenizer.load(folder)
    for order in ("psm", "spm"):
        ids = infill_ids(tok, "def f(x):\n    return ", "\n", order=order)
        print(order, ids, [tok.piece(i) for i in ids])


if __name__ == "__main__":
    main(*sys.argv[1:2])
