"""CPU kernels for MLX on Linux. `ops` holds the functions; importing this package loads nothing."""

from __future__ import annotations

__version__ = "0.1.0"
