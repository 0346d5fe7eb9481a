"""Quantisation: plans, their cost, their application to a stream of tensors. Installed as mlx_codellama.quant."""

if __name__ == "quant":  # the folder's own name, seen from a checkout's root
    raise ImportError("import mlx_codellama.quant, not quant")
