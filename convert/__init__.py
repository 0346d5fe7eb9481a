"""Released weights, in any published layout, as one stream of named tensors. Installed as mlx_codellama.convert.

`layouts` detects the layout. `meta` reads Meta's shards, `hf` the files of Hugging Face and MLX, `npz` those of early
MLX examples. `stored_zip`, `torch_zip` and `torch_pickle` read torch files without torch. `names` has the names that
other projects give to tensors.
"""

if __name__ == "convert":  # imported by the folder's name, from the root of a checkout
    raise ImportError("import mlx_codellama.convert, not convert")

from mlx_codellama.convert.layouts import Layout, detect, open

__all__ = ["Layout", "detect", "open"]
