"""Conversion at full size: time, rate and peak memory from 16 bits to 4, against mlx-lm and the disk in the same run.

    python benchmarks/convert.py --workdir DIR --tokenizer tokenizer.model [--only 7b-hf] [--repeat 3]

Writes random checkpoints of the 7B geometry (13.5 GB) in Hugging Face's and Meta's layout and of the 34B geometry in
four sparse Meta shards, one at a time under DIR, converts each with `mlx-codellama convert --recipe q4`, generates four
tokens, and deletes them. Needs 20 GB of disk, the `peers` extra, and Llama 2's tokenizer.model.

Every timed read begins with the source's pages dropped from the page cache. Peak memory is the largest resident set of
the whole process (wait4). Targets: peak under 1.5 GB; 400 MB/s of source, or half the disk's own rate if that is less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import Child, Result, drop_cache, read_rate, report, run_child

OURS = [sys.executable, "-m", "mlx_codellama"]
WRITER = Path(__file__).resolve().parent / "checkpoints.py"


@dataclass(frozen=True)
class Case:
    """One source to convert."""

    name: str
    geometry: str
    writer: tuple[str, ...]  # arguments of checkpoints.py
    peer: bool = False
    sparse: bool = False


CASES = {
    "7b-hf": Case("7B, Hugging Face", "7b", ("hf",), peer=True),
    "7b-meta": Case("7B, Meta, 1 shard", "7b", ("meta",)),
    "34b-meta": Case("34B, Meta, 4 shards", "34b", ("meta", "--shards", "4", "--sparse"), sparse=True),
}


def source_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])


def timed(command: list[str], source: Path, out: Path) -> Child:
    """One conversion from a cold page cache to a folder that does not exist."""
    shutil.rmtree(out, ignore_errors=True)
    drop_cache(source)
    return run_child(command)


def measure(case: Case, workdir: Path, tokenizer: Path, result: Result, *, repeat: int) -> None:
    source, out, theirs = workdir / "source", workdir / "ours", workdir / "theirs"
    layout, *options = case.writer
    report(f"── {case.name}: writing the source")
    writer = [sys.executable, str(WRITER), layout, str(source), case.geometry, "--tokenizer", str(tokenizer)]
    run_child([*writer, *options])
    size = source_bytes(source)
    command = [*OURS, "convert", str(source), str(out), "--recipe", "q4", "--json"]
    rates, runs = [], []
    for _ in range(repeat):
        # Disk and conversion in turn: both see the same machine.
        rates.append(read_rate(weight_files(source)[0]) / 1e6)
        runs.append(timed(command, source, out))
        report(f"disk {rates[-1]:.0f} MB/s, convert {size / runs[-1].seconds / 1e6:.0f} MB/s")
    ours_rate = [size / run.seconds / 1e6 for run in runs]
    limit = min(400.0, sorted(rates)[len(rates) // 2] / 2)
    disk = "holes, not disk" if case.sparse else "16 MiB blocks, cold"
    result.add("disk alone", "MB/s", rates, note=disk)
    rate = result.add("convert to q4", "MB/s", ours_rate, bytes=size, note=f"target {limit:.0f}")
    result.add("time", "s", [run.seconds for run in runs])
    result.add("CPU time", "s", [run.cpu_s for run in runs])
    peak = result.add("peak memory", "GB", [run.peak_bytes / 1e9 for run in runs], note="target 1.5")
    if rate < limit or peak >= 1.5:
        report("TARGET MISSED")
    if not fits(source_bytes(out)):
        result.notes.append(
            f"{source_bytes(out) / 1e9:.1f} GB of 4-bit weights do not fit into memory: 2 bits generate."
        )
        run = timed([*OURS, "convert", str(source), str(out), "--recipe", "q2"], source, out)
        result.add("convert to q2", "MB/s", [size / run.seconds / 1e6], bytes=size)
    generate(out, result)
    shutil.rmtree(out)
    if case.peer:
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(theirs)]
        peers = [timed([*command, "-q", "--q-bits", "4"], source, theirs) for _ in range(max(1, repeat // 2))]
        result.add("mlx-lm convert", "MB/s", [size / run.seconds / 1e6 for run in peers], bytes=size)
        result.add("mlx-lm time", "s", [run.seconds for run in peers])
        result.add("mlx-lm CPU time", "s", [run.cpu_s for run in peers])
        result.add("mlx-lm peak memory", "GB", [run.peak_bytes / 1e9 for run in peers])
        shutil.rmtree(theirs)
    shutil.rmtree(source)


def fits(n_bytes: int) -> bool:
    """Whether weights of this size, as the native kernels read them, leave a seventh of the machine's memory."""
    return n_bytes < 0.85 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def generate(model: Path, result: Result) -> None:
    """Four tokens from what was written."""
    child = run_child([*OURS, "complete", "def f(x):", "--model", str(model), "--max-tokens", "4", "--json"])
    n_ids = len(json.loads(child.stdout.splitlines()[-1])["ids"])
    if not 0 < n_ids <= 4:
        raise RuntimeError(f"{n_ids} tokens came out")
    result.add(f"load and generate {n_ids} tokens", "s", [child.seconds])
    result.add("peak memory of that", "GB", [child.peak_bytes / 1e9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--note", action="append", default=[], help="a circumstance to keep with the result")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    for key in options.only:
        case = CASES[key]
        result = Result(f"convert-{key}", f"Conversion to 4 bits: {case.name}", notes=list(options.note))
        with tempfile.TemporaryDirectory(prefix="convert-", dir=options.workdir) as made:  # nothing else is removed
            measure(case, Path(made), options.tokenizer, result, repeat=options.repeat)
        result.save()


if __name__ == "__main__":
    main()
