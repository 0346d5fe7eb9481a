"""Layers of a decoder, for a few tokens after caches that have room for them: one launch, one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_codellama.config import NATIVE_BITS
from mlx_codellama.kernels import kv_attention, quant_matmul, rms_norm, rope, swiglu
from mlx_codellama.kernels.dispatch import native, record
from mlx_codellama.kernels.packed_kv import LARGEST, RowFormat
from mlx_codellama.kernels.quant_matmul import Packed

MOST_ROWS, MOST_ROWS_EXACT = 8, 4  # tokens, with activations of 15 bits and of float32
_INSIDE = {
    True: ("kv_attention", "rms_norm", "rope", "swiglu"),
    False: ("kv_attention_rows", "rms_norm", "rope_append", "swiglu"),
}


class Products(NamedTuple):
    """Up to three matrices that share their input, affine, alike in format; exact as in kernels/quant_matmul.py."""

    packed: Sequence[Packed]
    group_size: int
    bits: int
    exact: bool


@dataclass(eq=False)
class Weights:
    """Of one layer. Norms are (weight float32 [E], eps). Keep it: the kernel looks through it once."""

    attention_norm: tuple[mx.array, float]
    qkv: Products
    out: Products
    feed_norm: tuple[mx.array, float]
    gate_up: Products
    down: Products
    heads: int
    kv_heads: int

    @functools.cached_property
    def native(self) -> tuple[Any, int, str] | None:
        """For the native kernel: its form of them, the most rows of x, the path's name. None where it does not fit."""
        ops = native()
        products = self.qkv, self.out, self.gate_up, self.down
        if ops is None or any(norm.dtype != mx.float32 for norm, _ in (self.attention_norm, self.feed_norm)):
            return None
        if self.qkv.packed[0][0].shape[0] > kv_attention.NATIVE_WIDTH * self.heads:
            return None
        if not all(p.bits in NATIVE_BITS and all(_alike(one, p) for one in p.packed) for p in products):
            return None
        exact = [p.exact or ops.isa() == "portable" for p in products]
        formats = [(p.group_size, p.bits, 0 if e else quant_matmul.TERMS) for p, e in zip(products, exact, strict=True)]
        packed = [one for p in products for one in p.packed]
        form = ops.decoder_weights(
            self.attention_norm, self.feed_norm, packed, formats, heads=self.heads, kv_heads=self.kv_heads
        )
        if form is None:
            return None
        return form, MOST_ROWS_EXACT if any(exact) else MOST_ROWS, "native" if all(exact) else "native int8"


def _alike(packed: Packed, products: Products) -> bool:
    _, scales, biases = packed
    return biases is not None and scales.dtype == products.packed[0][1].dtype


class Held(NamedTuple):
    """A cache with room for L more tokens: they go to place … place + L - 1, and then total of them count.

    arrays  [B, K, capacity, …]: keys and values as float32 or float16, or packed rows of `fmt`
    Query i sees the first total - L + i + 1 tokens in arrays.
    """

    arrays: list[mx.array]
    place: int
    total: int
    fmt: RowFormat | None


def reference(
    x: mx.array, weights: Weights, cos: mx.array, sin: mx.array, held: Held, *, scale: float
) -> tuple[mx.array, list[mx.array]]:
    """h = x + out(attention(norm(x))), then h + down(swiglu(gate(norm(h)), up(norm(h)))).

    x         float32 [B, L, E], the new tokens
    cos, sin  float32 [L, D/2] for their positions
    → [B, L, E], and the arrays of the cache with the new tokens. Keys are rotated in float32 before they are stored.
    """
    b, l, _ = x.shape

    def times(x: mx.array, products: Products) -> list[mx.array]:
        how = {"group_size": products.group_size, "bits": products.bits, "mode": "affine"}
        return [quant_matmul.reference(x, *packed, **how) for packed in products.packed]  # type: ignore[arg-type]

    q, k, v = times(rms_norm.reference(x, *weights.attention_norm), weights.qkv)
    q, k, v = (
        a.reshape(b, l, n, -1).swapaxes(1, 2)
        for a, n in ((q, weights.heads), (k, weights.kv_heads), (v, weights.kv_heads))
    )
    q, k = rope.reference(q, cos, sin), rope.reference(k, cos, sin)
    if held.fmt is not None:
        new = [held.fmt.pack(k, v)]
    elif held.arrays[0].dtype == mx.float16:
        new = [mx.clip(a, -LARGEST, LARGEST).astype(mx.float16) for a in (k, v)]
    else:
        new = [k, v]
    at, end = held.place, held.place + l
    arrays = [
        mx.concatenate([a[:, :, :at], part, a[:, :, end:]], axis=2) for a, part in zip(held.arrays, new, strict=True)
    ]
    seen = [a[:, :, : held.total] for a in arrays]
    keys, values = held.fmt.unpack(seen[0]) if held.fmt is not None else seen
    out = kv_attention.reference(q, keys, values, scale=scale, offset=held.total - l)
    h = x + times(out.swapaxes(1, 2).reshape(b, l, -1), weights.out)[0]
    gate, up = times(rms_norm.reference(h, *weights.feed_norm), weights.gate_up)
    return h + times(swiglu.reference(gate, up), weights.down)[0], arrays


def decoder_blocks(
    x: mx.array, layers: Sequence[Weights], cos: mx.array, sin: mx.array, held: Sequence[Held], *, scale: float
) -> tuple[mx.array, list[list[mx.array]]] | None:
    """`reference` of one layer after the other, where the native CPU kernels do them at once: each in the storage of
    its `held` if nobody else holds that. All layers have the same dimensions.

    → [B, L, E] of the last one, and the arrays of each cache with the new tokens. None where the kernels do not do
    them, where the caches are not alike, and under mx.grad and mx.compile: then layers are done alone, or op by op.
    """
    if x.dtype != mx.float32:
        return None
    forms, n_rows, path = [], x.shape[0] * x.shape[1], ""
    for weights in layers:
        if (found := weights.native) is None or not 0 < n_rows <= found[1]:
            return None
        forms.append(found[0])
        path = found[2]
    place, total, fmt = held[0].place, held[0].total, held[0].fmt
    like = held[0].arrays[0]
    if fmt is None and like.dtype not in (mx.float32, mx.float16):
        return None
    for one in held[1:]:
        if (one.place, one.total, one.fmt) != (place, total, fmt):
            return None
        if one.arrays[0].shape != like.shape or one.arrays[0].dtype != like.dtype:
            return None
    bits = (0, 0) if fmt is None else (fmt.k_bits, fmt.v_bits)
    ops: Any = native()
    arrays = [array for one in held for array in one.arrays]
    done = ops.decoder_blocks(forms, x, cos, sin, arrays, place=place, total=total, scale=scale, row_bits=bits)
    if done is None:
        return None
    for op in _INSIDE[fmt is None]:
        record(op, "native in decoder_block", len(layers))
    record("decoder_block", path, len(layers))
    record("quant_matmul", path, len(layers))
    n = len(held[0].arrays)
    return done[0], [done[i : i + n] for i in range(1, len(done), n)]
