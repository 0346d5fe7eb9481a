"""What attention over a long cache costs per new token, against llama.cpp and the memory's read rate.

    python benchmarks/attention.py --geometry 7b [--models FOLDER] [--peer-python PYTHON]

Ours is the op itself over one layer's cache in storage larger than what counts. llama.cpp has no such op to call: its
time is that of a token after N cached ones less that of a token after 16, over a model with small feed-forward blocks
and vocabulary. Its cache is filled through its state functions with repeated rows. Every layer is read in turn, and
all layers together are larger than the caches of the processor. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT = 16  # tokens in llama.cpp's cache where attention costs next to nothing
KINDS = {"f16": 1, "q4_0": 2}  # ggml's numbers of the types
LAYERS = {"7b": 1, "1.1b": 8}
SETTLE_S = 1  # llama.cpp's threads go on spinning after their work, at the cost of whoever is measured next
CONTEXTS = (1, 1024, 4096, 16384, 32768, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="7b", choices=list(LAYERS))
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--models", type=Path, default=Path("/tmp"), help="folder of GGUF files, written where absent")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve(json.loads(args.peer))
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    os.environ["MLX_CODELLAMA_THREADS"] = str(args.threads)
    import gguf_models
    import mlx_codellama  # noqa: F401  # isort: skip  (before mlx)
    from dataclasses import replace

    import mlx.core as mx
    from decode import ratios, reader
    from harness import Result

    from mlx_codellama.config import GEOMETRIES
    from mlx_codellama.kernels import dispatch
    from mlx_codellama.kernels.kv_attention import kv_attention
    from mlx_codellama.kernels.kv_attention_rows import kv_attention_rows
    from mlx_codellama.kernels.packed_kv import RowFormat

    layers = LAYERS[args.geometry]
    shape = replace(GEOMETRIES[args.geometry], num_hidden_layers=layers, intermediate_size=256, vocab_size=512)
    heads, kv_heads, width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    file = gguf_models.write(args.models / f"attention-{args.geometry}.gguf", shape)
    fmt, most = RowFormat(width, 4, 4), CONTEXTS[-1] + 1
    q, scale = mx.random.normal((1, heads, 1, width)), width**-0.5
    # Zeros would share one page of memory; what the codes are costs nothing.
    floats = [[mx.full((1, kv_heads, most + 64, width), x, mx.float16) for x in (0.5, 0.25)] for _ in range(layers)]
    rows = [mx.full((1, kv_heads, most + 64, fmt.words), 0x2C002C00, mx.uint32) for _ in range(layers)]
    mx.eval(q, floats, rows)

    def over_floats(n: int, i: int) -> mx.array:
        k, v = (a[:, :, : n + 1] for a in floats[i])
        return kv_attention(q, k, v, scale=scale, offset=n)

    def over_rows(n: int, i: int) -> mx.array:
        return kv_attention_rows(q, rows[i], fmt, scale=scale, offset=n)

    ours: dict[str, Callable[[int, int], mx.array]] = {"16-bit": over_floats, "4-bit": over_rows}
    token_bytes = {"16-bit": 4 * kv_heads * width, "4-bit": fmt.bytes * kv_heads}

    def per_layer_ms(f: Callable[[int, int], mx.array], n: int) -> float:
        values = []
        for _ in range(5):
            begin = time.perf_counter()
            for i in range(layers):
                mx.eval(f(n, i))
            values.append((time.perf_counter() - begin) / layers * 1e3)
        return statistics.median(values)

    result = Result(
        f"attention-{args.geometry}",
        f"Attention of a new token over one layer's cache: {heads} query and {kv_heads} kv heads of {width}, "
        f"{args.threads} threads",
    )
    read = reader(args.threads)
    peers = {(kind, n): Peer(args, str(file), kind, n, layers) for n in CONTEXTS[-3:] if n != 32768 for kind in KINDS}
    times: dict[Any, list[float]] = {}
    for turn in range(args.repeat + 1):  # the first round only warms
        now: dict[Any, float] = {"read": read() / 1e9}
        now |= {(name, n): per_layer_ms(f, n) for n in CONTEXTS for name, f in ours.items()}
        now |= {of: peer.ms() for of, peer in peers.items()}
        time.sleep(SETTLE_S)
        for key, value in now.items():
            times.setdefault(key, []).extend([value] if turn else [])
    for peer in peers.values():
        peer.close()
    paths = dispatch.paths()
    result.notes.append(f"paths: {paths['kv_attention']} and {paths['kv_attention_rows']}")
    rate = result.add("read rate of the memory", "GB/s", times["read"])
    for n in CONTEXTS:
        for name in ours:
            result.add(f"{n} tokens, {name} K and V", "ms", times[name, n], bytes=n * token_bytes[name])
        if ("f16", n) not in peers:
            continue
        for kind, name, target in (("f16", "16-bit", 1.3), ("q4_0", "4-bit", 2)):
            result.add(f"{n} tokens, llama.cpp, {kind} K and V", "ms", times[kind, n], note="peer")
            over = ratios(times[kind, n], times[name, n])
            result.add(f"{n} tokens, {name}: over llama.cpp, {kind}", "×", over, note=f"target {target}")
        over = ratios(times["16-bit", n], times["4-bit", n])
        result.add(f"{n} tokens, 4-bit over our own 16-bit", "×", over, note="target 1.3")
    for name in ours:
        slope(result, name, {n: times[name, n] for n in CONTEXTS}, token_bytes[name], rate)
    result.save()


def slope(result: Any, name: str, times: dict[int, list[float]], token_bytes: int, rate: float) -> None:
    """The line through 4096 and 65536 tokens, and how far what lies between is from it."""
    medians = {n: statistics.median(t) for n, t in times.items()}
    first, last = 4096, CONTEXTS[-1]
    ms = (medians[last] - medians[first]) / (last - first)
    result.add(f"{name}: bytes of K and V over the slope", "GB/s", [token_bytes / ms / 1e6], bytes=token_bytes)
    result.add(f"{name}: share of the read rate", "", [token_bytes / ms / 1e6 / rate])
    off = [medians[n] / (medians[first] + ms * (n - first)) - 1 for n in CONTEXTS if first < n < last]
    result.add(f"{name}: largest distance from a straight line", "%", [100 * max(map(abs, off))])


class Peer:
    """llama.cpp with n tokens cached, in a process of its own."""

    def __init__(self, args: argparse.Namespace, file: str, kind: str, n: int, layers: int) -> None:
        how = {"file": file, "type": KINDS[kind], "tokens": n, "threads": args.threads}
        self._layers = layers
        self._child = subprocess.Popen(
            [args.peer_python, __file__, "--peer", json.dumps(how)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ms()

    def ms(self) -> float:
        """Milliseconds of a layer's attention."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        if not (line := self._child.stdout.readline()):
            raise RuntimeError(f"llama.cpp ended with {self._child.wait()}")
        return float(line) / self._layers

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def serve(how: dict[str, Any]) -> None:
    """The peer's side: a line in, milliseconds out."""
    import llama_cpp as lib

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(how["file"].encode(), lib.llama_model_default_params())

    def context(n_tokens: int) -> Any:
        p = lib.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = n_tokens + 256, 512, 512
        p.n_threads = p.n_threads_batch = how["threads"]
        p.flash_attn_type, p.type_k, p.type_v = 1, how["type"], how["type"]
        made = lib.llama_init_from_model(model, p)
        decode(made, list(range(SHORT)))
        return made

    def decode(to: Any, tokens: list[int]) -> None:
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(to, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(to)

    def token_ms(to: Any, at: int) -> float:
        values = []
        for _ in range(3):
            begin = time.perf_counter()
            decode(to, [3])
            values.append(1e3 * (time.perf_counter() - begin))
            if not lib.llama_memory_seq_rm(lib.llama_get_memory(to), 0, at, -1):
                raise RuntimeError("llama.cpp does not forget")
        return statistics.median(values)

    short, long = context(SHORT), context(how["tokens"])
    fill(lib, long, how["tokens"])
    for _ in sys.stdin:
        sys.stdout.write(f"{token_ms(long, how['tokens']) - token_ms(short, SHORT)}\n")
        sys.stdout.flush()


def fill(lib: Any, context: Any, n: int) -> None:
    """Restore a state of n tokens that repeats the rows of the SHORT ones.

    The state of a sequence: four words of which the last counts the cells; position, 1 and 0 of each; transposed?,
    layers; then of each layer, for K and for V: type, 64-bit bytes of a row, rows.
    """
    size = lib.llama_state_seq_get_size(context, 0)
    buffer = (ctypes.c_uint8 * size)()
    old = bytes(buffer)[: lib.llama_state_seq_get_data(context, buffer, size, 0)] and bytes(buffer)
    words = struct.unpack_from("<4I", old)
    at = 16 + 12 * SHORT
    transposed, layers = struct.unpack_from("<2I", old, at)
    if words[3] != SHORT or transposed or n % SHORT:
        raise RuntimeError("this llama.cpp keeps its state in another form")
    new = [struct.pack("<4I", *words[:3], n), *(struct.pack("<3i", i, 1, 0) for i in range(n)), old[at : at + 8]]
    at += 8
    for _ in range(2 * layers):
        row = struct.unpack_from("<Q", old, at + 4)[0]
        new += [old[at : at + 12], old[at + 12 : at + 12 + row * SHORT] * (n // SHORT)]
        at += 12 + row * SHORT
    if at != len(old):
        raise RuntimeError("this llama.cpp keeps its state in another form")
    data = b"".join(new)
    state = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, -1, -1)
    if not lib.llama_state_seq_set_data(context, state, len(data), 0):
        raise RuntimeError("llama.cpp does not take the state")


if __name__ == "__main__":
    main()
