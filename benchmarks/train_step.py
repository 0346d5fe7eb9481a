"""How long a training step of the demo model takes, against stock MLX with nothing but the BLAS.

    python benchmarks/train_step.py [--rows 8] [--length 512] [--repeat 4]

Forward, backward, clipping and AdamW on random tokens, float32. The peer is this package with MLX_CODELLAMA_NATIVE=0:
MLX's own operations for everything, above the same BLAS. The two run in processes of their own, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from harness import ROOT, Result


def child(rows: int, length: int) -> None:
    """Answer each line on stdin with the seconds of one step."""
    import numpy as np

    from mlx_codellama.config import load_config
    from mlx_codellama.train.packing import Batch
    from mlx_codellama.train.trainer import TrainArgs, Trainer, initialise

    args = replace(load_config(Path(ROOT / "mlx_codellama" / "demo")), quantization=None)
    ids = np.random.default_rng(0).integers(3, args.vocab_size, (rows, length + 1)).astype(np.int32)
    batch = Batch(ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1), (length,) * rows)
    trainer = Trainer(initialise(args, seed=0), TrainArgs(steps=100), lambda step: batch)
    trainer.train_step()
    sys.stdout.write(json.dumps(sum(int(np.prod(s)) for s in args.tensor_shapes().values())) + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        begin = time.perf_counter()
        trainer.train_step()
        sys.stdout.write(json.dumps(time.perf_counter() - begin) + "\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.rows, args.length)
        return
    command = [sys.executable, __file__, "--child", "--rows", str(args.rows), "--length", str(args.length)]
    runs = {}
    for name, native in (("mlx-codellama", "1"), ("MLX and the BLAS", "0")):
        env = {**os.environ, "MLX_CODELLAMA_NATIVE": native}
        runs[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    times: dict[str, list[float]] = {name: [] for name in runs}
    parameters = {name: int(run.stdout.readline()) for name, run in runs.items()}
    for _ in range(args.repeat):
        for name, run in runs.items():
            run.stdin.write("\n")
            run.stdin.flush()
            times[name].append(float(run.stdout.readline()))
    for run in runs.values():
        run.stdin.close()
        run.wait()
    millions = parameters["mlx-codellama"] / 1e6
    result = Result(
        "train_step",
        f"A training step of the demo model ({millions:.1f} M parameters, {args.rows} × {args.length} tokens)",
    )
    for name, values in times.items():
        result.add(name, "s", values, note=None if name == "mlx-codellama" else "peer")
    over = [b / a for a, b in zip(*times.values(), strict=True)]
    result.add("mlx-codellama over MLX and the BLAS", "×", over, note="target 4")
    result.save()


if __name__ == "__main__":
    main()
