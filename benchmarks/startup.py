"""How long until `mlx-codellama --help` has printed, and what `import mlx_codellama` costs.

    python benchmarks/startup.py [--repeat 15]

Targets: --help under 0.3 s, the import under 0.05 s and without mlx. The peer is mlx-lm's own --help and import.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from harness import Result, report, run_child

_IMPORT = """
import sys, time
start = time.perf_counter()
import {0}
print(time.perf_counter() - start, "mlx.core" in sys.modules)
"""


def import_s(module: str) -> float:
    """Seconds of one import in a fresh interpreter, the interpreter's own start not counted."""
    seconds, loads_mlx = run_child([sys.executable, "-c", _IMPORT.format(module)]).stdout.split()
    if module == "mlx_codellama" and loads_mlx == "True":
        raise RuntimeError("import mlx_codellama loaded mlx")
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=15)
    n = parser.parse_args().repeat
    result = Result("startup", "Start-up: seconds until --help has printed, and of an import")
    ours, peer = [sys.executable, "-m", "mlx_codellama"], [sys.executable, "-m", "mlx_lm"]
    commands = {
        "`mlx-codellama --help`": ([*ours, "--help"], "target 0.3 s"),
        "`mlx-codellama infill --help`": ([*ours, "infill", "--help"], None),
        "`python -c ''`": ([sys.executable, "-c", ""], "the interpreter alone"),
    }
    for name, (command, note) in commands.items():
        run_child(command)  # once to warm the page cache and write byte code
        result.add(name, "s", [run_child(command).seconds for _ in range(n)], note=note)
    import_s("mlx_codellama")
    seconds = [import_s("mlx_codellama") for _ in range(n)]
    result.add("`import mlx_codellama`", "s", seconds, note="target 0.05 s; loads no mlx")
    if importlib.util.find_spec("mlx_lm"):
        run_child([*peer, "generate", "--help"])
        seconds = [run_child([*peer, "generate", "--help"]).seconds for _ in range(3)]
        result.add("`mlx_lm.generate --help`", "s", seconds, note="peer")
        result.add("`import mlx_lm`", "s", [import_s("mlx_lm") for _ in range(3)], note="peer")
    else:
        report("mlx-lm is not installed: no peer")
    result.save()


if __name__ == "__main__":
    main()
