"""rms_norm, swiglu and cross_entropy against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels import cross_entropy, rms_norm, swiglu, zeros
from mlx_codellama.kernels.cross_entropy import IGNORE

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def wide(array):
    return np.asarray(array.astype(mx.float32), np.float64)


def random(*shape, dtype=mx.float32, seed=1):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 7), (0, 2, 9)], ids=str)
def test_rms_norm_errs_at_most_twice_as_much_as_its_reference(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=2)
    truth = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-5) * wide(weight)
    plain = np.abs(wide(rms_norm.reference(x, weight, 1e-5)) - truth).max(initial=0)
    assert np.abs(wide(rms_norm.rms_norm(x, weight, 1e-5)) - truth).max(initial=0) <= 2 * plain + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_errs_at_most_twice_as_much_as_its_reference(dtype):
    gate, up = 3 * random(2, 5, 11, dtype=dtype), random(2, 5, 11, dtype=dtype, seed=2)
    truth = wide(gate) / (1 + np.exp(-wide(gate))) * wide(up)
    plain = np.abs(wide(swiglu.reference(gate, up)) - truth).max()
    assert np.abs(wide(swiglu.swiglu(gate, up)) - truth).max() <= 2 * plain + 1e-6


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.uint32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 700, 517), (1, 3, 0, 5), (1, 1, 1, 7)], ids=str)
def test_zeros_are_zero_where_there_was_something_else_before(shape, dtype):
    like = mx.ones((1, 1, 1, 1), dtype)
    for _ in range(3):  # what was freed is what malloc gives next, once it knows the size; several threads clear a part
        before = mx.ones(shape, dtype) + like
        mx.eval(before)
        del before
    found, expected = zeros.zeros_like(like, shape), zeros.reference(like, shape)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert not np.asarray(found).any()


def test_two_storages_of_one_shape_are_two():
    like = mx.ones((1, 2, 3, 4))
    first, second = zeros.zeros_like(like, (1, 2, 5, 4)), zeros.zeros_like(like, (1, 2, 5, 4))
    first[:, :, 1:3] = mx.ones((1, 2, 2, 4))
    assert float(first.sum()) == 16
    assert float(second.sum()) == 0


@pytest.mark.parametrize("function", [cross_entropy.reference, cross_entropy.cross_entropy])
def test_cross_entropy_is_the_negative_log_of_softmax(function):
    logits, targets = 5 * random(7, 13), mx.array([0, 12, 5, IGNORE, 3, 3, IGNORE])
    exact = wide(logits) - np.log(np.exp(wide(logits)).sum(-1, keepdims=True))
    truth = [-exact[i, t] if t != IGNORE else 0 for i, t in enumerate(targets.tolist())]
    np.testing.assert_allclose(np.asarray(function(logits, targets)), truth, atol=3e-6)


@pytest.mark.parametrize("function", [cross_entropy.reference, cross_entropy.cross_entropy])
def test_gradient_of_cross_entropy_is_softmax_minus_one_hot(function):
    logits, targets = 5 * random(4, 9), mx.array([8, IGNORE, 0, 2])
    gradient = mx.grad(lambda x: (function(x, targets) * mx.array([1.0, 2.0, 3.0, 4.0])).sum())(logits)
    softmax = np.exp(wide(logits)) / np.exp(wide(logits)).sum(-1, keepdims=True)
    truth = softmax - np.eye(9)[[8, 0, 0, 2]]
    truth[1] = 0
    np.testing.assert_allclose(np.asarray(gradient), truth * [[1], [2], [3], [4]], atol=2e-6)
