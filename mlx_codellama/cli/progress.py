"""How far a long command is: a bar on a terminal, a line every few seconds anywhere else. Always on stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from mlx_codellama.cli import output
from mlx_codellama.errors import printable

EVERY_S = 10.0


class BytesDone(Protocol):
    """What a conversion reports: weights.Progress, for one."""

    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def elapsed_s(self) -> float: ...


def line(at: BytesDone) -> str:
    """`3.20 of 13.5 GB, 24 %, 412 MB/s, 25 s left`."""
    rate = at.done_bytes / at.elapsed_s if at.elapsed_s > 0 else 0.0
    left = (at.total_bytes - at.done_bytes) / rate if rate else math.inf
    share = 100 * at.done_bytes / at.total_bytes if at.total_bytes else 100.0
    size = output.bytes_text
    return (
        f"{size(at.done_bytes)} of {size(at.total_bytes)}, {share:.0f} %, {size(rate)}/s, {output.time_text(left)} left"
    )


@contextmanager
def bytes_progress(verb: str) -> Iterator[Callable[[BytesDone], None]]:
    """Yields a callback to hand to a conversion."""
    if not output.can_redraw():
        yield _plain(verb, time.monotonic)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[tensor]}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None, tensor="")

        def show(at: BytesDone) -> None:
            bar.update(task, total=at.total_bytes, completed=at.done_bytes, tensor=printable(at.name)[-40:])

        yield show


def _plain(verb: str, clock: Callable[[], float]) -> Callable[[BytesDone], None]:
    last = clock()

    def show(at: BytesDone) -> None:
        nonlocal last
        if clock() - last >= EVERY_S:
            last = clock()
            output.say(f"{verb}: {line(at)}")

    return show
