"""Quantisation: recipes, predicted sizes, quantised streams, measured errors. Installed as mlx_codellama.quant."""

if __name__ == "quant":  # imported by the folder's name, from the root of a checkout
    raise ImportError("import mlx_codellama.quant, not quant")

from mlx_codellama.config import RECIPES
from mlx_codellama.quant.pipeline import apply
from mlx_codellama.quant.plan import SizeReport, TensorSize, describe, fit, predict
from mlx_codellama.quant.recipes import recipe, uniform
from mlx_codellama.quant.report import Comparison, TensorError, compare

__all__ = [
    "RECIPES",
    "Comparison",
    "SizeReport",
    "TensorError",
    "TensorSize",
    "apply",
    "compare",
    "describe",
    "fit",
    "predict",
    "recipe",
    "uniform",
]
