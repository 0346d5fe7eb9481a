"""Addresses in a compiled kernel → lines of its source, from the DWARF line table."""

from __future__ import annotations

import bisect
import functools
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile


def _base(library: Path) -> int:
    """Where this process has mapped the library."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(str(library)):
            return int(line.split("-")[0], 16)
    raise LookupError(f"{library} is not mapped")


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


def line_of(library: Path, return_address: int) -> tuple[str, int]:
    """(file's name, line) of the instruction before an address; ("", 0) where nothing is known."""
    table = _table(library)
    at = return_address - _base(library) - 1
    if not table or at < table[0][0]:
        return "", 0
    _, file, line = table[bisect.bisect_right(table, at, key=lambda row: row[0]) - 1]
    return file.rsplit("/", 1)[-1], line
