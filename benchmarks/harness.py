"""How every benchmark measures and what it leaves behind: one JSON file in benchmarks/results/ per question.

A result holds the command, the machine (no host name), the commit, and rows with median, spread and all values, as
benchmarks/README.md says. A peer is measured in the same run: a busy machine is busy for both.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_codellama.staging import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Result:
    """All rows that answer one question. `name` is the file's name, `question` the caption of its table."""

    name: str
    question: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, name: str, unit: str, values: Sequence[float], *, note: str | None = None, bytes: int | None = None
    ) -> float:
        """Add a row; return its median. `bytes` is what the work moved, `note` a target or a circumstance."""
        kept = [float(f"{value:.5g}") for value in values]
        row: dict[str, Any] = {"name": name, "unit": unit, "median": statistics.median(kept)}
        if len(kept) > 1:
            row |= {"spread": [min(kept), max(kept)], "runs": len(kept), "values": kept}
        row |= {key: value for key, value in (("bytes", bytes), ("note", note)) if value is not None}
        self.rows.append(row)
        spread = f" ({min(kept):.4g} to {max(kept):.4g}, {len(kept)} runs)" if len(kept) > 1 else ""
        report(f"{name}: {row['median']:.4g} {unit}{spread}")
        return float(row["median"])

    def save(self, path: Path | None = None) -> Path:
        """Write results/<name>.json."""
        path = path or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "question": self.question,
            "command": shlex.join(["python", *(_relative(a) for a in sys.argv)]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "load_average": [round(x, 1) for x in os.getloadavg()],
            "rows": self.rows,
            "notes": self.notes,
        }
        write_file(path, (json.dumps(data, indent=1) + "\n").encode())
        report(f"wrote {_relative(str(path))}")
        return path


@dataclass(frozen=True)
class Child:
    """What one child process cost."""

    seconds: float  # wall
    cpu_s: float
    peak_bytes: int  # largest resident set
    status: int
    stdout: str
    stderr: str


def run_child(command: Sequence[str], *, check: bool = True, timeout_s: float = 3600) -> Child:
    """Run a command; measure wall time, CPU time and the peak resident set of it (ru_maxrss of wait4).

    The child is the first to go where memory runs out (Linux), so that a peer's appetite kills nobody else.
    """

    def expendable() -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("900")

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=expendable, cwd=ROOT)
        try:
            _, status, usage = _wait(process, timeout_s)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        child = Child(
            seconds,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * scale,
            process.returncode,
            out.read(),
            err.read(),
        )
    if check and child.status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {child.status}:\n{child.stderr[-3000:]}")
    return child


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[int, int, resource.struct_rusage]:
    end = time.monotonic() + timeout_s
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return pid, status, usage
        if time.monotonic() > end:
            raise TimeoutError(f"no end after {timeout_s:.0f} s")
        time.sleep(0.002)


def drop_cache(*paths: Path) -> bool:
    """Ask the kernel to forget the cached pages of files, or of all files in folders. False where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
    return True


def read_rate(path: Path, *, max_bytes: int = 4 << 30, block_bytes: int = 16 << 20) -> float:
    """Bytes per second at which a file comes from disk, read once front to back with its pages dropped before."""
    drop_cache(path)
    buffer = bytearray(block_bytes)
    done = 0
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while done < max_bytes and (n := file.readinto(buffer)):
            done += n
    return done / (time.perf_counter() - start)


def machine() -> dict[str, Any]:
    """CPU model, cores, memory and system: what a number depends on, not whose machine it is."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": versions().get("mlx"),
    }


def _cpu_model() -> str:
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return found.stdout.strip()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    found = {}
    for name in ("mlx-codellama", "mlx-codellama-cpu", "mlx", "mlx-lm", "transformers", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit, with `+` where tracked files of the shipped package differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "mlx_codellama", "convert", "quant", "csrc")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")


def report(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _relative(word: str) -> str:
    """A path inside the repository as written from its root; one outside by its last part alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return f"…/{path.name}"
