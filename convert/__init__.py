"""Released weights, in any published layout, as one stream of named tensors. Installed as mlx_codellama.convert."""

if __name__ == "convert":  # the folder's own name, seen from a checkout's root
    raise ImportError("import mlx_codellama.convert, not convert")
