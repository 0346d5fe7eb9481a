"""What attention remembers: keys and values of the tokens read so far, one cache per layer.

`encodings` says how keys and values become arrays and how attention reads them; `layer` is the cache that keeps every
token; `window` the one that keeps the first and the last. All have the same protocol:

  append, attend   add tokens, and attend to what is held        trim     forget the last tokens
  reserve          announce how much is to come                  share    a second cache over the same bytes
  nbytes, arrays   what is allocated                             state, restore   what a file needs
"""

from __future__ import annotations

from mlx_codellama.cache.encodings import Encoding, Floats, Rows
from mlx_codellama.cache.layer import KVCache
from mlx_codellama.cache.window import WindowCache
from mlx_codellama.config import ModelArgs
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.storage import STEP, KVStorage

__all__ = ["STEP", "Encoding", "Floats", "KVCache", "Rows", "WindowCache", "make_cache"]


def make_cache(args: ModelArgs, storage: KVStorage | None = None) -> list[KVCache]:
    """One empty cache per layer. Raises ConfigError where the model's heads cannot be stored so."""
    storage = storage or KVStorage()
    encoding: Encoding = Floats(half=storage.k_bits == 16)
    if storage.packed and storage.bits is not None:
        encoding = Rows(RowFormat(args.head_dim, *storage.bits))
    if storage.window is None:
        return [KVCache(encoding) for _ in range(args.num_hidden_layers)]
    return [WindowCache(encoding, storage.window, storage.sinks) for _ in range(args.num_hidden_layers)]
