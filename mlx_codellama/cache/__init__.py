"""What attention remembers: the keys and values of the tokens that a sequence has read.

sequence   `Sequence`: ids, and the keys and values of all layers, in shared segments and one growing tail
layer      `KVCache`: the tail of one layer, which keeps every token
window     `WindowCache`: a tail that keeps the first tokens and the last ones
encodings  how keys and values become arrays, and how attention reads those
spans      `Spans`: the tokens of several sequences in one forward pass
"""

from __future__ import annotations

from mlx_codellama.cache.encodings import Encoding, Floats, Rows
from mlx_codellama.cache.layer import KVCache
from mlx_codellama.cache.sequence import Sequence, SharedSegment, make_sequence
from mlx_codellama.cache.spans import Span, Spans
from mlx_codellama.cache.window import WindowCache
from mlx_codellama.storage import STEP

__all__ = [
    "STEP",
    "Encoding",
    "Floats",
    "KVCache",
    "Rows",
    "Sequence",
    "SharedSegment",
    "Span",
    "Spans",
    "WindowCache",
    "make_sequence",
]
