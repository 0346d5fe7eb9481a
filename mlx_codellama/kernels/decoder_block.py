"""Layers of a decoder, for a few tokens of sequences whose caches have room: one launch, one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_codellama.config import NATIVE_BITS
from mlx_codellama.kernels import kv_attention, quant_matmul, rms_norm, rope, swiglu
from mlx_codellama.kernels.dispatch import native, record
from mlx_codellama.kernels.kv_attention_segments import Segment, joined
from mlx_codellama.kernels.packed_kv import LARGEST, RowFormat
from mlx_codellama.kernels.quant_matmul import Packed

MOST_ROWS = 8  # tokens
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
    def native(self) -> tuple[Any, str] | None:
        """For the native kernel: its form of them, and the path's name. None where it does not fit."""
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
        return form, "native" if all(exact) else "native int8"


def _alike(packed: Packed, products: Products) -> bool:
    _, scales, biases = packed
    return biases is not None and scales.dtype == products.packed[0][1].dtype


class Held(NamedTuple):
    """A sequence's cache of one layer with room for n more tokens in its last storage, the tail: they go to place …
    place + n - 1 there, and then total tokens count, those of the segments before it included.

    arrays    the tail [1, K, capacity, …]: keys and values as float32 or float16, or packed rows of `fmt`
    segments  what comes before it, oldest first: only read
    Token i of the new ones sees the first total - n + i + 1.
    """

    arrays: list[mx.array]
    place: int
    total: int
    fmt: RowFormat | None
    segments: Sequence[Segment] = ()


class Span(NamedTuple):
    """n_tokens consecutive new tokens of one sequence, and its cache of each layer."""

    n_tokens: int
    layers: Sequence[Held]


def reference(
    x: mx.array, weights: Weights, cos: mx.array, sin: mx.array, held: Held, *, scale: float
) -> tuple[mx.array, list[mx.array]]:
    """One layer for one span: h = x + out(attention(norm(x))), then h + down(swiglu(gate(norm(h)), up(norm(h)))).

    x         float32 [1, L, E], the new tokens
    cos, sin  float32 [L, D/2] for their positions
    → [1, L, E], and the tail with the new tokens. Keys are rotated in float32 before they are stored.
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
    last = Segment(arrays, held.total - sum(segment.n_tokens for segment in held.segments))
    seen = joined([*held.segments, last])
    keys, values = held.fmt.unpack(seen[0]) if held.fmt is not None else seen
    out = kv_attention.reference(q, keys, values, scale=scale, offset=held.total - l)
    h = x + times(out.swapaxes(1, 2).reshape(b, l, -1), weights.out)[0]
    gate, up = times(rms_norm.reference(h, *weights.feed_norm), weights.gate_up)
    return h + times(swiglu.reference(gate, up), weights.down)[0], arrays


def decoder_blocks(
    x: mx.array, layers: Sequence[Weights], cos: mx.array, sin: mx.array, spans: Sequence[Span], *, scale: float
) -> tuple[mx.array, list[list[list[mx.array]]]] | None:
    """`reference` of one layer after the other for each span, where the native CPU kernels do them at once: new tokens
    are written in the tail itself if nobody else holds that. All layers have the same dimensions.

    x         float32 [1, N, E], the tokens of all spans in order; N at most MOST_ROWS
    cos, sin  float32 [N, D/2] for the position of each
    → [1, N, E] of the last layer, and by span and layer the tail with the new tokens. A token's bits, stored and in the
    result, depend on its own sequence up to it alone. None where the kernels do not do them, where the caches are not
    alike, and under mx.grad and mx.compile: then layers are done op by op.
    """
    if x.dtype != mx.float32 or x.shape[0] != 1 or not 0 < x.shape[1] <= MOST_ROWS:
        return None
    forms, path = [], ""
    for weights in layers:
        if (found := weights.native) is None:
            return None
        forms.append(found[0])
        path = found[1]
    fmt, dtype = spans[0].layers[0].fmt, spans[0].layers[0].arrays[0].dtype
    if fmt is None and dtype not in (mx.float32, mx.float16):
        return None
    numbers, tails, segments = [], [], []
    for span in spans:
        place, total, before = span.layers[0].place, span.layers[0].total, span.layers[0].segments
        tokens = [segment.n_tokens for segment in before]
        for held in span.layers:
            if (held.place, held.total, held.fmt) != (place, total, fmt) or held.arrays[0].dtype != dtype:
                return None
            if [segment.n_tokens for segment in held.segments] != tokens:
                return None
            tails += held.arrays
            segments += [array for segment in held.segments for array in segment.arrays]
        numbers.append([span.n_tokens, place, total, *tokens])
    bits = (0, 0) if fmt is None else (fmt.k_bits, fmt.v_bits)
    ops: Any = native()
    done = ops.decoder_blocks(forms, x, cos, sin, tails, segments, numbers, scale=scale, row_bits=bits)
    if done is None:
        return None
    for op in _INSIDE[fmt is None]:
        record(op, "native in decoder_block", len(layers))
    record("decoder_block", path, len(layers))
    record("quant_matmul", path, len(layers))
    n = len(spans[0].layers[0].arrays)
    each = [done[i : i + n] for i in range(1, len(done), n)]
    return done[0], [each[i : i + len(layers)] for i in range(0, len(each), len(layers))]
