"""The key-value cache, in every storage, against the plain thing: a concatenation of everything appended."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.cache import STEP, Floats, KVCache, Rows, WindowCache, make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import ConfigError
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.rope import RopeTable
from mlx_codellama.storage import SPARE, KVStorage

B, K, D = 2, 3, 32
FORMATS = {"8": RowFormat(D, 8, 8), "4": RowFormat(D, 4, 4), "8/4": RowFormat(D, 8, 4), "4/16": RowFormat(D, 4, 16)}
ENCODINGS = {"float": Floats(), "16": Floats(half=True), **{name: Rows(fmt) for name, fmt in FORMATS.items()}}


@pytest.fixture(params=ENCODINGS)
def new(request: pytest.FixtureRequest) -> Callable[[], KVCache]:
    """Makes empty caches of one kind."""
    return lambda: KVCache(ENCODINGS[request.param])


def some(n_tokens: int, seed: int, width: int = D, heads: int = K) -> mx.array:
    return mx.random.normal((B, heads, n_tokens, width), key=mx.random.key(seed))


def stored(cache: KVCache, x: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """What appending x as keys and -x as values leaves of them, by the encoding itself."""
    keys, values = cache.encoding.decode(cache.encoding.encode(x, -x))
    return np.array(keys), np.array(values)


def check(cache: KVCache, x: mx.array) -> None:
    """The cache holds exactly x and -x."""
    for ours, theirs in zip(cache.held(), stored(cache, x), strict=True):
        assert ours.shape == (B, K, x.shape[2], D)
        assert np.array_equal(np.array(ours), theirs)


def attend(cache: KVCache, q: mx.array, k: mx.array, v: mx.array, table: RopeTable) -> mx.array:
    """One layer's pass over the tokens that follow those held."""
    turned, new = cache.encoding.rotate_and_encode(q, k, v, *table.rows(cache.offset, q.shape[2]))
    out = cache.attend(turned, new, scale=D**-0.5)
    cache.advance(q.shape[2])
    return out


def test_it_holds_everything_appended_so_far(new: Callable[[], KVCache]) -> None:
    cache, parts = new(), []
    for seed, n in enumerate([5, 1, 1, STEP, 7, 2 * STEP + 1]):  # crosses a step twice, once by more than a step
        parts.append(some(n, seed))
        cache.append(parts[-1], -parts[-1])
        check(cache, mx.concatenate(parts, axis=2))
    assert cache.offset == 14 + 3 * STEP + 1
    assert (cache.dropped, cache.trimmable) == (0, cache.offset)


def test_storage_grows_in_steps_only(new: Callable[[], KVCache]) -> None:
    cache, capacities = new(), []
    for seed in range(STEP + 2):
        cache.append(some(1, seed), some(1, seed))
        capacities.append(cache.capacity)
        assert cache.capacity == KVStorage().tokens(cache.offset)
    assert sorted(set(capacities)) == [64, 128, 192, STEP, 2 * STEP]
    assert capacities[STEP - 1] == STEP
    assert cache.nbytes == sum(array.nbytes for array in cache.arrays)


def test_reserved_storage_is_allocated_at_once(new: Callable[[], KVCache]) -> None:
    cache = new()
    cache.append(some(1, 0), some(1, 1))
    cache.reserve(3 * STEP + 1)
    cache.append(some(STEP, 2), some(STEP, 3))
    assert cache.capacity == 4 * STEP
    assert cache.offset == STEP + 1


def test_trimmed_tokens_leave_no_trace(new: Callable[[], KVCache]) -> None:
    cache = new()
    first, wrong, right = some(9, 1), some(STEP, 2), some(4, 3)
    cache.append(first, -first)
    cache.append(wrong, -wrong)
    assert cache.trim(STEP) == STEP
    cache.append(right, -right)
    check(cache, mx.concatenate([first, right], axis=2))


def test_trim_forgets_at_most_everything(new: Callable[[], KVCache]) -> None:
    cache = new()
    cache.append(some(6, 0), some(6, 0))
    assert (cache.trim(2), cache.offset) == (2, 4)
    assert (cache.trim(9), cache.offset) == (4, 0)
    with pytest.raises(ValueError, match="cannot trim -1"):
        cache.trim(-1)


@pytest.mark.parametrize(
    "other",
    [some(1, 0)[:1], some(1, 0)[:, :2], some(1, 0, width=64), some(1, 0).astype(mx.bfloat16)],
    ids=["batch", "heads", "width", "dtype"],
)
def test_arrays_of_another_kind_are_refused(other: mx.array) -> None:
    cache = KVCache()
    cache.append(some(3, 0), some(3, 0))
    with pytest.raises(ValueError, match="cannot append"):
        cache.append(other, other)
    assert cache.offset == 3


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_a_step_of_generation_writes_in_place(encoding: Floats | Rows) -> None:
    """Copying the storage at each token would cost as much as reading it: seen here as memory, not as time."""
    cache = KVCache(encoding)
    cos, sin = RopeTable(D, 1e4).rows(0, 1)
    cache.reserve(STEP * 32)
    cache.append(some(STEP * 32 - 8, 1), some(STEP * 32 - 8, 2))
    mx.eval(cache.arrays)
    assert len(cache.arrays) <= 2  # slice updates of a step
    for _ in range(2):  # the second step is the one that counts: nothing of the first is left to be made
        mx.clear_cache()
        token = some(1, 3, heads=K)
        mx.eval(token)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cache.encoding.rotate_and_encode(token, token, token, cos, sin)
        cache.append(token, token)
        mx.eval(cache.arrays)
    assert mx.get_active_memory() - before < 4096
    assert mx.get_peak_memory() - before < cache.nbytes / 8


