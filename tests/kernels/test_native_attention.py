"""Native attention for inference: cached keys of 32, 16, 8 and 4 bits where they lie, few queries and many.

Passing is not luck: the truth is float64 over the stored values, the bound a few float32 roundings, and a key left out
or counted twice, a wrong head, group, part of the keys or last key is wrong by orders of magnitude more.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from kernels.instruction_sets import run_again

from mlx_codellama.kernels import dispatch, kv_attention, kv_attention_rows, rope_append
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.rope import RopeTable

ops = pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

Array = npt.NDArray[Any]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# B, H, K, L, T, D. Up to 8 rows of a kv head the keys are streamed, beyond that they are tiled; both split long ones.
CASES = [
    (1, 4, 4, 1, 1, 128),
    (2, 6, 2, 1, 67, 64),
    (1, 8, 1, 1, 1999, 128),
    (1, 3, 3, 8, 130, 96),
    (2, 2, 1, 3, 1100, 256),
    (1, 5, 5, 2, 63, 20),
    (1, 8, 2, 5, 1281, 32),
    (1, 4, 2, 129, 300, 128),
    (1, 1, 1, 9, 2100, 64),
    (1, 24, 8, 33, 33, 33),
]
BITS = [(4, 4), (8, 8), (8, 4), (4, 16), (16, 8), (16, 16)]


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def wide(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), np.float64)


def truth(q: mx.array, k: mx.array, v: mx.array, scale: float) -> Array:
    """softmax(scale q kᵀ + causal mask) v in float64."""
    share, new, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    keys, values = (np.repeat(wide(a), share, axis=1) for a in (k, v))
    scores = scale * wide(q) @ keys.swapaxes(-1, -2)
    scores[..., np.arange(total) > total - new + np.arange(new)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ values)


def check(out: mx.array, reference: mx.array, want: Array) -> None:
    """The error is at most twice that of plain float32, and some roundings where that is by luck small."""
    allowed = 2 * np.abs(wide(reference) - want).max() + 16 * 2.0**-24 * np.abs(want).max()
    assert np.abs(wide(out) - want).max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_of_any_float_are_read_where_they_lie(case: tuple[int, ...], dtype: mx.Dtype) -> None:
    """A view of a larger storage, as the cache gives it; what lies beyond is NaN and must not be looked at."""
    b, h, k, l, t, d = case
    q = normal(1, b, l, h, d).swapaxes(1, 2)  # the view that a model makes
    spare = mx.full((b, k, 70, d), mx.nan, dtype)
    storage = [mx.concatenate([normal(i, b, k, t, d).astype(dtype), spare], axis=2) for i in (2, 3)]
    keys, values = (a[:, :, :t] for a in storage)
    out = ops.kv_attention(q, keys, values, scale=d**-0.5)
    plain = kv_attention.reference(q, keys, values, scale=d**-0.5, offset=t - l)
    check(out, plain, truth(q, keys, values, d**-0.5))


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c[5] % 32 == 0], ids=str)
def test_packed_rows_are_read_where_they_lie(case: tuple[int, ...], bits: tuple[Any, Any]) -> None:
    b, h, k, l, t, d = case
    fmt = RowFormat(d, *bits)
    q, rows = normal(1, b, h, l, d), fmt.pack(normal(2, b, k, t, d) * 1.5, normal(3, b, k, t, d) + 0.5)
    noise = mx.random.randint(0, 2**31, (b, k, 70, fmt.words), key=mx.random.key(4)).astype(mx.uint32)
    out = ops.kv_attention_rows(
        q,
        mx.concatenate([rows, noise], axis=2),
        k_bits=fmt.k_bits,
        v_bits=fmt.v_bits,
        scale=d**-0.5,
        offset=t - l,
    )
    keys, values = fmt.unpack(rows)
    plain = kv_attention.reference(q, keys, values, scale=d**-0.5, offset=t - l)
    check(out, plain, truth(q, keys, values, d**-0.5))


def test_any_strides_give_the_same_bits() -> None:
    q, k, v = (normal(i, 2, n, m, 40).astype(mx.bfloat16) for i, (n, m) in enumerate([(6, 3), (2, 90), (2, 90)]))
    want = ops.kv_attention(q, k, v, scale=0.3)
    depth_first = [mx.contiguous(x.swapaxes(1, 3)).swapaxes(1, 3) for x in (q, k, v)]
    spread = [mx.repeat(x, 2, axis=2)[:, :, ::2] for x in (q, k, v)]
    for views in (depth_first, spread):
        assert mx.array_equal(ops.kv_attention(*views, scale=0.3), want)
    fmt, whole = RowFormat(96, 8, 4), normal(5, 1, 3, 2, 96)
    rows = fmt.pack(normal(6, 1, 3, 50, 96), normal(7, 1, 3, 50, 96))
    how: dict[str, Any] = {"k_bits": 8, "v_bits": 4, "scale": 0.2, "offset": 40}
    want = ops.kv_attention_rows(whole, rows[:, :, 5:47], **how)
    for view in (mx.contiguous(rows[:, :, 5:47]), mx.contiguous(rows.swapaxes(2, 3)).swapaxes(2, 3)[:, :, 5:47]):
        assert mx.array_equal(ops.kv_attention_rows(whole, view, **how), want)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_sixteen_bit_queries_are_rounded_once_at_the_end(dtype: mx.Dtype) -> None:
    q, k, v = normal(1, 1, 4, 2, 64).astype(dtype), normal(2, 1, 2, 70, 64), normal(3, 1, 2, 70, 64)
    out = ops.kv_attention(q, k, v, scale=0.125)
    assert out.dtype == dtype
    assert mx.array_equal(out, ops.kv_attention(q.astype(mx.float32), k, v, scale=0.125).astype(dtype))


@pytest.mark.parametrize("width", [1, 2, 5, 8, 40])
def test_queries_together_see_what_each_sees_alone(width: int) -> None:
    fmt = RowFormat(128, 4, 4)
    q, total = normal(1, 1, 2, 41, 128), 700
    rows = fmt.pack(normal(2, 1, 1, total, 128), normal(3, 1, 1, total, 128))
    how: dict[str, Any] = {"k_bits": 4, "v_bits": 4, "scale": 0.09}
    whole = ops.kv_attention_rows(q, rows, **how, offset=total - 41)
    for i in range(0, 41, width):
        end = min(i + width, 41)
        part = ops.kv_attention_rows(q[:, :, i:end], rows, **how, offset=total - 41 + i)
        assert mx.abs(part - whole[:, :, i:end]).max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("new", "total"), [(1, 90), (3, 1500), (20, 1500)])
def test_nan_and_infinity_pass_as_in_the_reference(new: int, total: int, dtype: mx.Dtype) -> None:
    """A bad key spoils the queries that see it; an infinite value makes its element of theirs infinite."""
    q, k, v = normal(1, 1, 2, new, 64), normal(2, 1, 1, total, 64), normal(3, 1, 1, total, 64)
    at = total - new + new // 2
    for bad in (mx.nan, mx.inf):
        for spoil_key in (True, False):
            spoilt = np.array(k if spoil_key else v)
            spoilt[0, 0, at, 9] = bad
            pair = (mx.array(spoilt), v) if spoil_key else (k, mx.array(spoilt))
            keys, values = (a.astype(dtype) for a in pair)
            got = np.array(ops.kv_attention(q, keys, values, scale=0.125))
            want = np.array(kv_attention.reference(q, keys, values, scale=0.125, offset=total - new))
            sees = np.arange(new) >= new // 2
            assert (np.isnan(got) == np.isnan(want))[:, :, sees].all()
            assert (np.isinf(got) == np.isinf(want))[:, :, sees].all()
            assert np.isfinite(np.delete(got, 9, axis=-1))[:, :, ~sees].all()  # in the reference too
    nobody = ops.kv_attention(q, mx.full(k.shape, -mx.inf), v, scale=0.125)
    assert mx.isnan(nobody).all()


@pytest.mark.parametrize("new", [1, 40])
def test_what_a_call_leaves_in_its_memory_does_not_reach_the_next(new: int) -> None:
    """Of NaN as wide as it can be, then of heads that end within a vector."""
    spoilt = mx.full((1, 8, 300, 256), mx.nan)
    mx.eval(ops.kv_attention(mx.repeat(spoilt[:, :, -new:], 2, axis=1), spoilt, spoilt, scale=1.0))
    q, k, v = normal(1, 1, 16, new, 33), normal(2, 1, 8, 300, 33), normal(3, 1, 8, 300, 33)
    check(
        ops.kv_attention(q, k, v, scale=0.2),
        kv_attention.reference(q, k, v, scale=0.2, offset=300 - new),
        truth(q, k, v, 0.2),
    )


def test_nothing_is_copied_or_unpacked() -> None:
    """64 MiB of keys and values in a storage of twice that; above it a call takes less than one of them in float32."""
    fmt, total = RowFormat(128, 4, 4), 32_768
    storage = [mx.zeros((1, 4, 2 * total, 128), mx.float16) for _ in range(2)]
    rows = mx.zeros((1, 4, 2 * total, fmt.words), mx.uint32)
    mx.eval(storage, rows)
    for new in (1, 40):
        q = normal(1, 1, 4, new, 128)
        mx.eval(q)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        k, v = (a[:, :, :total] for a in storage)
        mx.eval(kv_attention.kv_attention(q, k, v, scale=0.1, offset=total - new))
        mx.eval(kv_attention_rows.kv_attention_rows(q, rows, fmt, scale=0.1, offset=total - new))
        assert mx.get_peak_memory() - before < 2**20


def test_no_queries_give_nothing() -> None:
    keys = mx.zeros((2, 1, 5, 32))
    assert ops.kv_attention(mx.zeros((2, 4, 0, 32)), keys, keys, scale=1.0).shape == (2, 4, 0, 32)
    rows = mx.zeros((0, 1, 5, 10), mx.uint32)
    how: dict[str, Any] = {"k_bits": 4, "v_bits": 4, "scale": 1.0, "offset": 3}
    assert ops.kv_attention_rows(mx.zeros((0, 4, 2, 32)), rows, **how).shape == (0, 4, 2, 32)


def test_gradients_reach_keys_of_16_bits() -> None:
    q, k, v = normal(1, 1, 4, 5, 16), normal(2, 1, 2, 9, 16).astype(mx.bfloat16), normal(3, 1, 2, 9, 16)
    got = mx.grad(lambda k: ops.kv_attention(q, k, v, scale=0.25).sum())(k)
    want = mx.grad(lambda k: kv_attention.reference(q, k, v, scale=0.25, offset=4).sum())(k)
    assert got.dtype == mx.bfloat16
    assert mx.allclose(got, want, atol=2**-7)


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off")
def test_dispatch_takes_the_native_paths() -> None:
    fmt = RowFormat(64, 8, 4)
    q, k, v = (normal(i, 1, n, 3, 64) for i, n in ((1, 4), (2, 2), (3, 2)))
    for dtype in DTYPES:
        kv_attention.kv_attention(q, k.astype(dtype), v.astype(dtype), scale=1.0, offset=0)
        assert dispatch.paths().pop("kv_attention") == "native"
    _, rows = rope_append.rope_append(q, k, v, *RopeTable(64, 1e4).rows(0, 3), fmt)
    assert dispatch.paths()["rope_append"] == "native"
    kv_attention_rows.kv_attention_rows(q, rows, fmt, scale=1.0, offset=0)
    assert dispatch.paths()["kv_attention_rows"] == "native"


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("d", [32, 128, 192])
def test_rope_append_packs_any_values_as_the_reference(d: int, bits: tuple[Any, Any]) -> None:
    """Groups from subnormal to beyond float16, of one value, on ties. The angle is 0, so keys too are to the bit."""
    fmt = RowFormat(d, *bits)
    x = normal(1, 1, 2, 12, d) * 10.0 ** mx.array([-9, -7, -5, -3, 0, 1, 3, 5, 30, 0, 0, 0])[:, None]
    x[:, :, 9] = 0.1
    x[:, :, 10] = mx.arange(d) % 31 / 2  # codes on ties where a step is 1
    x[:, :, 11] = mx.array([-1e9, 65504.0] * (d // 2))
    table = mx.ones((12, d // 2)), mx.zeros((12, d // 2))
    turned, rows = ops.rope_append(x, x, x * 0.7, *table, k_bits=fmt.k_bits, v_bits=fmt.v_bits)
    assert mx.array_equal(turned, x)
    want = fmt.pack(x, x * 0.7)
    for i in range(12):
        assert mx.array_equal(rows[:, :, i], want[:, :, i]), i


def test_floats_become_float16_as_everywhere() -> None:
    """Each half, what lies between two of them (ties go to even), and just beside that."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([halves, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e9))])
    x = np.resize(np.stack([x, -x]).ravel(), (1, 1, -(-2 * x.size // 64), 64))
    n = x.shape[2]
    _, rows = ops.rope_append(
        mx.zeros((1, 1, n, 64)), mx.zeros((1, 1, n, 64)), mx.array(x), mx.ones((n, 32)), mx.zeros((n, 32)),
        k_bits=16, v_bits=16,
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(rows).view(np.float16)[..., 64:], x.astype(np.float16))


def test_what_does_not_fit_is_refused() -> None:
    q, rows = mx.zeros((1, 4, 2, 64)), mx.zeros((1, 2, 5, 18), mx.uint32)
    how: dict[str, Any] = {"k_bits": 4, "v_bits": 4, "scale": 1.0, "offset": 3}
    with pytest.raises(ValueError, match="another width"):
        ops.kv_attention_rows(q, rows[..., :17], **how)
    with pytest.raises(ValueError, match="a row for every token"):
        ops.kv_attention_rows(q, rows, **how | {"offset": 4})
    with pytest.raises(ValueError, match="4, 8 or 16 bits"):
        ops.kv_attention_rows(q, rows, **how | {"k_bits": 3})
    with pytest.raises(ValueError, match="same B, L and D"):
        ops.rope_append(q, q[:, :2, :1], q[:, :2, :1], mx.zeros((2, 32)), mx.zeros((2, 32)), k_bits=4, v_bits=4)


@pytest.mark.parametrize(("isa", "threads"), [("avx512", "1"), ("avx2", "3"), ("portable", "2")])
def test_every_instruction_set_and_number_of_threads_agrees(isa: str, threads: str) -> None:
    run_again(__file__, "not every_instruction", isa, threads)
