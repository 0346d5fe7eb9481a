"""kv_attention against its reference, and the reference against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.kv_attention import kv_attention, reference

# H, K, L, T, D pairwise different within a case: an axis mixed up cannot pass.
CASES = [(4, 2, 3, 7, 8), (6, 6, 5, 5, 16), (8, 1, 1, 9, 4), (3, 3, 1, 1, 2), (2, 1, 17, 40, 64)]


def arrays(h, k, l, t, d, dtype=mx.float32):
    rng = np.random.default_rng(h * 1000 + t)
    return [
        mx.array(rng.standard_normal((2, n, m, d)).astype(np.float32)).astype(dtype)
        for n, m in [(h, l), (k, t), (k, t)]
    ]


def float64_attention(q, k, v, scale, offset):
    q, k, v = (np.asarray(a.astype(mx.float32), np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, h, i in np.ndindex(q.shape[:3]):
        kv = h // (q.shape[1] // k.shape[1])
        scores = scale * k[b, kv, : offset + i + 1] @ q[b, h, i]
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ v[b, kv, : offset + i + 1]
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_causal_grouped_attention(case):
    q, k, v = arrays(*case)
    offset = case[3] - case[2]
    got = np.asarray(reference(q, k, v, scale=0.37, offset=offset))
    # float32 accumulation over at most 64 products of size ~1
    np.testing.assert_allclose(got, float64_attention(q, k, v, 0.37, offset), atol=3e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_path_errs_at_most_twice_as_much_as_the_reference(case, dtype):
    q, k, v = arrays(*case, dtype=dtype)
    offset = case[3] - case[2]
    truth = float64_attention(q, k, v, 0.37, offset)

    def error(out):
        assert out.dtype == dtype
        return np.abs(np.asarray(out.astype(mx.float32), np.float64) - truth).max()

    allowed = 2 * error(reference(q, k, v, scale=0.37, offset=offset)) + 1e-6
    assert error(kv_attention(q, k, v, scale=0.37, offset=offset)) <= allowed
    assert "kv_attention" in dispatch.paths()


def test_packed_documents_are_apart():
    """Queries that start at key 4 see what they would see alone; both paths of this machine agree."""
    q, k, v = arrays(4, 2, 9, 9, 8)
    starts = mx.array([[0] * 4 + [4] * 5] * 2)
    alone = reference(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], scale=0.37, offset=0)
    for function in (reference, kv_attention):
        out = function(q, k, v, scale=0.37, offset=0, starts=starts)
        np.testing.assert_allclose(np.asarray(out[:, :, 4:]), np.asarray(alone), atol=2e-6)
        whole = function(q, k, v, scale=0.37, offset=0)
        assert np.abs(np.asarray(whole[:, :, 4:] - alone)).max() > 0.01


def test_keys_that_do_not_match_the_offset_are_refused():
    q, k, v = arrays(2, 1, 3, 7, 8)
    with pytest.raises(ValueError, match="7 keys for 5 cached and 3 new"):
        kv_attention(q, k, v, scale=1.0, offset=5)