def test_a_packed_cache_takes_the_bytes_of_its_rows() -> None:
    for name, fmt in FORMATS.items():
        cache = KVCache(Rows(fmt))
        cache.append(some(1, 0), some(1, 0))
        assert cache.nbytes == B * K * 64 * fmt.bytes, name
    half, whole = KVCache(Floats(half=True)), KVCache()
    for cache in (half, whole):
        cache.append(some(1, 0), some(1, 0))
    assert (half.nbytes, whole.nbytes) == (B * K * 64 * D * 2 * 2, B * K * 64 * D * 2 * 4)


def test_sixteen_bits_keep_the_type_of_half_wide_activations() -> None:
    for dtype in (mx.bfloat16, mx.float16):
        cache = KVCache(Floats(half=True))
        cache.append(some(1, 0).astype(dtype), some(1, 1).astype(dtype))
        assert {array.dtype for array in cache.arrays} == {dtype}
    cache = KVCache(Floats(half=True))
    cache.append(mx.full((B, K, 1, D), 1e9), mx.full((B, K, 1, D), -1e9))
    assert [array.dtype for array in cache.arrays] == [mx.float16, mx.float16]
    assert all(mx.isfinite(array).all().item() for array in cache.arrays)


def args_with(head_dim: int) -> ModelArgs:
    return ModelArgs(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=head_dim,
        intermediate_size=64,
        vocab_size=50,
        rope_theta=1e4,
        max_position_embeddings=999,
    )


def test_storage_that_the_heads_do_not_allow_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="heads of 24"):
        make_sequence(args_with(24), KVStorage.of(8))
    assert make_sequence(args_with(24), KVStorage.of(16)).offset == 0


# ── window ──────────────────────────────────────────────────────────────────────────────────────────────────────────

H, SINKS, WINDOW, LENGTH = 6, 3, 7, 131  # more than three times round the ring


