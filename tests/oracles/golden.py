"""tests/golden/logits.json: what transformers says of two seeded tiny models, a hold on runs without torch.

Rewrite with `python tests/oracles/golden.py` (needs the `peers` extra); test_meta_reference.py recomputes and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracles.meta_reference import TINY, random_weights
from oracles.transformers_model import transformers_greedy, transformers_logits, transformers_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "logits.json"
SEEDS = {"mha": 11, "gqa": 12}
LENGTH = 9
N_GREEDY = 24


def prompt(kind: str) -> list[int]:
    """Token ids of the golden prompt: begin-of-text, then LENGTH - 1 seeded ids."""
    rng = np.random.RandomState(SEEDS[kind] + 100)
    return [1, *(int(i) for i in rng.randint(3, TINY[kind].vocab_size, LENGTH - 1))]


def compute(kind: str) -> dict[str, Any]:
    """Logits [L][V] of transformers in float32 and its greedy continuation."""
    import torch
    import transformers

    geometry = TINY[kind]
    model = transformers_model(random_weights(geometry, seed=SEEDS[kind]), geometry)
    ids = prompt(kind)
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": SEEDS[kind],
        "ids": ids,
        "greedy": transformers_greedy(model, ids, N_GREEDY),
        "logits": [[float(f"{x:.8g}") for x in row] for row in transformers_logits(model, [ids])[0]],
    }


def load() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return data


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({kind: compute(kind) for kind in SEEDS}) + "\n", encoding="utf-8")
