"""Decode attention over packed rows on the GPU: which kernel, on what grid.

Both kernels read each cached byte once per tile of query rows and write at most 64 blocks of float32 partial rows,
which `kv_attention_merge` joins. `lanes` reduces every score over a few lanes: 8 instructions per cached value at
four query rows, and too many at eight. `tiles` multiplies 8 x 8 matrices: 11 per value at eight rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import selftest, trust
from mlx_codellama.kernels.gpu.kernel import Kernel, one_float, type_name, whole_numbers
from mlx_codellama.kernels.packed_kv import RowFormat

MOST_QUERIES = 8  # tokens of one step; more is a prefill, for which unpacking a layer is cheaper
MOST_BLOCKS = 64  # float32 partials of more would cost a tenth of a 4-bit cache's bytes and above
BLOCK_TOKENS = 256  # a block of fewer is not worth a threadgroup
THREADGROUPS = {"metal": 512, "cuda": 1024}  # enough for every core of the largest chips several times over
PIECE_BYTES = 256 * 2**20  # of K and V that a prefill unpacks at once
LANES_PER_ROW = {32: 4, 64: 8, 128: 8, 256: 16}  # by head size; 8 or 16 values per lane

Places = tuple[int, int, int, int]
Seen = Callable[..., mx.array]

_PARTIALS = ("part_o", "part_m", "part_l")
_INPUTS = ("q", "rows", "dims", "scale")
LANES = Kernel("kv_attention_rows", "kv_attention_lanes", _INPUTS, _PARTIALS)
TILES = Kernel("kv_attention_tiles", "kv_attention_tiles", _INPUTS, _PARTIALS)
MMA = Kernel("kv_attention_mma", "kv_attention_mma", _INPUTS, _PARTIALS)
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

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (self.kernel, MERGE)

    @property
    def label(self) -> str:
        """Names the compiled kernel in verdicts and warnings."""
        fmt = f"D{self.fmt.head_dim}, K{self.fmt.k_bits} V{self.fmt.v_bits}"
        window = ", window" if self.window else ""
        return f"{self.kernel.name}<{type_name(self.dtype)}, {fmt}, {self.tile_rows} rows{window}>"

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


def plan(
    language: str, dtype: mx.Dtype, fmt: RowFormat, n_rows: int, window: bool = False, *, matrices: bool = True
) -> Plan | None:
    """How to attend with n_rows = (H / K)·L query rows of each kv head; None where no kernel fits the head size.

    matrices  False leaves out CUDA's matrix products, whose 11 bits are not enough for float32 and which sm_75 lacks
    """
    if fmt.head_dim not in LANES_PER_ROW:
        return None
    widest = max(fmt.k_bits, fmt.v_bits)
    if n_rows > 4 and language == "cuda" and fmt.head_dim in (64, 128) and dtype != mx.float32 and matrices:
        return Plan(MMA, language, dtype, fmt, 16, 4, 2 if widest < 16 else 1, window)
    if n_rows > 4 and language == "metal" and fmt.head_dim in (64, 128):
        tile_rows = 8 if n_rows <= 8 else 16
        return Plan(TILES, language, dtype, fmt, tile_rows, 4, 2 if tile_rows == 8 and widest < 16 else 1, window)
    tile_rows = min(n_rows, 4)  # with more, queries and sums of 128 values leave the registers
    simdgroups = 8 if tile_rows * fmt.head_dim <= 512 else 4
    return Plan(LANES, language, dtype, fmt, tile_rows, simdgroups, 4 if widest < 16 else 2, window)


def n_blocks(language: str, n_heads: int, n_tokens: int) -> int:
    """Blocks of tokens for each of n_heads = B·K·tiles: enough threadgroups for the device, at most 64."""
    wanted = math.ceil(THREADGROUPS[language] / n_heads)
    return max(1, min(wanted, math.ceil(n_tokens / BLOCK_TOKENS), MOST_BLOCKS))


def attend(
    plan: Plan,
    q: mx.array,
    rows: mx.array,
    *,
    scale: float,
    offset: int,
    window: Places | None = None,
    blocks: int | None = None,
) -> mx.array:
    """kv_attention_rows by a plan, over the first offset + L rows; `blocks` for tests, else by `n_blocks`.

    window  (sinks, size, own, ring) where the plan has one, as kernels/kv_attention_window.py says
    """
    b, h, length, d = q.shape
    n_kv, capacity = rows.shape[1:3]
    n_tokens, n_rows = offset + length, h // n_kv * length
    tiles = -(-n_rows // plan.tile_rows)
    blocks = blocks or n_blocks(plan.language, b * n_kv * tiles, n_tokens)
    n = b * n_kv * n_rows
    partials = plan.kernel(
        plan.language,
        [
            q,
            rows,
            whole_numbers(n_tokens, length, capacity, n_rows, tiles, *(window or ())),
            one_float(scale * math.log2(math.e)),
        ],
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
        return prefill(language, q, rows, fmt, scale=scale, offset=offset, seen=seen)
    n_rows = q.shape[1] // rows.shape[1] * length
    chosen = plan(language, q.dtype, fmt, n_rows, window is not None)
    if chosen is None:
        trust.refuse(language, f"kv_attention_rows has no kernel for heads of {fmt.head_dim}")
        return None
    check = selftest.attention_error if window is None else selftest.window_error

    def tried(plan: Plan) -> Callable[[], float]:
        return lambda: check(fmt, q.dtype, plan.tile_rows, reference, bound(plan))

    if chosen.kernel is MMA and not trust.known_good(chosen, tried(chosen)):
        chosen = plan(language, q.dtype, fmt, n_rows, window is not None, matrices=False)
        assert chosen is not None
    if not trust.trusted(chosen, tried(chosen)):
        return None
    dispatch.record("kv_attention_rows" if window is None else "kv_attention_window", language)
    return attend(chosen, q, rows, scale=scale, offset=offset, window=window)


def bound(plan: Plan) -> Callable[..., mx.array]:
    """`attend` with its plan and the scale of self-tests filled in."""
    return lambda q, rows, **how: attend(plan, q, rows, scale=selftest.SCALE, **how)


def prefill(
    language: str, q: mx.array, rows: mx.array, fmt: RowFormat, *, scale: float, offset: int, seen: Seen | None = None
) -> mx.array:
    """Attend many queries by MLX's fused attention over rows unpacked to q's dtype, a few kv heads at a time.

    Memory above q and the result: PIECE_BYTES of unpacked K and V, or one kv head where that is more, and the
    temporaries of unpacking them. Where MLX has no fused kernel for the head size, queries are taken in blocks whose
    scores stay within PIECE_BYTES as well.
    """
    b, h, length, d = q.shape
    n_kv, n_tokens = rows.shape[1], offset + length
    n_rep = h // n_kv
    step = max(1, PIECE_BYTES // (2 * b * n_tokens * d * q.dtype.size))  # kv heads
    block = length
    if not _fused(language, q.dtype, d):
        step = 1
        block = max(1, min(length, PIECE_BYTES // (4 * b * n_rep * n_tokens)))
    parts = []
    for first in range(0, n_kv, step):
        k, v = fmt.unpack(rows[:, first : first + step, :n_tokens], q.dtype)
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
