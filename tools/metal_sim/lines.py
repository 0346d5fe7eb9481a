"""Addresses in a compiled kernel → lines of its source, from the DWARF line table."""

from __future__ import annotations

import bisect
import functools
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile


def _mapped(library: Path) -> tuple[int, int]:
    """Where this process has the library: first address, end."""
    parts = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(library)):
            parts += [int(word, 16) for word in line.split()[0].split("-")]
    return (min(parts), max(parts)) if parts else (0, 0)


@functools.lru_cache(maxsize=64)
def _table(library: Path) -> list[tuple[int, str, int]]:
    """(first address, file, line), sorted."""
    rows: list[tuple[int, str, int]] = []
    with library.open("rb") as stream:
        elf = ELFFile(stream)
        if not elf.has_dwarf_info():
            return rows
        dwarf = elf.get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            first = 0 if program.header.version >= 5 else 1
            names = [entry.name.decode() for entry in program.header.file_entry]
            states: list[Any] = [entry.state for entry in program.get_entries() if entry.state is not None]
            for state in states:
                file = names[state.file - first] if 0 <= state.file - first < len(names) else ""
                rows.append((state.address, "" if state.end_sequence else file, state.line))
    return sorted(rows, key=lambda row: row[0])


def line_of(library: Path, return_address: int | None) -> tuple[str, int]:
    """(file's name, line) of the instruction before an address; ("", 0) where the library does not have it."""
    first, end = _mapped(library)
    if return_address is None or not first < return_address <= end:
        return "", 0
    table = _table(library)
    row = bisect.bisect_right(table, return_address - first - 1, key=lambda entry: entry[0]) - 1
    if row < 0:
        return "", 0
    _, file, line = table[row]
    return file.rsplit("/", 1)[-1], line
