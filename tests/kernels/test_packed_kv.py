"""Packed rows: the layout to the bit, and the codes against numpy after the text of kernels/packed_kv.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.errors import ConfigError
from mlx_codellama.kernels.packed_kv import RowFormat

WIDTHS = [(4, 4), (8, 8), (8, 4), (4, 16), (16, 8), (16, 16)]
B, K, L = 2, 3, 5


def some(d: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Groups of different size and offset, so that no two share a scale."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, K, L, d)) * 10.0 ** rng.integers(-2, 2, (B, K, L, 1)) + rng.standard_normal(d)
    return mx.array(x.astype(np.float32)).astype(dtype)


def packed_by_hand(x: np.ndarray, bits: int, group: int) -> tuple[bytes, bytes]:
    """One head's values [D] → bytes of its part and of its scale words, one element at a time."""
    x = np.clip(x, -65504, 65504).astype(np.float32)
    if bits == 16:
        return x.astype("<f2").tobytes(), b""
    top, codes, pairs = 2**bits - 1, [], b""
    for start in range(0, len(x), group):
        part = x[start : start + group]
        scale = np.float16((part.max() - part.min()) * np.float32(1 / top))
        bias = np.float16(part.min())
        inverse = np.float32(1) / np.float32(scale) if scale > 0 else np.float32(0)
        codes += [int(np.clip(np.rint((e - np.float32(bias)) * inverse), 0, top)) for e in part]
        pairs += scale.astype("<f2").tobytes() + bias.astype("<f2").tobytes()
    if bits == 4:
        codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return bytes(codes), pairs


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("d", [32, 96, 128])
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_rows_are_what_the_text_says_to_the_bit(bits: tuple[int, int], d: int, dtype: mx.Dtype) -> None:
    fmt = RowFormat(d, *bits)
    k, v = some(d, 1, dtype), some(d, 2, dtype)
    rows = fmt.pack(k, v)
    assert (rows.shape, rows.dtype) == ((B, K, L, fmt.words), mx.uint32)
    wide_k, wide_v = (np.asarray(a.astype(mx.float32)) for a in (k, v))
    for at in np.ndindex(B, K, L):
        k_part, k_pairs = packed_by_hand(wide_k[at], fmt.k_bits, fmt.group_size)
        v_part, v_pairs = packed_by_hand(wide_v[at], fmt.v_bits, fmt.group_size)
        assert np.asarray(rows[at]).tobytes() == k_part + v_part + k_pairs + v_pairs
        assert (len(k_part), len(v_part)) == (4 * fmt.k_words, 4 * fmt.v_words)
        assert (len(k_pairs), len(v_pairs)) == (4 * fmt.k_scale_words, 4 * fmt.v_scale_words)


@pytest.mark.parametrize("d", [32, 96, 128])
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_unpacked_values_are_within_a_step_of_what_was_packed(bits: tuple[int, int], d: int) -> None:
    fmt = RowFormat(d, *bits)
    k, v = some(d, 3), some(d, 4)
    for was, now, width in zip((k, v), fmt.unpack(fmt.pack(k, v)), bits, strict=True):
        assert now.dtype == mx.float32
        was, now = (np.asarray(a, np.float64).reshape(B, K, L, -1, fmt.group_size) for a in (was, now))
        size = np.abs(was).max(-1, keepdims=True)
        if width == 16:
            allowed = size * 2**-11
        else:
            # half a step; at the ends of the range also what the float16 roundings of scale and bias cut off
            step = (was.max(-1, keepdims=True) - was.min(-1, keepdims=True)) / (2**width - 1)
            allowed = step / 2 + (2**width - 1) * step * 2**-11 + size * 2**-11
        assert (np.abs(was - now) <= allowed * (1 + 1e-6)).all()
        assert np.abs(was - now).max() > 0  # the bound is not met by doing nothing


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_lie_as_mlx_packs_them(bits: int) -> None:
    """mx.dequantize reads a part as it stands; mx.quantize's own codes for whole numbers are the same."""
    fmt = RowFormat(64, bits, bits)
    values = mx.arange(64).astype(mx.float32) % (2**bits)
    values = mx.where(mx.arange(64) == 63, 2**bits - 1, values)  # the range is 0 … 2^bits - 1, so a step is 1
    row = fmt.pack(values[None], values[None])[0]
    codes = row[: fmt.v_start].view(mx.uint8)
    read = codes if bits == 8 else mx.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    assert read.tolist() == values.tolist()
    ones, zeros = mx.ones((1, 1)), mx.zeros((1, 1))
    assert mx.array_equal(mx.dequantize(row[None, : fmt.v_start], ones, zeros, 64, bits)[0], values)


def test_a_group_of_one_value_is_that_value() -> None:
    """No range: the scale is 0 and dividing by it must not be seen. 0.1 is not a float16."""
    fmt = RowFormat(32, 4, 8)
    k, v = fmt.unpack(fmt.pack(mx.full((1, 32), 0.1), mx.full((1, 32), -3.0)))
    assert mx.array_equal(k, mx.full((1, 32), 0.1).astype(mx.float16).astype(mx.float32))
    assert mx.array_equal(v, mx.full((1, 32), -3.0))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_values_beyond_float16_are_limited_not_infinite(bits: int) -> None:
    fmt = RowFormat(32, bits, bits)
    x = mx.where(mx.arange(32) == 3, 1e30, mx.where(mx.arange(32) == 4, -1e30, 1.0))[None]
    for out in fmt.unpack(fmt.pack(x, x)):
        assert mx.isfinite(out).all().item()
        assert out[0, 3].item() > 65000
        assert out[0, 4].item() < -65000


@pytest.mark.parametrize(("d", "bits", "words"), [(128, (4, 4), 36), (128, (8, 4), 52), (128, (8, 8), 68)])
def test_a_row_has_the_bytes_that_the_plan_counts_with(d: int, bits: tuple[int, int], words: int) -> None:
    fmt = RowFormat(d, *bits)
    assert (fmt.words, fmt.bytes, fmt.group_size) == (words, 4 * words, 64)
    assert fmt.k_words + fmt.v_words + fmt.scale_words == words


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_unpacking_to_a_narrow_type_rounds_once(dtype: mx.Dtype) -> None:
    fmt = RowFormat(64, 8, 4)
    rows = fmt.pack(some(64, 5), some(64, 6))
    for narrow, wide in zip(fmt.unpack(rows, dtype), fmt.unpack(rows), strict=True):
        assert narrow.dtype == dtype
        assert mx.array_equal(narrow, wide.astype(dtype))


@pytest.mark.parametrize("wrong", [(128, 3, 4), (128, 4, 32), (48, 8, 8), (16, 16, 4), (15, 16, 16)], ids=str)
def test_formats_that_cannot_be_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        RowFormat(*wrong)
    assert caught.value.hint
