"""How fast a prompt is read, against llama.cpp and mlx-lm.

    python benchmarks/prefill.py --geometry 1.1b [--models FOLDER] [--peer-python PYTHON] [--mlx-lm]

Random weights, 4 bit, groups of 64 (llama.cpp: Q4_0, batches of 512), asked in turn. Run it on an idle machine.
"""

from __future__ import annotations

from decode import arguments, llama_cpp, ratios
from harness import Result
from runtimes import Runtime


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--mlx-lm", action="store_true", help="measure it too, on a few tokens: it is slow")
    args = parser.parse_args()
    result = Result(
        f"prefill-{args.geometry}", f"Reading prompts: {args.geometry} geometry, 4 bit, {args.threads} threads"
    )
    ours, peer = Runtime("ours", geometry=args.geometry), llama_cpp(args)
    speed = 0.0
    for prompt in args.prompts:
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(args.repeat):
            rates["ours"].append(prompt / ours.run(prompt, 0)[0])
            rates["peer"].append(prompt / peer.run(prompt, 0)[0])
        speed = max(speed, result.add(f"{prompt} tokens, mlx-codellama", "tok/s", rates["ours"]))
        result.add(f"{prompt} tokens, llama.cpp, Q4_0", "tok/s", rates["peer"], note="peer")
        over = ratios(rates["ours"], rates["peer"])
        result.add(f"{prompt} tokens, mlx-codellama over llama.cpp", "×", over, note="target 1.3")
    ours.close()
    peer.close()
    if args.mlx_lm:
        for dtype, prompt in (("float32", 12), ("bfloat16", 3)):
            slow = Runtime("mlx-lm", args.peer_python, {"MLX_CODELLAMA_BLAS": "0"}, geometry=args.geometry, dtype=dtype)
            values = [prompt / slow.run(prompt, 0)[0] for _ in range(2)]
            slow.close()
            result.add(f"{prompt} tokens, mlx-lm, {dtype}", "tok/s", values, note="peer")
            result.add(f"mlx-codellama over mlx-lm, {dtype}", "×", [speed / v for v in values], note="target 150")
    result.save()


if __name__ == "__main__":
    main()
