"""Kernels for the GPU: their sources, how they are built and launched, and the check before one is trusted.

Sources lie one folder up: `metal/<op>.metal`, from which `dialect` makes CUDA's, and what only CUDA needs in `cuda/`.
Nothing here builds a kernel when it is imported.
"""
