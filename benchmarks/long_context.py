"""What a long context takes in memory: 100,000 tokens against the plan, and 4-bit against 16-bit keys and values.

    python benchmarks/long_context.py [--peer-python PYTHON] [--only plan|layers] [--whole 2048] [--tokens 100000]

Memory does not depend on what the numbers are, so the beginning of a long text need not be computed: the caches are
filled with random keys and values through their own `append`, and the product reads the last tokens and writes two.
At that moment everything is allocated that a whole run allocates. `--whole` tokens are read without that, from the
first on, as the check of it. Each measurement is a process of its own; mlx-lm's runs in `--peer-python`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

TAIL = 256  # tokens that are really read
PEER_TAIL = 64
BLOCK = 2048  # tokens appended at once while filling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", help="an interpreter that has mlx-lm; without it that row is left out")
    parser.add_argument("--only", choices=("plan", "layers"))
    parser.add_argument("--geometry", default="1.1b")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--whole", type=int, default=2048, help="tokens of the run that computes all of them")
    parser.add_argument("--layers", type=int, default=2, help="of the 7B geometry, at 32,768 tokens")
    args = parser.parse_args()
    if args.worker:
        given = json.loads(args.worker)
        print(json.dumps(mlx_lm(**given) if given.pop("peer") else ours(**given)))
        return
    from harness import Result

    if args.only != "layers":
        result = Result("long_context", f"Peak memory at a long context, {args.geometry} geometry, 4-bit weights")
        for tokens, filled in ((args.whole, False), (args.tokens, True)):
            got = child(None, geometry=args.geometry, layers=None, kv_bits=4, tokens=tokens, filled=filled)
            name = f"{tokens:,} tokens, 4-bit keys and values"
            how = f"the last {TAIL} read, those before filled in" if filled else "all of them read"
            result.add(f"{name}: measured", "GB", [got["peak_bytes"] / 1e9], note=how)
            result.add(f"{name}: planned", "GB", [got["planned_bytes"] / 1e9])
            share = got["peak_bytes"] / got["planned_bytes"]
            result.add(f"{name}: measured / planned", "×", [share], note="target 0.95 to 1.05")
        result.notes.append(f"Paths: {got['paths']}.")
        result.save()
    if args.only != "plan":
        result = Result("long_context_layers", f"Peak above the weights at 32,768 tokens, {args.layers} layers of 7B")
        above = {}
        for kv_bits in (16, 4):
            got = child(None, geometry="7b", layers=args.layers, kv_bits=kv_bits, tokens=32_768, filled=True)
            above[kv_bits] = result.add(
                f"{kv_bits}-bit cache", "GB", [got["above_bytes"] / 1e9], note=f"{got['chunk']} tokens at a time"
            )
        result.add("4-bit against 16-bit cache", "×", [above[4] / above[16]], note="target 0.45")
        if args.peer_python:
            got = child(args.peer_python, layers=args.layers, kv_bits=4, tokens=32_768)
            peer = result.add(
                "mlx-lm, 4-bit cache", "GB", [got["above_bytes"] / 1e9], note=f"{PEER_TAIL} tokens at a time"
            )
            result.add("ours against mlx-lm's", "×", [above[4] / peer], note="target: below 1")
            result.notes.append(
                f"mlx-lm {got['version']} reads 2048 tokens at a time by default; its scores grow with that."
            )
        result.save()


def child(python: str | None, **given: Any) -> dict[str, Any]:
    from harness import report, run_child

    worker = json.dumps({"peer": python is not None, **given})
    start = time.perf_counter()
    done = run_child([python or sys.executable, str(Path(__file__).resolve()), "--worker", worker])
    got: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report(f"  {worker}: {got} ({time.perf_counter() - start:.0f} s)")
    return got


def ours(geometry: str, layers: int | None, kv_bits: int, tokens: int, filled: bool) -> dict[str, Any]:
    import mlx_codellama  # noqa: F401  # isort: skip  (first, or MLX keeps its reference BLAS)
    import dataclasses

    import mlx.core as mx

    from mlx_codellama.api.speed import weights_bytes
    from mlx_codellama.cache import make_sequence
    from mlx_codellama.config import GEOMETRIES
    from mlx_codellama.engine import generate
    from mlx_codellama.kernels import dispatch
    from mlx_codellama.loader import random_model
    from mlx_codellama.memory import with_bits
    from mlx_codellama.placement import place
    from mlx_codellama.storage import KVStorage

    args = with_bits(GEOMETRIES[geometry], 4)
    if layers is not None:
        args = dataclasses.replace(args, num_hidden_layers=layers, vocab_size=512)
    storage = KVStorage(kv_bits, kv_bits)
    model, cache = random_model(args), make_sequence(args, storage)
    n_filled = tokens - TAIL - 2 if filled else 0
    cache.reserve(tokens)
    for i in range(args.num_hidden_layers):
        tail = cache.layer(i).tail
        for start in range(0, n_filled, BLOCK):
            n = min(BLOCK, n_filled - start)
            block = mx.random.normal((1, args.num_key_value_heads, n, args.head_dim), model.dtype)
            tail.append(block, block)
            mx.eval(tail.arrays)
    mx.clear_cache()
    mx.reset_peak_memory()
    weights = weights_bytes(model)
    ids = [3 + i % 500 for i in range(tokens - 2)]
    n = len(list(generate(model, ids, max_tokens=2, max_context=tokens, sequence=cache)))
    assert n == 2
    peak = mx.get_peak_memory()
    placement = place(args, storage=storage)
    return {
        "peak_bytes": peak,
        "above_bytes": peak - weights,
        "weights_bytes": weights,
        "cache_bytes": cache.nbytes,
        "planned_bytes": placement.plan(tokens).total_bytes,
        "chunk": min(placement.chunk_tokens(n_filled), tokens),
        "paths": dispatch.paths(),
    }


def mlx_lm(layers: int, kv_bits: int, tokens: int) -> dict[str, Any]:
    """The same with mlx-lm's model and its QuantizedKVCache: fill, then one pass of PEER_TAIL tokens."""
    from importlib import metadata

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import QuantizedKVCache
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=layers,
            intermediate_size=11008,
            num_attention_heads=32,
            num_key_value_heads=32,
            rms_norm_eps=1e-5,
            vocab_size=512,
            rope_theta=1e6,
        )
    )
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    cache = [QuantizedKVCache(group_size=64, bits=kv_bits) for _ in range(layers)]
    n_filled = tokens - PEER_TAIL
    for layer in cache:
        for start in range(0, n_filled, BLOCK):
            block = mx.random.normal((1, 32, min(BLOCK, n_filled - start), 128))
            layer.update_and_fetch(block, block)
            mx.eval(layer.keys, layer.values)
    mx.clear_cache()
    mx.reset_peak_memory()
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.eval(model(mx.array([[3 + i % 500 for i in range(PEER_TAIL)]]), sequence=cache))
    return {"above_bytes": mx.get_peak_memory() - weights, "version": metadata.version("mlx-lm")}


if __name__ == "__main__":
    main()
