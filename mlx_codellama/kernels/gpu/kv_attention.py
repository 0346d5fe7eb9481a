"""Decode attention over packed rows on the GPU: which kernel, on what grid.

The kernels read each cached byte once per tile of query rows and write at most 64 blocks of float32 partial rows,
which `kv_attention_merge` joins. `lanes` reduces every score over a few lanes: 8 instructions per cached value at
four query rows, and too many at eight. `tiles` multiplies 8 x 8 matrices: 11 per value at eight rows.

Blocks begin at absolute multiples of 256 tokens, and their size follows from the number of tokens and kv heads alone.
Rows may lie in several segments, which end anywhere: a block crosses their borders, so the bits of a result do not
depend on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import selftest, trust
from mlx_codellama.kernels.gpu.kernel import Kernel, one_float, type_name, whole_numbers
from mlx_codellama.kernels.packed_kv import RowFormat

MOST_QUERIES = 8  # tokens of one step; more is a prefill, for which unpacking a layer is cheaper
MOST_BLOCKS = 64  # float32 partials of more would cost a tenth of a 4-bit cache's bytes and above
BLOCK_TOKENS = 256  # blocks are multiples of it; fewer tokens are not worth a threadgroup
MOST_SEGMENTS = 6  # that a kernel reads where they lie
NEVER = 2**30  # as the first token of a segment that is not there
THREADGROUPS = {"metal": 512, "cuda": 1024}  # enough for every core of the largest chips several times over
PIECE_BYTES = 256 * 2**20  # of K and V that a prefill unpacks at once
LANES_PER_ROW = {32: 4, 64: 8, 128: 8, 256: 16}  # by head size; 8 or 16 values per lane

Places = tuple[int, int, int, int]
Piece = tuple[mx.array, int]  # rows [B, K, capacity, words], and how many of them count
Seen = Callable[..., mx.array]

_PARTIALS = ("part_o", "part_m", "part_l")
_INPUTS = ("q", "rows", "dims", "scale")
LANES = Kernel("kv_attention_rows", "kv_attention_lanes", _INPUTS, _PARTIALS)
TILES = Kernel("kv_attention_tiles", "kv_attention_tiles", _INPUTS, _PARTIALS)
MMA = Kernel("kv_attention_mma", "kv_attention_mma", _INPUTS, _PARTIALS)
_PIECES = ("q", "rows", *(f"rows_{i}" for i in range(1, MOST_SEGMENTS)), "dims", "scale")
OF_SEGMENTS = {
    kernel: Kernel(kernel.file, f"{kernel.name}_segments", _PIECES, _PARTIALS) for kernel in (LANES, TILES, MMA)
}
MERGE = Kernel("kv_attention_rows", "kv_attention_merge", (*_PARTIALS, "dims"), ("out",))


class Plan(NamedTuple):
    """One way to run: a kernel, and what its text is specialised for."""

    kernel: Kernel
    language: str
    dtype: mx.Dtype
    fmt: RowFormat
    tile_rows: int  # query rows of a threadgroup
    simdgroups: int
    steps: int  # tokens that a slot of lanes, or tiles of tokens that a simdgroup, takes at once
    window: bool = False  # whether the places are a window's, of which a query does not see all
    segments: bool = False  # whether the rows lie in several pieces

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (OF_SEGMENTS[self.kernel] if self.segments else self.kernel, MERGE)

    @property
    def label(self) -> str:
        """Names the compiled kernel in verdicts and warnings."""
        fmt = f"D{self.fmt.head_dim}, K{self.fmt.k_bits} V{self.fmt.v_bits}"
        window = ", window" if self.window else ""
        return f"{self.kernels[0].name}<{type_name(self.dtype)}, {fmt}, {self.tile_rows} rows{window}>"

    @property
    def template(self) -> dict[str, int | mx.Dtype]:
        fmt = self.fmt
        known: dict[str, int | mx.Dtype] = {"T": self.dtype, "D": fmt.head_dim, "KB": fmt.k_bits, "VB": fmt.v_bits}
        known |= {"U": self.steps, "NSG": self.simdgroups, "WINDOW": int(self.window)}
        if self.kernel is LANES:
            known |= {"GS": fmt.group_size, "R": self.tile_rows, "LPR": LANES_PER_ROW[fmt.head_dim]}
        elif self.kernel is TILES:
            known |= {"M": self.tile_rows // 8}
        return known


@dispatch.remembered
def plan(
    language: str,
    dtype: mx.Dtype,
    fmt: RowFormat,
    n_rows: int,
    window: bool = False,
    *,
    segments: bool = False,
    matrices: bool = True,
) -> Plan | None:
    """How to attend with n_rows = (H / K)·L query rows of each kv head; None where no kernel fits the head size.

    matrices  False leaves out CUDA's matrix products, whose 11 bits are not enough for float32 and which sm_75 lacks
    """
    if fmt.head_dim not in LANES_PER_ROW:
        return None
    widest = max(fmt.k_bits, fmt.v_bits)
    if n_rows > 4 and language == "cuda" and fmt.head_dim in (64, 128) and dtype != mx.float32 and matrices:
        return Plan(MMA, language, dtype, fmt, 16, 4, 2 if widest < 16 else 1, window, segments)
    if n_rows > 4 and language == "metal" and fmt.head_dim in (64, 128):
        tile_rows = 8 if n_rows <= 8 else 16
        return Plan(
            TILES, language, dtype, fmt, tile_rows, 4, 2 if tile_rows == 8 and widest < 16 else 1, window, segments
        )
    tile_rows = min(n_rows, 4)  # with more, queries and sums of 128 values leave the registers
    simdgroups = 8 if tile_rows * fmt.head_dim <= 512 else 4
    return Plan(LANES, language, dtype, fmt, tile_rows, simdgroups, 4 if widest < 16 else 2, window, segments)


def block_tokens(language: str, n_heads: int, n_tokens: int) -> int:
    """Tokens of a block, a multiple of 256: blocks of n_heads = B·K heads fill the device, at most 64 of a head."""
    wanted = min(math.ceil(THREADGROUPS[language] / n_heads), MOST_BLOCKS)
    return BLOCK_TOKENS * math.ceil(n_tokens / (BLOCK_TOKENS * wanted))


def attend(
    plan: Plan,
    q: mx.array,
    rows: mx.array,
    *,
    scale: float,
    offset: int,
    window: Places | None = None,
    later: Sequence[tuple[mx.array, int]] = (),
    blocks: int | None = None,
) -> mx.array:
    """kv_attention_rows by a plan, over the first offset + L rows; `blocks` for tests, else by `block_tokens`.

    window  (sinks, size, own, ring) where the plan has one, as kernels/kv_attention_window.py says
    later   where the plan has segments: up to five arrays of rows after `rows`, each with the place of its first token
            among all; `rows` holds those before them
    """
    b, h, length, d = q.shape
    n_kv, capacity = rows.shape[1:3]
    n_tokens, n_rows = offset + length, h // n_kv * length
    tiles = -(-n_rows // plan.tile_rows)
    chunk = block_tokens(plan.language, b * n_kv, n_tokens)
    if blocks is not None:
        chunk = math.ceil(n_tokens / blocks / 8) * 8
    blocks = blocks or math.ceil(n_tokens / chunk)
    n = b * n_kv * n_rows
    numbers, pieces = [n_tokens, length, capacity, n_rows, tiles, chunk, *(window or ())], [rows]
    if plan.segments:
        absent = MOST_SEGMENTS - 1 - len(later)
        pieces += [array for array, _ in later] + [rows] * absent
        for array, first in later:
            numbers += (first, array.shape[2])
        numbers += [NEVER, 0] * absent
    partials = plan.kernels[0](
        plan.language,
        [q, *pieces, whole_numbers(*numbers), one_float(scale * math.log2(math.e))],
        template=plan.template,
        grid=(32, plan.simdgroups * blocks, b * n_kv * tiles),
        threadgroup=(32, plan.simdgroups, 1),
        shapes=[(n, blocks, d), (n, blocks), (n, blocks)],
        dtypes=[mx.float32] * 3,
    )
    (out,) = MERGE(
        plan.language,
        [*partials, whole_numbers(blocks)],
        template={"T": plan.dtype, "D": d},
        grid=(d, n, 1),
        threadgroup=(d, 1, 1),
        shapes=[q.shape],
        dtypes=[plan.dtype],
    )
    return out


def kv_attention_rows(
    q: mx.array,
    rows: mx.array,
    fmt: RowFormat,
    *,
    scale: float,
    offset: int,
    reference: Callable[..., mx.array],
    window: Places | None = None,
    seen: Seen | None = None,
) -> mx.array | None:
    """`reference` by this device's kernels, or None where there is none for it or it is not trusted.

    More than eight queries are a prefill: see `prefill`. window and seen: a Window's numbers and its mask, as
    kernels/kv_attention_window.py has them; `reference` is then the one of a window. Raises BackendError instead of
    None where MLX_CODELLAMA_REQUIRE names a GPU backend.
    """
    language = dispatch.backend()
    if language == "cpu":
        return None
    length = q.shape[2]
    if length > MOST_QUERIES:
        name = "kv_attention_rows" if window is None else "kv_attention_window"
        dispatch.record(name, "mlx.fast over unpacked rows")
        return prefill(language, q, [(rows, offset + length)], fmt, scale=scale, offset=offset, seen=seen)
    n_rows = q.shape[1] // rows.shape[1] * length
    chosen = plan(language, q.dtype, fmt, n_rows, window is not None)
    if chosen is None:
        trust.refuse(language, f"kv_attention_rows has no kernel for heads of {fmt.head_dim}")
        return None
    usable = _usable(chosen, n_rows, reference)
    if usable is None:
        return None
    dispatch.record("kv_attention_rows" if window is None else "kv_attention_window", language)
    return attend(usable, q, rows, scale=scale, offset=offset, window=window)


def kv_attention_segments(
    q: mx.array, pieces: Sequence[Piece], fmt: RowFormat, *, scale: float, reference: Callable[..., mx.array]
) -> mx.array | None:
    """Attention over packed rows in several pieces, the last L tokens of which are q's own; None as above.

    More than six pieces cost a copy of the shortest neighbours. `reference` is that of kv_attention_rows.
    """
    language = dispatch.backend()
    if language == "cpu":
        return None
    length, n_tokens = q.shape[2], sum(n for _, n in pieces)
    if length > MOST_QUERIES:
        dispatch.record("kv_attention_segments", "mlx.fast over unpacked rows")
        return prefill(language, q, pieces, fmt, scale=scale, offset=n_tokens - length)
    n_rows = q.shape[1] // pieces[0][0].shape[1] * length
    chosen = plan(language, q.dtype, fmt, n_rows, segments=True)
    if chosen is None:
        trust.refuse(language, f"kv_attention_segments has no kernel for heads of {fmt.head_dim}")
        return None
    usable = _usable(chosen, n_rows, reference)
    if usable is None:
        return None
    dispatch.record("kv_attention_segments", language)
    pieces = few(pieces)
    later, first = [], 0
    for (_, n), (array, _) in itertools.pairwise(pieces):
        first += n
        later.append((array, first))
    return attend(usable, q, pieces[0][0], scale=scale, offset=n_tokens - length, later=later)


def few(pieces: Sequence[Piece]) -> list[Piece]:
    """The same tokens in at most six pieces: of more, the neighbours with the fewest tokens are joined."""
    groups = [[piece] for piece in pieces]
    while len(groups) > MOST_SEGMENTS:
        sizes = [sum(n for _, n in a + b) for a, b in itertools.pairwise(groups)]
        at = sizes.index(min(sizes))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return [(joined(group), sum(n for _, n in group)) if len(group) > 1 else group[0] for group in groups]


def joined(pieces: Sequence[Piece], heads: slice = slice(None)) -> mx.array:
    """The rows that count, of some kv heads, in one array; not copied where there is one piece."""
    parts = [array[:, heads, :n] for array, n in pieces]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _usable(chosen: Plan, n_rows: int, reference: Callable[..., mx.array]) -> Plan | None:
    """The plan, or the one that stands in where CUDA's matrix products do not run; None where neither is trusted."""
    check = selftest.window_error if chosen.window else selftest.attention_error
    if chosen.segments:
        check = selftest.segments_error

    def tried(plan: Plan) -> Callable[[], float]:
        return lambda: check(plan.fmt, plan.dtype, plan.tile_rows, reference, bound(plan))

    if chosen.kernel is MMA and not trust.known_good(chosen, tried(chosen)):
        how = {"segments": chosen.segments, "matrices": False}
        other = plan(chosen.language, chosen.dtype, chosen.fmt, n_rows, chosen.window, **how)
        assert other is not None
        chosen = other
    return chosen if trust.trusted(chosen, tried(chosen)) else None