def float64_window(q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: int, window: int) -> np.ndarray:
    """Each of LENGTH rotated queries over the rotated keys that it may see, one at a time."""
    out = np.zeros_like(q)
    for b, h, p in np.ndindex(q.shape[:3]):
        seen = [j for j in range(p + 1) if j < sinks or j > p - window]
        scores = D**-0.5 * k[b, h // (H // K), seen] @ q[b, h, p]
        weights = np.exp(scores - scores.max())
        out[b, h, p] = weights / weights.sum() @ v[b, h // (H // K), seen]
    return out


def rotated(x: mx.array) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    z = wide[..., : D // 2] + 1j * wide[..., D // 2 :]
    z = z * np.exp(1j * np.arange(x.shape[2])[:, None] * 1e4 ** (-np.arange(0, D, 2) / D))
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [1] * 130,
        [10],
        [2, 40],
        [9, 1, 1, 1, 20, 1, 2, 1, 60, 1, 7],
        [11, 30, 33],
        [40, 34],
        [2, 5, 3, 1, 8, 8, 8, 32, 31, 33],
    ],
    ids=lambda cuts: " ".join(map(str, cuts[:10])),
)
@pytest.mark.parametrize(("sinks", "window"), [(SINKS, WINDOW), (0, 5), (2, 1), (5, 60)])
def test_a_window_attends_to_the_sinks_and_the_last_tokens(sinks: int, window: int, cuts: list[int]) -> None:
    """Against float64 over the kept tokens, at the positions at which they were read; however the text is cut."""
    q, k, v = some(LENGTH, 1, heads=H), some(LENGTH, 2), some(LENGTH, 3)
    truth = float64_window(rotated(q), rotated(k), np.asarray(v, np.float64), sinks, window)
    cache, table, start, out = WindowCache(Floats(), window, sinks), RopeTable(D, 1e4), 0, []
    for end in [*np.cumsum(cuts).tolist(), LENGTH]:
        part = [x[:, :, start:end] for x in (q, k, v)]
        if end > start:
            out.append(attend(cache, *part, table))
        start = end
        assert cache.capacity <= sinks + window + SPARE
    np.testing.assert_allclose(np.asarray(mx.concatenate(out, axis=2)), truth, atol=3e-6)
    assert cache.dropped == max(0, LENGTH - sinks - window)
    assert cache.offset == LENGTH
    kept = [j for j in range(LENGTH) if j < sinks or j >= LENGTH - window]
    np.testing.assert_allclose(np.asarray(cache.held()[0]), rotated(k)[:, :, kept], atol=2e-6)
    assert np.array_equal(np.array(cache.held()[1]), np.array(v)[:, :, kept])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_packed_window_is_the_window_over_packed_values(fmt: RowFormat) -> None:
    q, k, v = some(LENGTH, 1, heads=H), some(LENGTH, 2), some(LENGTH, 3)
    whole = KVCache(Rows(fmt))
    attend(whole, q, k, v, RopeTable(D, 1e4))
    keys, values = (np.asarray(x, np.float64) for x in whole.held())
    truth = float64_window(rotated(q), keys, values, SINKS, WINDOW)
    for cuts in ([20], [12, *[1] * 100], [9] * 14, [50, 2, 50, 2]):
        cache, start, out = WindowCache(Rows(fmt), WINDOW, SINKS), 0, []
        for end in [*np.cumsum(cuts).tolist(), LENGTH]:
            part = [x[:, :, start:end] for x in (q, k, v)]
            out.append(attend(cache, *part, RopeTable(D, 1e4)))
            start = end
        np.testing.assert_allclose(np.asarray(mx.concatenate(out, axis=2)), truth, atol=3e-6)
        assert cache.nbytes == B * K * (SINKS + WINDOW + SPARE) * fmt.bytes


@pytest.mark.parametrize("sinks", [SINKS, 0])
def test_a_window_forgets_what_it_has_not_overwritten(sinks: int) -> None:
    """Passes of all sizes, each followed by a trim of as much as can be forgotten or less: against the plain list."""
    random, ring = np.random.default_rng(5), WINDOW + SPARE
    for _ in range(12):
        cache, kept, undone = WindowCache(Floats(), WINDOW, sinks), mx.zeros((B, K, 0, D)), 0
        for n in random.choice([1, 2, 9, SPARE, SPARE + 1, 70], 14).tolist():
            new = some(n, n)
            cache.append(new, -new)
            kept = mx.concatenate([kept, new], axis=2)
            forget = int(random.integers(0, min(cache.trimmable, n) + 1))
            assert cache.trim(forget) == forget
            kept, undone = kept[:, :, : kept.shape[2] - forget], undone + forget
            assert cache.offset == kept.shape[2]
            sees = [j for j in range(cache.offset) if j < sinks or j >= cache.offset - WINDOW]
            check(cache, kept[:, :, sees] if sees else kept)
        assert undone > 9
        assert cache.capacity <= sinks + ring


def test_at_least_the_last_pass_of_a_window_can_be_taken_back() -> None:
    """However often: that is what a draft of several tokens needs."""
    cache = WindowCache(Floats(), WINDOW, SINKS)
    for n in (60, SPARE, 5, 1, SPARE, 40, 1, 16, 16):
        cache.append(some(n, 1), some(n, 2))
        assert cache.trimmable >= min(n, SPARE)
        cache.trim(min(n, SPARE) - n % 2)


def test_what_a_window_has_overwritten_cannot_come_back() -> None:
    cache = WindowCache(Floats(), WINDOW, SINKS)
    x = some(90, 1)
    cache.append(x[:, :, :42], -x[:, :, :42])
    assert (cache.dropped, cache.trimmable) == (32, 42)  # all are still there
    cache.append(x[:, :, 42:43], -x[:, :, 42:43])
    assert (cache.dropped, cache.trimmable) == (33, SPARE)
    with pytest.raises(ValueError, match="what they displaced is gone"):
        cache.trim(SPARE + 1)
    cache.trim(SPARE - 2)
    assert (cache.offset, cache.trimmable) == (13, 2)
    check(cache, mx.concatenate([x[:, :, :3], x[:, :, 6:13]], axis=2))
    other = cache.share()
    assert other.trimmable == 2
    other.append(x[:, :, 13:], -x[:, :, 13:])
    assert other.trimmable == SPARE
    assert (cache.trimmable, cache.trim(2)) == (2, 2)
    check(cache, mx.concatenate([x[:, :, :3], x[:, :, 4:11]], axis=2))


def test_a_shared_window_goes_its_own_way() -> None:
    cache, x = WindowCache(Floats(), WINDOW, SINKS), some(66, 1)
    cache.append(x[:, :, :64], -x[:, :, :64])
    branch = cache.share()
    for n in (64, 65):
        branch.append(x[:, :, n : n + 1], -x[:, :, n : n + 1])
    check(branch, mx.concatenate([x[:, :, :3], x[:, :, 59:66]], axis=2))
    check(cache, mx.concatenate([x[:, :, :3], x[:, :, 57:64]], axis=2))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kv_bits": 5}, "cannot have 5 bits"),
        ({"kv_bits": True}, "True bits"),
        ({"kv_bits": (8,)}, r"\(8,\)"),
        ({"kv_bits": (None, 4)}, "keys have bits"),
        ({"kv_bits": 4, "window": 0}, "window of 0"),
        ({"kv_bits": 4, "window": 9, "sinks": -1}, "sinks is -1"),
    ],
)
def test_storages_that_cannot_be_are_refused(wrong: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        KVStorage.of(**wrong)
    assert caught.value.hint or "sinks" in match
