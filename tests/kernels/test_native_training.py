"""The native float32 operations and their gradients, held to each op's `reference` in plain MLX.

Passing is not luck: the bounds are a few float32 roundings of the largest result, and a tile left out, a wrong head, a
mask one off or a lost factor is wrong by orders of magnitude more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from kernels.instruction_sets import run_again

from mlx_codellama.kernels import adamw as adamw_kernel
from mlx_codellama.kernels import cross_entropy, kv_attention, rms_norm, rope, swiglu

ops = pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")

Function = Callable[..., mx.array]


def normal(seed: int, *shape: int, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * scale


def both(f: Function, args: Sequence[mx.array], which: tuple[int, ...], out: mx.array) -> list[np.ndarray]:
    """f(args) and its gradients for the weighting `out` of the results."""
    grads = mx.grad(lambda *a: (f(*a) * out).sum(), which)(*args)
    return [np.array(x) for x in (f(*args), *grads)]


def check(
    native: Function, reference: Function, args: Sequence[mx.array], which: tuple[int, ...], bound: float
) -> None:
    shape = reference(*args).shape
    out = normal(99, *shape)
    for ours, theirs in zip(both(native, args, which, out), both(reference, args, which, out), strict=True):
        assert ours.shape == theirs.shape
        if theirs.size:
            assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), 1e-3)


# Widths below, at and beyond every vector width, in pairs of vectors with and without a rest.
@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 16), (7, 2), (130, 64), (2, 95), (0, 33)])
def test_rms_norm_and_its_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    args = (normal(1, *shape), normal(2, shape[-1]))
    check(lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: rms_norm.reference(x, w, 1e-5), args, (0, 1), 2e-6)


@pytest.mark.parametrize("shape", [(3, 5, 77), (1,), (2, 8192 + 13), (0, 3)])
def test_swiglu_and_its_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    args = (normal(1, *shape, scale=6.0), normal(2, *shape))
    check(ops.swiglu, swiglu.reference, args, (0, 1), 2e-6)


def test_swiglu_is_right_where_the_exponential_overflows() -> None:
    gate = mx.array([-1000.0, -104.0, -88.5, 88.5, 1000.0, mx.inf, mx.nan, 0.0, -0.0])
    got = np.array(ops.swiglu(gate, mx.ones_like(gate)))
    assert np.allclose(got[:6], [0, 0, 0, 88.5, 1000, np.inf], atol=1e-30)
    assert (got[:2] == 0).all()  # exactly: e^104 is infinite
    assert np.isnan(got[6])
    assert (got[7:] == 0).all()
    # Far below zero the result is x e^x, so it errs as the exponential does: about 1 ulp, and 1.5 of the three steps
    # around it. 2.4 units of 2^-24 measured; one term less of the polynomial gives 5.
    x = np.linspace(-80, -20, 20_011, dtype=np.float32)
    wide = x.astype(np.float64)
    error = np.array(ops.swiglu(mx.array(x), mx.ones(x.shape))) / (wide / (1 + np.exp(-wide))) - 1
    assert np.abs(error).max() < 3.5 * 2.0**-24


@pytest.mark.parametrize("half", [1, 7, 16, 33])
def test_rope_turns_back_and_its_gradient_equals_the_reference(half: int) -> None:
    angle = normal(3, 11, half, scale=100.0)
    cos, sin = mx.cos(angle), mx.sin(angle)
    x = normal(1, 2, 11, 3, 2 * half).swapaxes(1, 2)  # the view that a model makes
    check(lambda x: ops.rope(x, cos, sin), lambda x: rope.reference(x, cos, sin), (x,), (0,), 1e-6)
    assert mx.abs(ops.rope(ops.rope(x, cos, sin), cos, sin, inverse=True) - x).max() < 2e-6


@pytest.mark.parametrize("vocab", [1, 5, 131, 515])
def test_cross_entropy_and_its_gradient_equal_the_reference(vocab: int) -> None:
    targets = mx.array([0, vocab - 1, -1, vocab // 2])
    args = (normal(1, 4, vocab, scale=8.0),)
    check(lambda x: ops.cross_entropy(x, targets), lambda x: cross_entropy.reference(x, targets), args, (0,), 2e-6)


def test_cross_entropy_and_a_logit_that_overflows_unless_it_is_found_wherever_it_is() -> None:
    logits = 300 * mx.eye(71)  # the largest in every lane of every vector and in the rest
    got = np.array(ops.cross_entropy(logits, mx.array([(i + 1) % 71 for i in range(71)])))
    assert np.allclose(got, 300)
    assert np.abs(np.array(ops.cross_entropy(logits, mx.arange(71)))).max() < 1e-6


def test_ignored_rows_have_no_loss_and_no_gradient_even_where_their_logits_are_nan() -> None:
    logits = mx.stack([normal(1, 37), mx.full((37,), mx.nan), normal(2, 37)])
    targets = mx.array([3, -100, 99])
    loss = np.array(ops.cross_entropy(logits, targets))
    grad = np.array(mx.grad(lambda x: ops.cross_entropy(x, targets)[:2].sum())(logits))
    assert loss[1] == 0
    assert np.isnan(loss[2])  # a target beyond the row
    assert (grad[1:] == 0).all()
    assert abs(grad[0].sum()) < 1e-6


ATTENTION = [  # B, H, K, L, T, D: tiles of 64 queries and 128 keys cut, whole and crossed
    (2, 4, 2, 130, 130, 64),
    (1, 3, 1, 5, 5, 20),
    (2, 2, 2, 1, 300, 128),
    (1, 4, 2, 67, 333, 33),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 193, 193, 256),
    (1, 2, 1, 1, 127, 8),  # the last key of a tile is the first that the first query must not see
    (1, 2, 2, 66, 192, 24),
]


@pytest.mark.parametrize("size", ATTENTION)
def test_attention_and_its_gradients_equal_the_reference(size: tuple[int, ...]) -> None:
    b, h, k, l, t, d = size
    args = (normal(1, b, h, l, d), normal(2, b, k, t, d), normal(3, b, k, t, d))

    def reference(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return kv_attention.reference(q, k, v, scale=d**-0.5, offset=t - l)

    check(lambda q, k, v: ops.kv_attention(q, k, v, scale=d**-0.5), reference, args, (0, 1, 2), 5e-6)


def test_attention_does_in_groups_what_does_not_fit_its_memory_at_once() -> None:
    b, k, t, d = 2, 9, 4097, 128  # 18 pairs of (batch, head), 16 of which fit
    q, key, v = normal(1, b, k, 1, d), normal(2, b, k, t, d), normal(3, b, k, t, d)
    out = normal(4, b, k, 1, d)
    args = (q, key, v)
    native = both(lambda q, k, v: ops.kv_attention(q, k, v, scale=0.1), args, (0, 1, 2), out)
    weights = mx.softmax(0.1 * (q * key).sum(-1), axis=-1)  # one query: no mask, and no repetition of keys
    assert np.abs(native[0] - np.array(weights[:, :, None] @ v)).max() < 2e-6
    assert np.abs(native[3] - np.array(weights[..., None] * out)).max() < 2e-6


def test_attention_reads_any_strides() -> None:
    b, h, k, l, d = 2, 6, 3, 70, 24
    plain = normal(1, b, h, l, d), normal(2, b, k, l, d), normal(3, b, k, l, d)

    def grads(views: Sequence[mx.array]) -> list[mx.array]:
        def f(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (ops.kv_attention(q, k, v, scale=0.2) * normal(4, b, h, l, d)).sum()

        return list(mx.grad(f, (0, 1, 2))(*views))

    tokens_first = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in plain]
    depth_first = [mx.contiguous(x.swapaxes(1, 3)).swapaxes(1, 3) for x in plain]
    spread = [mx.repeat(x, 2, axis=2)[:, :, ::2] for x in plain]
    want = grads(plain)
    for views in (tokens_first, depth_first, spread):
        assert mx.array_equal(ops.kv_attention(*views, scale=0.2), ops.kv_attention(*plain, scale=0.2))
        assert all(mx.array_equal(a, b) for a, b in zip(grads(views), want, strict=True))


BAD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -100.0, 100.0]


@pytest.mark.parametrize("at", [0, 17, 34])  # in a vector, in its neighbour, in the rest
@pytest.mark.parametrize("value", BAD)
def test_nan_and_infinity_pass_as_in_the_reference(value: float, at: int) -> None:
    def spoilt(seed: int, *shape: int) -> mx.array:
        x = np.array(normal(seed, *shape))
        x[..., 1, at] = value
        return mx.array(x)

    def agree(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-5, atol=2e-6, equal_nan=True)

    x, w, targets = spoilt(1, 3, 35), normal(2, 35), mx.array([4, 17, 0])
    agree([ops.rms_norm(x, w, 1e-5)], [rms_norm.reference(x, w, 1e-5)])
    agree([ops.swiglu(x, w * x)], [swiglu.reference(x, w * x)])
    agree([ops.cross_entropy(x, targets)], [cross_entropy.reference(x, targets)])
    for native, reference in (
        (lambda x: ops.rms_norm(x, w, 1e-5).sum(), lambda x: rms_norm.reference(x, w, 1e-5).sum()),
        (lambda x: ops.cross_entropy(x, targets).sum(), lambda x: cross_entropy.reference(x, targets).sum()),
    ):
        agree([mx.grad(native)(x)], [mx.grad(reference)(x)])
    if not np.isfinite(value):  # beyond what float32 holds, MLX's own gradient has NaN where the value is finite
        grads = [mx.grad(lambda g, f=f: f(g, normal(2, 3, 35)).sum())(x) for f in (ops.swiglu, swiglu.reference)]
        agree(grads[:1], grads[1:])
    p, g, m, v = normal(3, 3, 35), x, normal(4, 3, 35), mx.abs(normal(5, 3, 35))
    for state in ((p, g, m, v), (g, p, m, v), (p, m, g, v), (p, m, v, mx.abs(g))):
        how = adamw_kernel.Step(3, 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.5)
        agree(adamw_kernel.adamw(*state, how), adamw_kernel.reference(*state, how))
    assert np.isnan(float(adamw_kernel.norm([w, x]))) == np.isnan(value)
    heads, tables = spoilt(6, 1, 2, 3, 70), (mx.cos(normal(7, 3, 35)), mx.sin(normal(7, 3, 35)))
    agree([ops.rope(heads, *tables)], [rope.reference(heads, *tables)])


def test_large_logits_keep_their_probabilities() -> None:
    """A stored log-sum-exp of 3e7 would round away what tells two logits apart, and half of the gradient with it."""
    logits, targets = mx.array([[3e7, 3e7, -3e7, 0.0, 3e7 - 4]]), mx.array([1])
    probability = np.array([1, 1, 0, 0, np.exp(-4.0)]) / (2 + np.exp(-4.0))
    loss, grad = mx.value_and_grad(lambda x: ops.cross_entropy(x, targets).sum())(logits)
    assert abs(float(loss) + np.log(probability[1])) < 1e-6
    assert np.abs(np.array(grad)[0] - (probability - [0, 1, 0, 0, 0])).max() < 1e-6


def test_packed_documents_do_not_see_each_other() -> None:
    h, k, d, lengths = 4, 2, 32, [50, 131, 1, 75]
    total = sum(lengths)
    q, key, v, w = (
        normal(1, 1, h, total, d),
        normal(2, 1, k, total, d),
        normal(3, 1, k, total, d),
        normal(4, 1, h, total, d),
    )
    firsts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    starts = mx.array(firsts[None])

    def packed(q: mx.array, key: mx.array, v: mx.array) -> mx.array:
        return (ops.kv_attention(q, key, v, scale=0.3, starts=starts) * w).sum()

    together = mx.grad(packed, (0, 1, 2))(q, key, v)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)

        def alone(q: mx.array, key: mx.array, v: mx.array, part: slice = part) -> mx.array:
            return (ops.kv_attention(q, key, v, scale=0.3) * w[:, :, part]).sum()

        apart = mx.grad(alone, (0, 1, 2))(*(x[:, :, part] for x in (q, key, v)))
        for a, b in zip(apart, together, strict=True):
            assert mx.abs(a - b[:, :, part]).max() < 1e-5
        begin += length


def test_each_row_of_a_batch_has_its_own_documents() -> None:
    b, h, k, length, d = 2, 4, 2, 150, 32
    q, key, v, w = (normal(i, b, n, length, d) for i, n in ((1, h), (2, k), (3, k), (4, h)))
    starts = mx.array(np.stack([np.repeat([0, 40, 90], [40, 50, 60]), np.repeat([0, 3, 130], [3, 127, 20])]))

    def loss(attention: Function, q: mx.array, key: mx.array, v: mx.array) -> mx.array:
        return (attention(q, key, v) * w).sum()

    def ours(*a: mx.array) -> mx.array:
        return ops.kv_attention(*a, scale=0.3, starts=starts)

    def theirs(*a: mx.array) -> mx.array:
        return kv_attention.reference(*a, scale=0.3, offset=0, starts=starts)

    assert mx.abs(ours(q, key, v) - theirs(q, key, v)).max() < 1e-5
    found, want = (mx.grad(lambda *a, f=f: loss(f, *a), (0, 1, 2))(q, key, v) for f in (ours, theirs))
    for a, b_ in zip(found, want, strict=True):
        assert mx.abs(a - b_).max() < 2e-5


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k = normal(1, 1, 2, 3, 8), normal(2, 1, 1, 3, 8)
    starts = mx.array([[0, 3, 0]])
    assert (ops.kv_attention(q, k, k, scale=1.0, starts=starts)[:, :, 1] == 0).all()
    grad = mx.grad(lambda q: ops.kv_attention(q, k, k, scale=1.0, starts=starts).sum())(q)
    assert mx.isfinite(grad).all()


def test_nan_reaches_exactly_the_results_that_depend_on_it() -> None:
    q, k, v = normal(1, 1, 2, 9, 16), normal(2, 1, 2, 9, 16), normal(3, 1, 2, 9, 16)
    spoilt = np.array(k)
    spoilt[0, 1, 4, 2] = np.nan
    bad = np.isnan(np.array(ops.kv_attention(q, mx.array(spoilt), v, scale=0.25))).all(axis=-1)[0]
    assert not bad[0].any()
    assert bad[1].tolist() == [False] * 4 + [True] * 5
    assert np.isnan(np.array(ops.rms_norm(mx.array([[1.0, mx.nan], [1.0, 2.0]]), mx.ones((2,)), 0.0))).tolist() == [
        [True, True],
        [False, False],
    ]


def test_adamw_equals_the_reference_over_several_steps() -> None:
    state = [normal(1, 3, 1003), mx.zeros((3, 1003)), mx.zeros((3, 1003))]
    ours, theirs = list(state), list(state)
    for step in range(1, 5):
        how = adamw_kernel.Step(step, 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.5)
        g = normal(10 + step, 3, 1003)
        ours = list(adamw_kernel.adamw(ours[0], g, *ours[1:], how))
        theirs = list(adamw_kernel.reference(theirs[0], g, *theirs[1:], how))
    for a, b in zip(ours, theirs, strict=True):
        assert mx.abs(a - b).max() < 2e-6


def test_the_norm_counts_every_element_of_every_array() -> None:
    arrays = [normal(1, 70_001), normal(2, 3, 5), mx.zeros((0,)), normal(3, 4097)]
    for at in (0, 4095, 4096, 65_535, 65_536, 70_000):  # the ends of what is summed up at a time
        arrays[0][at] = 20 + at / 1e4
    want = np.sqrt(sum(float((np.array(a, np.float64) ** 2).sum()) for a in arrays))
    assert float(adamw_kernel.norm(arrays)) == pytest.approx(want, rel=1e-6)


def test_wrong_input_is_refused_before_anything_runs() -> None:
    x = mx.ones((2, 8))
    for call in (
        lambda: ops.rms_norm(x.astype(mx.bfloat16), mx.ones((8,)), 1e-5),
        lambda: ops.rms_norm(x, mx.ones((7,)), 1e-5),
        lambda: ops.swiglu(x, mx.ones((8, 2))),
        lambda: ops.cross_entropy(x, mx.zeros((2,))),
        lambda: ops.cross_entropy(x, mx.array([1])),
        lambda: ops.rope(mx.ones((1, 1, 2, 6)), mx.ones((3, 3)), mx.ones((3, 3))),
        lambda: ops.kv_attention(mx.ones((1, 3, 2, 4)), mx.ones((1, 2, 2, 4)), mx.ones((1, 2, 2, 4)), scale=1.0),
        lambda: ops.kv_attention(mx.ones((1, 2, 3, 4)), mx.ones((1, 2, 2, 4)), mx.ones((1, 2, 2, 4)), scale=1.0),
    ):
        with pytest.raises(ValueError, match=":"):
            call()


def test_results_do_not_depend_on_when_they_are_evaluated_and_inputs_keep_their_values() -> None:
    # Buffers are reused only where nobody else holds them.
    gate, up = normal(1, 64, 96), normal(2, 64, 96)
    kept = np.array(gate), np.array(up)
    value, grads = mx.value_and_grad(lambda g, u: ops.swiglu(g, u).sum(), (0, 1))(gate, up)
    mx.eval(value, grads)
    assert (np.array(gate) == kept[0]).all()
    assert (np.array(up) == kept[1]).all()
    logits, targets = normal(3, 6, 40), mx.array([1, 2, 3, 4, 5, 6])
    before = np.array(logits)
    mx.eval(mx.grad(lambda x: ops.cross_entropy(x, targets).sum())(logits))
    assert (np.array(logits) == before).all()


def test_a_compiled_step_gives_the_same_numbers() -> None:
    x, w, t = normal(1, 12, 32), normal(2, 50, 32, scale=0.3), mx.arange(12)

    def loss(w: mx.array) -> mx.array:
        h = ops.rms_norm(ops.swiglu(x, x + 1), mx.ones((32,)), 1e-5)
        return ops.cross_entropy(h @ w.T, t).mean()

    assert mx.allclose(mx.compile(mx.grad(loss))(w), mx.grad(loss)(w), rtol=1e-5, atol=1e-7)


def test_a_compiled_function_takes_two_settings_of_an_operation_for_two() -> None:
    """MLX drops one of two nodes that count as equal and have the same inputs, as it knows of arguments alone."""
    x, w = normal(1, 1, 2, 3, 64), normal(2, 64)
    table, packed = (mx.cos(normal(3, 3, 32)), mx.sin(normal(3, 3, 32))), mx.quantize(normal(4, 5, 64), group_size=32)

    def both(x: mx.array, w: mx.array, table: Sequence[mx.array], packed: Sequence[mx.array]) -> list[mx.array]:
        how = {"group_size": 32, "bits": 4}
        return [
            *(ops.rms_norm(x, w, eps) for eps in (1e-5, 2.0)),
            *(ops.rope(x, *table, inverse=inverse) for inverse in (False, True)),
            *(ops.kv_attention(x, x, x, scale=scale) for scale in (0.01, 0.05)),
            *(ops.quant_linear(x, [tuple(packed)], **how, norm=(w, eps))[0] for eps in (1e-5, 2.0)),
        ]

    plain, compiled = (f(x, w, table, packed) for f in (both, mx.compile(both)))
    for i, (a, b) in enumerate(zip(plain, compiled, strict=True)):
        assert mx.allclose(a, b, atol=1e-6), i
        assert mx.abs(a - plain[i ^ 1]).max() > 1e-2


@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_instruction_set_and_number_of_threads_agrees(isa: str, threads: str) -> None:
    names = "rms_norm or attention_and or cross_entropy_and or overflows or nan_reaches or adamw or nan_and"
    done = run_again(__file__, f"({names}) and not instruction", isa, threads)
    assert "not available" not in done.stderr


@pytest.mark.parametrize("n_tokens", [3, 70])  # few queries, and tiles of them
def test_document_starts_that_no_key_has_are_no_keys_at_all(n_tokens: int) -> None:
    q, k, v = (normal(i, 1, 2, n_tokens, 16) for i in range(3))
    for wrong in (-(2**31), -5, n_tokens, n_tokens + 1000, 2**31 - 1):
        starts = mx.full((1, n_tokens), wrong, mx.int32)
        want = ops.kv_attention(q, k, v, scale=0.5) if wrong < 0 else mx.zeros_like(q)
        got = ops.kv_attention(q, k, v, scale=0.5, starts=starts)
        assert np.abs(np.array(got) - np.array(want)).max() < 1e-5
        grads = mx.grad(lambda *a, s=starts: ops.kv_attention(*a, scale=0.5, starts=s).sum(), (0, 1, 2))(q, k, v)
        assert all(bool(mx.all(mx.isfinite(g)).item()) for g in grads)


@pytest.mark.parametrize("wrong", [7, 2**31 - 1])
def test_a_target_beyond_the_row_gives_nan_and_touches_nothing_else(wrong: int) -> None:
    logits = normal(1, 5, 7)
    losses = ops.cross_entropy(logits, mx.array([0, 1, wrong, 2, 3]))
    assert np.isnan(np.array(losses)).tolist() == [False, False, True, False, False]
    grad = mx.grad(lambda x: ops.cross_entropy(x, mx.array([0, 1, wrong, 2, 3]))[mx.array([0, 1, 3, 4])].sum())(logits)
    assert np.isfinite(np.array(grad)).all()