def bound(plan: Plan) -> Callable[..., mx.array]:
    """`attend` with its plan and the scale of self-tests filled in."""
    return lambda q, rows, **how: attend(plan, q, rows, scale=selftest.SCALE, **how)


def prefill(
    language: str,
    q: mx.array,
    pieces: Sequence[Piece],
    fmt: RowFormat,
    *,
    scale: float,
    offset: int,
    seen: Seen | None = None,
) -> mx.array:
    """Attend many queries by MLX's fused attention over rows unpacked to q's dtype, a few kv heads at a time.

    Memory above q and the result: PIECE_BYTES of unpacked K and V, or one kv head where that is more, and the
    temporaries of unpacking them. Where MLX has no fused kernel for the head size, queries are taken in blocks whose
    scores stay within PIECE_BYTES as well.
    """
    b, h, length, d = q.shape
    n_kv, n_tokens = pieces[0][0].shape[1], offset + length
    n_rep = h // n_kv
    step = max(1, PIECE_BYTES // (2 * b * n_tokens * d * q.dtype.size))  # kv heads
    block = length
    if not _fused(language, q.dtype, d):
        step = 1
        block = max(1, min(length, PIECE_BYTES // (4 * b * n_rep * n_tokens)))
    parts = []
    for first in range(0, n_kv, step):
        k, v = fmt.unpack(joined(pieces, slice(first, first + step)), q.dtype)
        mine = q[:, first * n_rep : (first + step) * n_rep]
        blocks = []
        for start in range(0, length, block):
            some = mine[:, :, start : start + block]
            end = offset + start + some.shape[2] if seen is None else n_tokens
            mask: mx.array | str | None = "causal" if some.shape[2] > 1 else None
            if seen is not None:
                mask = seen(some.shape[2], n_tokens, first=start)
            blocks.append(
                mx.fast.scaled_dot_product_attention(some, k[:, :, :end], v[:, :, :end], scale=scale, mask=mask)
            )
        parts.append(blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2))
        if step < n_kv:
            mx.eval(parts[-1])  # one piece at a time, or the graph would hold them all
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _fused(language: str, dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX attends without writing the scores: its steel kernels on Metal, cuDNN's on CUDA."""
    if language == "metal":
        return head_dim in (64, 80, 128)
    return dtype != mx.float32 and head_dim % 8 == 0 and head_dim <= 128
