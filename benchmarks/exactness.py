"""What rounding activations to 15 bits costs: predictions of the bundled demo model against exact=True.

    python benchmarks/exactness.py [--tokens 8192]

Reads the sources of this package, teacher-forced, in windows of the demo's training length.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from harness import ROOT, Result

from mlx_codellama import load
from mlx_codellama.kernels import dispatch
from mlx_codellama.quant.report import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    exact, rounded = load(exact=True), load()
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(Path(ROOT / "mlx_codellama").rglob("*.py")))
    ids = exact.tokenizer.encode(text)[: args.tokens]
    window = min(512, exact.args.max_position_embeddings - 1)
    report = compare(exact.logits, rounded.logits, ids, window=window, bos=exact.tokenizer.bos_id)
    assert "native int8" in dispatch.paths()["quant_matmul"]  # and `native` of the exact model
    result = Result("exactness", "Activations of 15 bits against float32: predictions of the demo model")
    result.add("KL divergence, mean", "nats", [report.mean_kl], note="target 1e-4")
    result.add("KL divergence, largest", "nats", [report.max_kl])
    result.add("same likeliest token", "%", [100 * report.top1_agreement], note="target 99.9")
    result.add("tokens", "", [float(np.float64(report.n_tokens))])
    result.save()


if __name__ == "__main__":
    main()
