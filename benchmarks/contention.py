"""How much of the speed of writing is left while another process keeps one of the cores busy.

    python benchmarks/contention.py [--geometry 1.1b] [--models FOLDER] [--peer-python PYTHON]

The other process spins on the last core; undisturbed and disturbed runs take turns. Run it on an idle machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from decode import PROMPT, arguments, llama_cpp, ratios
from harness import Result
from runtimes import Runtime


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    result = Result("contention", f"Writing tokens beside a busy process: {args.geometry}, {args.threads} threads")
    ours = Runtime("ours", geometry=args.geometry, threads=args.threads)
    runtimes = {"mlx-codellama": ours, "llama.cpp": llama_cpp(args)}
    rates: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in runtimes}
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        for _ in range(args.repeat):
            for state, sign in (("alone", signal.SIGSTOP), ("beside", signal.SIGCONT)):
                other.send_signal(sign)
                for name, runtime in runtimes.items():
                    time.sleep(0.5)  # llama.cpp's threads go on spinning for a while
                    tokens = args.tokens if name == "mlx-codellama" or state == "alone" else args.tokens // 4
                    rates[name][state].append(tokens / runtime.run(PROMPT if tokens > 4 else 1, tokens)[1])
    finally:
        other.kill()
        other.wait()
    for runtime in runtimes.values():
        runtime.close()
    for name, both in rates.items():
        result.add(f"{name}, alone", "tok/s", both["alone"])
        result.add(f"{name}, beside a busy process", "tok/s", both["beside"])
        note = "target 0.45" if name == "mlx-codellama" else "peer"
        result.add(f"{name}: what is left", "", ratios(both["beside"], both["alone"]), note=note)
    result.save()


if __name__ == "__main__":
    main()
