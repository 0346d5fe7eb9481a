"""The infilling transform of the Code Llama paper (arXiv:2308.12950 §2.3; Bavarian et al., arXiv:2207.14255).

A document is cut at two random characters into prefix, middle and suffix. Half of the transformed documents have
the order prefix-suffix-middle (PSM), half suffix-prefix-middle (SPM), with exactly the ids that inference uses:

    PSM   bos PRE prefix SUF suffix MID middle EOT
    SPM   bos PRE SUF suffix MID prefix·middle EOT

The suffix, and PSM's middle, carry no implicit leading space. SPM joins prefix and middle before tokenising;
PSM tokenises them separately.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mlx_codellama.errors import NotSupported
from mlx_codellama.tokenizer import Tokenizer

RATE = 0.9  # share of documents that are transformed


def split(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """prefix, middle, suffix cut at two positions drawn uniformly from 0 … len."""
    first, second = sorted(int(p) for p in rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def training_ids(
    tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, *, order: Literal["psm", "spm"]
) -> list[int]:
    """Ids of one transformed document, from bos to EOT and eos."""
    ids = tokenizer.infill
    if ids is None:
        raise NotSupported("this tokenizer has no infilling pieces", hint="train one with infill=True")
    end = [ids.eot, tokenizer.eos_id]
    after = [ids.suf, *tokenizer.encode_infilling(suffix), ids.mid]
    if order == "spm":
        return [tokenizer.bos_id, ids.pre, *after, *tokenizer.encode(prefix + middle), *end]
    head = [tokenizer.bos_id, ids.pre, *tokenizer.encode(prefix)]
    return [*head, *after, *tokenizer.encode_infilling(middle), *end]


def document_ids(
    tokenizer: Tokenizer, text: str, rng: np.random.Generator, *, ends: bool, rate: float = RATE
) -> list[int]:
    """Ids of one document: transformed with probability `rate`, else left to right (eos only if the file `ends`)."""
    if rng.random() >= rate:
        return tokenizer.encode(text, bos=True, eos=ends)
    order: Literal["psm", "spm"] = "psm" if rng.random() < 0.5 else "spm"
    return training_ids(tokenizer, *split(text, rng), order=order)
