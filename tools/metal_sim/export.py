"""Write the Metal source of every kernel in the catalogue as MLX generates it: `python tools/metal_sim/export.py DIR`.

Nothing is run, so any machine will do. On a Mac each file then goes through Apple's compiler:
    xcrun -sdk macosx metal -fno-fast-math -I $(python tools/metal_sim/export.py --include) -c DIR/x.metal -o x.air
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_codellama  # before mlx
from metal_sim.simulator import PRELUDE, Traced, mlx_headers, recorded
from mlx_codellama.kernels.gpu import catalogue


def sources() -> dict[str, Traced]:
    """Every kernel that the catalogue's self-tests launch, by its generated name."""
    with recorded() as simulation:
        for entry in catalogue.entries("metal"):
            entry.selftest()
    return simulation.traced


def write(folder: Path) -> list[Path]:
    """One file for each kernel, numbered; the generated name stands inside."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (name, traced) in enumerate(sorted(sources().items())):
        file = folder / f"{number:03d}-{name.removeprefix('custom_kernel_').partition('__')[0]}.metal"
        file.write_text(f"// {name}\n{PRELUDE}{traced.source}\n", encoding="utf-8")
        written.append(file)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/metal"))
    parser.add_argument("--include", action="store_true", help="print the folder of MLX's Metal headers instead")
    given = parser.parse_args()
    if given.include:
        print(mlx_headers())
        return
    files = write(given.folder)
    print(f"{len(files)} kernels of mlx_codellama {mlx_codellama.__version__} in {given.folder}")


if __name__ == "__main__":
    main()
