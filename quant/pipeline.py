"""Quantise a stream of tensors between source and file: blocks of rows in, blocks of packed rows out.

Memory does not grow with the model: at most 2 · workers pieces of PIECE_BYTES are in flight, besides the block that
the source holds. Rows are independent, so the result is bit for bit that of `mx.quantize` on the whole tensor.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_codellama.config import ModelArgs, QuantArgs, Quantization
from mlx_codellama.errors import ConfigError
from mlx_codellama.quant.affine import dequantize, quantize
from mlx_codellama.quant.plan import SizeReport, describe, predict
from mlx_codellama.quant.report import ErrorSums
from mlx_codellama.weights.specs import Block, Stream, TensorSpec

PIECE_BYTES = 8 * 2**20
MEASURED = 32  # every 32nd row of a piece is measured


def apply(quantization: Quantization | None, stream: Stream, *, workers: int | None = None) -> Stream:
    """The same model, with the weights that `quantization` names quantised; other tensors pass through unchanged.

    quantization  None returns the stream itself
    workers       threads, each with its own CPU stream; default: one per core, at most 4. We quantise on the CPU on
                  every machine: it keeps up with a disk, and the same source gives the same bytes everywhere.
    After blocks() is exhausted, record["quantization"] holds sizes and the error measured on every 32nd row.
    Raises ConfigError if the source is already quantised or the quantisation does not fit the model.
    """
    if quantization is None:
        return stream
    if stream.args.quantization is not None:
        raise ConfigError(
            f"the source is already quantised ({describe(stream.args.quantization.default)})",
            hint="start from the 16-bit release: quantising twice adds the errors up",
        )
    dtypes = {spec.name: spec.dtype for spec in stream.specs}
    size = predict(stream.args, quantization, dtypes=dtypes)
    return QuantizedStream(stream, quantization, size, workers or min(4, os.cpu_count() or 1))


class QuantizedStream:
    """What `apply` returns. specs: for each weight its packed words, scales and biases, in the model's order."""

    def __init__(self, source: Stream, quantization: Quantization, size: SizeReport, workers: int) -> None:
        self.args: ModelArgs = source.args.with_quantization(quantization)
        self.specs: list[TensorSpec] = [spec for tensor in size.tensors for spec in tensor.specs]
        self.size = size
        self._source, self._workers = source, workers
        self._errors: dict[str, ErrorSums] = {}

    @property
    def files(self) -> dict[str, Path]:
        return self._source.files

    @property
    def total_bytes(self) -> int:
        return self._source.total_bytes

    @property
    def done_bytes(self) -> int:
        return self._source.done_bytes

    @property
    def record(self) -> dict[str, Any]:
        """The source's provenance and, once blocks() is exhausted, the error of each quantised tensor."""
        errors = {name: sums.result().to_dict() for name, sums in self._errors.items()}
        cost = {**self.size.to_dict(), "measured_rows": f"every {MEASURED}nd of a piece", "tensor_errors": errors}
        return {**self._source.record, "quantization": cost}

    def blocks(self) -> Iterator[Block]:
        """Blocks in the source's order. A quantised piece gives weight, scales and biases, all with the same start."""
        plan = {t.name: t.quant for t in self.size.tensors}
        names = {t.name: tuple(spec.name for spec in t.specs) for t in self.size.tensors}
        errors = self._errors = {}
        waiting: deque[tuple[Block, Future[_Result] | None]] = deque()

        def finish() -> Iterator[Block]:
            piece, future = waiting.popleft()
            if future is None:
                yield piece
                return
            arrays, sums = future.result()
            errors.setdefault(piece.name, ErrorSums()).add(sums)
            for name, array in zip(names[piece.name], arrays, strict=True):
                yield Block(name, piece.start, array)

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="quantise")
        try:
            for block in self._source.blocks():
                quant = plan[block.name]
                mx.eval(block.array)
                for piece in _pieces(block) if quant else [block]:
                    waiting.append((piece, pool.submit(_run, piece.array, quant) if quant else None))
                    while len(waiting) > 2 * self._workers:
                        yield from finish()
                del block, piece
            while waiting:
                yield from finish()
        finally:
            pool.shutdown(cancel_futures=True)


_Result = tuple[tuple[mx.array, ...], ErrorSums]
_thread = threading.local()


def _pieces(block: Block) -> Iterator[Block]:
    rows = max(1, PIECE_BYTES // (block.array.nbytes // len(block.array)))
    for first in range(0, len(block.array), rows):
        piece = block.array[first : first + rows]
        mx.eval(piece)  # evaluate here: a lazy slice needs this thread's stream, which workers do not have
        yield Block(block.name, block.start + first, piece)


def _run(piece: mx.array, quant: QuantArgs) -> _Result:
    """Quantise one piece [rows, I] on this thread's stream and measure a few of its rows."""
    if not hasattr(_thread, "stream"):
        _thread.stream = mx.new_stream(mx.cpu)
    with mx.stream(_thread.stream):
        arrays = quantize(piece, quant)
        mx.eval(*arrays)
        sums = ErrorSums()
        sums.measure(piece[::MEASURED], dequantize(tuple(a[::MEASURED] for a in arrays), quant))
    return arrays, sums
