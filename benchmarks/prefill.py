"""How fast a prompt is read, against llama.cpp and mlx-lm.

    python benchmarks/prefill.py --geometry 1.1b --prompt 512 [--models FOLDER] [--peer-python PYTHON] [--mlx-lm]
    python benchmarks/prefill.py --prompt 2048 --kv-bits 4      (llama.cpp: q4_0 K and V, flash attention)

Random weights, 4 bit, groups of 64 (llama.cpp: Q4_0, batches of 512), asked in turn. Run it on an idle machine.
"""

from __future__ import annotations

from decode import arguments, llama_cpp, ratios
from harness import Result
from runtimes import Runtime

Q4_0 = 2  # ggml's number of the type
BATCH = 512  # tokens that llama.cpp reads at a time


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--kv-bits", type=int, choices=(4,), help="of keys and values; default: the activations' own")
    parser.add_argument("--mlx-lm", action="store_true", help="measure it too, on a few tokens: it is slow")
    args = parser.parse_args()
    question = f"Reading a prompt of {args.prompt} tokens: {args.geometry} geometry, 4 bit, {args.threads} threads"
    name, target = f"prefill-{args.geometry}-{args.prompt}", "target 1.3"
    if args.kv_bits:
        name, question, target = f"{name}-kv4", f"{question}, 4-bit K and V", "target 3"
    result = Result(name, question)
    ours = Runtime("ours", geometry=args.geometry, kv_bits=args.kv_bits, threads=args.threads)
    peer = llama_cpp(args, **({"kv": Q4_0} if args.kv_bits else {}))
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for runtime in (ours, peer):  # memory for a whole batch
        runtime.run(min(args.prompt, BATCH), 0)
    for _ in range(args.repeat):
        rates["ours"].append(args.prompt / ours.run(args.prompt, 0)[0])
        rates["peer"].append(args.prompt / peer.run(args.prompt, 0)[0])
    ours.close()
    peer.close()
    speed = result.add("mlx-codellama", "tok/s", rates["ours"])
    result.add("llama.cpp, Q4_0", "tok/s", rates["peer"], note="peer")
    result.add("mlx-codellama over llama.cpp", "×", ratios(rates["ours"], rates["peer"]), note=target)
    if args.mlx_lm:
        for dtype, prompt in (("float32", 12), ("bfloat16", 3)):
            slow = Runtime("mlx-lm", args.peer_python, {"MLX_CODELLAMA_BLAS": "0"}, geometry=args.geometry, dtype=dtype)
            values = [prompt / slow.run(prompt, 0)[0] for _ in range(2)]
            slow.close()
            result.add(f"mlx-lm, {dtype}, {prompt} tokens", "tok/s", values, note="peer")
            result.add(f"mlx-codellama over mlx-lm, {dtype}", "×", [speed / v for v in values], note="target 150")
    result.save()


if __name__ == "__main__":
    main()
