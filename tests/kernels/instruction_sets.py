"""A test file once more, in a child: the native kernels choose their instruction set once per process."""

import os
import subprocess
import sys


def run_again(file: str, names: str, isa: str, threads: str) -> subprocess.CompletedProcess[str]:
    """The tests of `file` that -k finds by `names`, with that instruction set and number of threads; all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", names],
        env={**os.environ, "MLX_CODELLAMA_ISA": isa, "MLX_CODELLAMA_THREADS": threads},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    return done
