"""Released weights, in any published layout, as one stream of named tensors. Installed as mlx_codellama.convert.

`names` and `meta` read Meta's shards, `hf` Hugging Face's files; `torch_zip` and `torch_pickle` read torch's files
without torch; `layouts` tells them apart.
"""

if __name__ == "convert":  # the folder's own name, seen from a checkout's root
    raise ImportError("import mlx_codellama.convert, not convert")

from mlx_codellama.convert.layouts import Layout, detect, open

__all__ = ["Layout", "detect", "open"]
