"""Operations on the CPU, inside MLX's lazy graph, with gradients. Only `mlx_codellama.kernels` imports this.

Shape letters: B batch, H query heads, K kv heads, L queries, T keys, D head dim, E width, V vocabulary. Any strides are
accepted. Other dtypes than float32 (save where an op says so) and shapes that do not fit raise ValueError. Higher
derivatives are not defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_codellama_cpu import _ext

INTERFACE = 8  # what mlx_codellama.kernels.dispatch expects: raised with every change to a function of this module


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., E], weight [E] → x / sqrt(mean(x²) + eps) · weight. Gradients for x and weight."""
    return _ext.rms_norm(x, weight, eps)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate, up of one shape → silu(gate) · up. Gradients for both."""
    return _ext.swiglu(gate, up)


def zeros_like(like: mx.array, shape: list[int]) -> mx.array:
    """Zeros of this shape in the dtype of `like`, any dtype: memory that all threads touch first. No gradient."""
    return _ext.zeros_like(like, shape)


def rope(x: mx.array, cos: mx.array, sin: mx.array, *, inverse: bool = False) -> mx.array:
    """Turn x [B, H, L, D] by halves; cos, sin [L, D/2]. `inverse` turns back. Gradient for x."""
    return _ext.rope(x, cos, sin, inverse)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """logits [..., V], targets integers [...] → loss in nats [...]. Gradient for logits.

    Loss and gradient are 0 where the target is negative. A target of V or more gives NaN:
    a lazy graph has no place to raise.
    """
    return _ext.cross_entropy(logits, targets)


def kv_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    starts: mx.array | None = None,
    window: Sequence[int] = (),
    prompt: bool | None = None,
) -> mx.array:
    """Causal attention, the last query aligned with the last key: query i sees keys starts[i] … T - L + i.

    q       [B, H, L, D], D at most 256;  q, k, v each float32 | float16 | bfloat16, computed in float32
    k, v    [B, K, T, D]  query head h reads kv head h // (H // K);  T >= L. Views of a larger storage are not copied
    starts  integers [B, L]: the first key each query sees, for packed documents; default 0. A query that sees no
            key gets zeros.
    window  (sinks, size, own, ring) in place of starts: which keys each query sees is then as `reference` of
            mlx_codellama/kernels/kv_attention_window.py says; ring is a number here, T or more where there is none
    prompt  which of two forms computes: True for many queries, False for a few; None: by their number, few are up to 8.
            Within a form a query's bits depend on the keys that it sees alone, however many queries there are
    → [B, H, L, D] in q's memory order and dtype. Gradients for q, k and v, without a window.
    """
    return _ext.kv_attention(q, k, v, scale, starts, window, prompt)


def kv_attention_rows(
    q: mx.array,
    rows: mx.array,
    *,
    k_bits: int,
    v_bits: int,
    scale: float,
    offset: int,
    window: Sequence[int] = (),
    prompt: bool | None = None,
) -> mx.array:
    """The same over packed rows of keys and values, laid out as mlx_codellama/kernels/packed_kv.py says.

    q     [B, H, L, D] float32 | float16 | bfloat16, D at most 256, and a multiple of 32 unless both have 16 bits
    rows  uint32 [B, K, capacity, W], of which the first offset + L count, in a window too
    → [B, H, L, D] in q's memory order and dtype. No gradient.
    """
    return _ext.kv_attention_rows(q, rows, k_bits, v_bits, scale, offset, window, prompt)


def kv_attention_segments(
    q: mx.array,
    segments: Sequence[Sequence[mx.array]],
    tokens: Sequence[int],
    *,
    scale: float,
    prompt: bool,
    row_bits: tuple[int, int] = (0, 0),
) -> mx.array:
    """The same over keys and values in several pieces of storage, with the bits of one piece.

    q         [B, H, L, D] as in kv_attention, after the others' tokens: the last L of all are its own
    segments  of consecutive tokens, oldest first: each keys and values [B, K, capacity, D] of one float dtype, or where
              row_bits are those of packed rows the one array uint32 [B, K, capacity, W]
    tokens    how many of each count
    → [B, H, L, D] in q's memory order and dtype. No gradient.
    """
    arrays = [array for segment in segments for array in segment]
    return _ext.kv_attention_segments(q, arrays, tokens, *row_bits, scale, prompt)


def rope_append(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array, *, k_bits: int, v_bits: int
) -> tuple[mx.array, mx.array]:
    """Turn q and k by halves, and pack k and v as mlx_codellama/kernels/packed_kv.py says.

    q [B, H, L, D], k and v [B, K, L, D], of any float dtype; cos, sin float32 [L, D/2]
    → q turned, in its dtype; rows uint32 [B, K, L, W]. No gradient.
    """
    turned, rows = _ext.rope_append(q, k, v, cos, sin, k_bits, v_bits)
    return turned, rows


def quant_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    terms: int = 0,
    prompt: bool = False,
) -> mx.array:
    """x @ dequantised(weight)ᵀ for MLX's packed weights.

    x       [..., I], float32 | float16 | bfloat16; computed in float32 and rounded to x's dtype at the end
    weight  uint32 [O, I·bits/32], bits 4 or 8, groups of 32, 64 or 128
    scales  [O, I/group_size], float32 | float16 | bfloat16, read as they are. biases alike; None means mxfp4: scales
            are uint8 and groups 32
    terms   0: activations stay float32. 1 or 2: they become the sum of so many int8 terms times a scale of their
            group, which errs by at most max |x| of the group / 254 or / 32512. mxfp4, and any row of x that is not
            finite, is always done with 0.
    prompt  which of two forms multiplies: True for many rows; False for a few, where there are at most 8. Within a form
            a row's bits depend on that row and the weight alone
    → [..., O] in x's dtype. Gradient for x alone.
    """
    b = [] if biases is None else [biases]
    how = group_size, bits, terms, prompt
    y: mx.array = _ext.quant_linear(x, [weight], [scales], b, None, 0.0, None, False, *how)[0]
    return y


def quant_linear(
    x: mx.array,
    weights: Sequence[tuple[mx.array, mx.array, mx.array | None]],
    *,
    group_size: int,
    bits: int,
    terms: int = 0,
    norm: tuple[mx.array, float] | None = None,
    residual: mx.array | None = None,
    gated: bool = False,
    prompt: bool = False,
) -> list[mx.array]:
    """Up to three `quant_matmul` of one x in one launch, with what stands before and after them in a model.

    weights   (weight, scales, biases) of each, of one dtype, as in `quant_matmul`
    norm      (weight [I], eps): x is normalised first, as `rms_norm` does
    residual  [..., O], added to the result; for one weight alone
    gated     two weights of one shape, gate and up: the result is swiglu(gate, up) alone
    → one array for each weight, or one where gated. Gradients for x, the norm's weight and the residual.
    """
    w, s, b = (list(parts) for parts in zip(*weights, strict=True))
    scale, eps = norm if norm is not None else (None, 0.0)
    y: list[mx.array] = _ext.quant_linear(
        x, w, s, [] if b[0] is None else b, scale, eps, residual, gated, group_size, bits, terms, prompt
    )
    return y


def decoder_weights(
    attention_norm: tuple[mx.array, float],
    feed_norm: tuple[mx.array, float],
    weights: Sequence[tuple[mx.array, mx.array, mx.array]],
    formats: Sequence[tuple[int, int, int]],
    *,
    heads: int,
    kv_heads: int,
) -> _ext.DecoderWeights | None:
    """What `decoder_blocks` reads of a layer, looked through once. It computes the arrays and keeps them.

    None inside mx.grad, mx.compile and their like where one of the arrays is what they follow: see `decoder_blocks`.

    norms     (weight [E], eps)
    weights   (weight, scales, biases) of q, k, v, out, gate, up and down, as in `quant_matmul`
    formats   (group size, bits, terms) of q k v, of out, of gate and up, and of down
    """
    w, s, b = (list(parts) for parts in zip(*weights, strict=True))
    norms, eps = [attention_norm[0], feed_norm[0]], [attention_norm[1], feed_norm[1]]
    if _ext.any_traced([*w, *s, *b, *norms]):
        return None
    return _ext.DecoderWeights(w, s, b, norms, eps, formats, heads, kv_heads)


def decoder_blocks(
    layers: Sequence[_ext.DecoderWeights],
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    tails: Sequence[mx.array],
    segments: Sequence[mx.array],
    spans: Sequence[Sequence[int]],
    *,
    scale: float,
    row_bits: tuple[int, int] = (0, 0),
) -> list[mx.array] | None:
    """A decoder's layers, one after the other, for a few tokens of one or several sequences, in one launch. Each layer:

    h = x + out(attention(norm(x))); y = h + down(silu(gate) · up), where gate and up are those of norm(h)

    layers    alike in all dimensions
    x         [1, N, E], N at most 8: the tokens of each span one after the other
    cos, sin  [N, D/2]
    spans     of each sequence: how many of the N tokens, from where on they are written in its tail, how many tokens it
              has then, and how many of those lie in each of its segments
    tails     span by span, of each layer keys and values float32 | float16 [1, K, capacity, D], or where row_bits are
              those of packed rows (see kv_attention_rows) one array uint32 [1, K, capacity, W]: the sequence's tokens
              after its segments. New ones are written there, in its own memory where nobody else holds it
    segments  span by span, layer by layer, oldest first: arrays like the tail's, which are read alone
    → y [1, N, E] of the last layer and the tails. A token's bits depend on its own sequence up to it alone. None inside
    mx.grad, mx.compile and their like where x or a cache is what they follow: the launch knows its weights from before,
    and has no gradient.
    """
    found: list[mx.array] = _ext.decoder_blocks(layers, x, cos, sin, tails, segments, spans, scale, *row_bits)
    return found or None


def adamw(
    p: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
    grad_scale: mx.array | float = 1.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of AdamW with bias correction → new p, m, v. `step` counts from 1; g counts grad_scale times."""
    new_p, new_m, new_v = _ext.adamw(p, g, m, v, mx.array(grad_scale, mx.float32), rate, beta1, beta2, eps, decay, step)
    return new_p, new_m, new_v


def sum_squares(arrays: Sequence[mx.array]) -> mx.array:
    """The sum of squares of all elements of all arrays, float32 [], accumulated in float64. No gradient."""
    return _ext.sum_squares(list(arrays))


def threads() -> int:
    """Threads that work at once, the calling one included."""
    return _ext.threads()


def isa() -> str:
    """The instruction set in use: avx512vnni, avx512, avx2, neondot or portable."""
    return _ext.isa()
