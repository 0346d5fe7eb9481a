"""Kernels for the GPU: their sources, how they are built and launched, and the check before one is trusted.

`metal/<op>.metal` and `cuda/<op>.cu` lie one folder up. Nothing here builds a kernel when it is imported.
"""
