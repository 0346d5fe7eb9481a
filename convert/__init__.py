"""Released weights, in any published layout, as one stream of named tensors. Installed as mlx_codellama.convert.

`layouts` tells them apart. `meta` reads Meta's shards, `hf` Hugging Face's files and MLX's, `npz` those of early MLX
examples; `stored_zip`, `torch_zip` and `torch_pickle` read torch's files without torch; `names` knows others' names.
"""

if __name__ == "convert":  # the folder's own name, seen from a checkout's root
    raise ImportError("import mlx_codellama.convert, not convert")

from mlx_codellama.convert.layouts import Layout, detect, open

__all__ = ["Layout", "detect", "open"]
