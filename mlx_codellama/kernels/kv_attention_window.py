"""Attention of new queries over the first tokens and a window of the last ones."""

from __future__ import annotations

from typing import NamedTuple, cast

import mlx.core as mx

from mlx_codellama.kernels import kv_attention as floats
from mlx_codellama.kernels import kv_attention_rows as packed
from mlx_codellama.kernels.dispatch import backend, record
from mlx_codellama.kernels.gpu import kv_attention as gpu
from mlx_codellama.kernels.packed_kv import RowFormat

SCORES_BYTES = 32 * 2**20  # of the float32 scores [B, H, L, T] that one block of queries may make
NO_RING = 2**30  # as a number: larger than any storage


class Window(NamedTuple):
    """Where in storage the keys lie that a query sees. Counted in places; a place holds one token.

    sinks  the first places; later queries see all of them
    size   how many keys of the other places a query sees: its own and those read before it
    own    place of the first query's own key
    ring   None where places follow positions. Else the places after the sinks are a ring of so many: a key read
           `ring` tokens after another lies where that one lay
    """

    sinks: int
    size: int
    own: int
    ring: int | None = None

    def numbers(self) -> tuple[int, int, int, int]:
        """For kernels: sinks, size, own, ring."""
        return self.sinks, self.size, self.own, NO_RING if self.ring is None else self.ring

    def seen(self, length: int, n_places: int, *, first: int = 0) -> mx.array:
        """bool [length, n_places]: what each query from the one numbered `first` on sees. See `reference`."""
        sinks, size, start, ring = self.numbers()
        own = start + first + mx.arange(length)[:, None]
        own = mx.where(own < sinks + ring, own, own - ring)
        place = mx.arange(n_places)
        return ((place <= own) & ((place < sinks) | (place > own - size))) | (place > own + ring - size)


def reference(q: mx.array, k: mx.array, v: mx.array, window: Window, *, scale: float) -> mx.array:
    """Attend L new queries to those of the keys in T places that each sees.

    q     [B, H, L, D]  float16 | bfloat16 | float32
    k, v  [B, K, T, D]  query head h reads kv head h // (H // K); the queries' own keys are among them
    The query whose own key lies at place p sees place t
      t ≤ p  if t < sinks or t > p - size                               sinks 1, size 2, own 3, no ring: 1 0 1 1 0
      t > p  if t > p + ring - size: older keys, behind it in the ring                                  1 0 0 1 1
    A ring needs ring - size ≥ L - 1, or the first query's keys would be gone: its places are taken by later ones.
    → [B, H, L, D] in q.dtype, accumulated in float32. Shown in tests/kernels/test_kv_attention_window.py.
    """
    n_rep = q.shape[1] // k.shape[1]
    wide_k = mx.repeat(k.astype(mx.float32), n_rep, axis=1)
    wide_v = mx.repeat(v.astype(mx.float32), n_rep, axis=1)
    scores = scale * q.astype(mx.float32) @ wide_k.swapaxes(-1, -2)  # [B, H, L, T]
    seen = window.seen(q.shape[2], k.shape[2])
    return (mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1) @ wide_v).astype(q.dtype)


def reference_rows(
    q: mx.array, rows: mx.array, fmt: RowFormat, window: tuple[int, int, int, int | None], *, scale: float
) -> mx.array:
    """`reference` over the values that packed rows uint32 [B, K, T, fmt.words] stand for. window: a Window's fields."""
    return reference(q, *fmt.unpack(rows), Window(*window), scale=scale)


def kv_attention_window(q: mx.array, k: mx.array, v: mx.array, window: Window, *, scale: float) -> mx.array:
    """`reference`, by the fastest path of this machine. Raises ValueError where queries and places do not fit."""
    _check(q, k.shape[2], window)
    if ops := floats.native_heads(q.shape[3]):
        record("kv_attention_window", "native")
        return cast(mx.array, ops.kv_attention(q, k, v, scale=scale, window=window.numbers()))
    record("kv_attention_window", "mlx.fast")
    return _masked(q, k, v, window, scale=scale)


def kv_attention_window_rows(
    q: mx.array, rows: mx.array, fmt: RowFormat, window: Window, *, total: int, scale: float
) -> mx.array:
    """`reference_rows` over the first `total` rows, by the fastest path of this machine. Raises ValueError."""
    packed.check(q, rows, fmt, total)
    _check(q, total, window)
    numbers = window.numbers()
    found = gpu.kv_attention_rows(
        q, rows, fmt, scale=scale, offset=total - q.shape[2], window=numbers, seen=window.seen, reference=reference_rows
    )
    if found is not None:
        return found
    if ops := floats.native_heads(q.shape[3]):
        record("kv_attention_window", "native")
        bits = {"k_bits": fmt.k_bits, "v_bits": fmt.v_bits}
        offset = total - q.shape[2]
        return cast(mx.array, ops.kv_attention_rows(q, rows, **bits, scale=scale, offset=offset, window=numbers))
    record("kv_attention_window", "mlx")
    k, v = fmt.unpack(rows[:, :, :total], mx.float32 if backend() == "cpu" else q.dtype)
    return _masked(q, k, v, window, scale=scale)


def _masked(q: mx.array, k: mx.array, v: mx.array, window: Window, *, scale: float) -> mx.array:
    """MLX's own attention under a mask, in blocks of queries whose scores take at most SCORES_BYTES."""
    wide = mx.float32 if backend() == "cpu" else q.dtype  # MLX's CPU path would accumulate in 16 bits
    k, v = k.astype(wide), v.astype(wide)
    b, heads, length, _ = q.shape
    block = max(1, SCORES_BYTES // (4 * b * heads * k.shape[2]))
    parts = []
    for start in range(0, length, block):
        part = q[:, :, start : start + block].astype(wide)
        seen = window.seen(part.shape[2], k.shape[2], first=start)
        parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=seen).astype(q.dtype))
        if block < length:
            mx.eval(parts[-1])  # or MLX would allocate the scores of all blocks ahead
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _check(q: mx.array, total: int, window: Window) -> None:
    length, (sinks, size, own, ring) = q.shape[2], window.numbers()
    if not (0 <= own < min(total, sinks + ring) and ring - size >= length - 1):
        raise ValueError(f"{length} queries do not fit {window}")
    if own + length > total and not (own >= sinks and total == sinks + ring):
        raise ValueError(f"{total} places do not hold the keys of {length} queries in {window}")
