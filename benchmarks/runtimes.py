"""One runtime in a process of its own: this one, llama.cpp or mlx-lm, told on stdin what to do, one JSON line each.

    python benchmarks/runtimes.py ours|llama.cpp|mlx-lm '{"geometry": "1.1b", ...}'

A process that waits for its next line takes no core from the others. `Runtime` starts one and talks to it.
Requests: {"prompt": n, "tokens": m} reads n random tokens into an empty cache, then writes m more; the answer has
prefill_s and decode_s. Options: geometry, bits, group, exact, dtype, threads, context, model (the GGUF file).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[int, int], tuple[float, float]]  # prompt tokens, tokens → seconds for each


class Runtime:
    """A running child. `run` returns (prefill_s, decode_s)."""

    def __init__(
        self, kind: str, python: str = sys.executable, env: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.kind, self.options = kind, options
        self._child = subprocess.Popen(
            [python, __file__, kind, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
        )  # fmt: skip
        self.about: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.kind} ended with {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prompt: int, tokens: int) -> tuple[float, float]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._child.stdin.flush()
        answer = self._read()
        return answer["prefill_s"], answer["decode_s"]

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def ids(n: int, vocab_size: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(3, vocab_size) for _ in range(n)]


def ours(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    if "threads" in options:
        os.environ["MLX_CODELLAMA_THREADS"] = str(options["threads"])
    import mlx_codellama  # noqa: F401  (before mlx)
    from mlx_codellama.api.speed import measure_speed, weights_bytes
    from mlx_codellama.config import GEOMETRIES
    from mlx_codellama.kernels import dispatch
    from mlx_codellama.loader import random_model
    from mlx_codellama.memory import with_bits
    from mlx_codellama.storage import KVStorage

    args = with_bits(GEOMETRIES[options["geometry"]], options.get("bits", 4), options.get("group", 64))
    model = random_model(args, exact=options.get("exact", False))
    storage = KVStorage.of(options.get("kv_bits"))

    def run(prompt: int, tokens: int) -> tuple[float, float]:
        speed = measure_speed(model, prompt_tokens=prompt, tokens=max(2, tokens + 1), storage=storage)
        return speed.ttft_s, tokens / speed.decode_tok_s if tokens else 0.0

    run(16, 2)
    table = sum(a.nbytes for n, a in model.named_parameters() if n.startswith("model.embed_tokens"))
    return run, {"bytes": weights_bytes(model) - table, "paths": dispatch.paths()}  # of the table a row is read


def llama_cpp(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import ctypes

    import llama_cpp as lib

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(options["model"].encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {options['model']}")
    p = lib.llama_context_default_params()
    p.n_ctx = options.get("context", 4096)
    p.n_batch = p.n_ubatch = 512
    p.n_threads = p.n_threads_batch = options.get("threads", 2)
    p.flash_attn_type = 1
    for name, key in (("type_k", "kv"), ("type_v", "kv")):
        if key in options:
            setattr(p, name, options[key])
    context = lib.llama_init_from_model(model, p)
    if not context:
        raise RuntimeError("llama.cpp makes no context")
    memory = lib.llama_get_memory(context)
    vocab = options["vocab_size"]

    def decode(tokens: list[int]) -> None:
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(context)

    def run(prompt: int, tokens: int) -> tuple[float, float]:
        lib.llama_memory_clear(memory, False)
        read = ids(prompt, vocab)
        begin = time.perf_counter()
        for i in range(0, prompt, 512):
            decode(read[i : i + 512])
        middle = time.perf_counter()
        for token in ids(tokens, vocab):
            decode([token])
        return middle - begin, time.perf_counter() - middle

    run(16, 2)
    return run, {"keep": [quiet], "system": lib.llama_print_system_info().decode()}


def mlx_lm(options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs

    from mlx_codellama.config import GEOMETRIES  # dimensions alone: no part of ours computes here

    g = GEOMETRIES[options["geometry"]]
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=g.hidden_size, num_hidden_layers=g.num_hidden_layers,
            intermediate_size=g.intermediate_size, num_attention_heads=g.num_attention_heads,
            num_key_value_heads=g.num_key_value_heads, rms_norm_eps=g.rms_norm_eps, vocab_size=g.vocab_size,
            head_dim=g.head_dim, rope_theta=g.rope_theta, tie_word_embeddings=False,
        )
    )  # fmt: skip
    dtype = getattr(mx, options.get("dtype", "bfloat16"))
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    nn.quantize(model, group_size=options.get("group", 64), bits=options.get("bits", 4))
    mx.eval(model.parameters())

    def run(prompt: int, tokens: int) -> tuple[float, float]:
        cache = make_prompt_cache(model)
        begin = time.perf_counter()
        y = mx.argmax(model(mx.array([ids(prompt, g.vocab_size)]), cache=cache)[:, -1], axis=-1)
        mx.eval(y)
        middle = time.perf_counter()
        for _ in range(tokens):
            y = mx.argmax(model(y[:, None], cache=cache)[:, -1], axis=-1)
            mx.eval(y)
        return middle - begin, time.perf_counter() - middle

    return run, {}


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not be taken for an answer
    kinds = {"ours": ours, "llama.cpp": llama_cpp, "mlx-lm": mlx_lm}
    run, about = kinds[sys.argv[1]](json.loads(sys.argv[2]))
    out.write(json.dumps({k: v for k, v in about.items() if k != "keep"}) + "\n")
    out.flush()
    for line in sys.stdin:
        wanted = json.loads(line)
        prefill_s, decode_s = run(wanted["prompt"], wanted["tokens"])
        out.write(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s}) + "\n")
        out.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
