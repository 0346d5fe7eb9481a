"""A row's results are its own: the same bits alone, among others of its sequence, beside others, in any chunks.

Passing is not luck: random numbers are summed over hundreds of terms, so another order of any sum shows in the last
bits of some of the thousands of values that are compared, and keys of 4 bits make whole steps of such a bit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from kernels.instruction_sets import run_again

from mlx_codellama.cache import make_sequence
from mlx_codellama.config import ModelArgs
from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.decoder_block import Held, Products, Span, Weights, decoder_blocks
from mlx_codellama.kernels.kv_attention_segments import Segment, kv_attention_segments
from mlx_codellama.kernels.packed_kv import RowFormat
from mlx_codellama.kernels.quant_matmul import quant_linear
from mlx_codellama.kernels.rope import RopeTable
from mlx_codellama.loader import random_model
from mlx_codellama.memory import with_bits
from mlx_codellama.model import Model
from mlx_codellama.storage import KVStorage

ops = pytest.importorskip("mlx_codellama_cpu.ops", reason="mlx-codellama-cpu is not installed (make ext)")
pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are switched off")

Array = npt.NDArray[Any]
STORAGE = [None, KVStorage(16, 16), KVStorage(8, 8), KVStorage(8, 4), KVStorage(4, 4)]
HEADS = [(4, 4, 64), (3, 1, 128), (8, 1, 64)]  # of queries, of keys, and their width


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def model(heads: tuple[int, int, int], exact: bool) -> Model:
    args = ModelArgs(
        hidden_size=192, num_hidden_layers=2, intermediate_size=320, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], head_dim=heads[2], vocab_size=96, rms_norm_eps=1e-5, max_position_embeddings=512,
        rope_theta=1e4, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(with_bits(args, 4, 64), seed=3, exact=exact)


def passes(m: Model, storage: KVStorage | None, prompt: int, lengths: tuple[int, ...]) -> list[Array]:
    """Logits of the tokens after a prompt, read in passes of these lengths, and the cache's bytes at the end."""
    ids = mx.array([[(7 * i * i + 5 * i) % 96 for i in range(prompt + sum(lengths))]], mx.int32)
    sequence, at, logits = make_sequence(m.args, storage), prompt, []
    m(ids[:, :prompt], [(sequence, prompt)])
    for n in lengths:
        logits.append(np.array(m(ids[:, at : at + n], [(sequence, n)], prompt=False))[0])
        at += n
    return [np.concatenate(logits), *(np.array(a) for state in sequence.state() for a in state.values())]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_tokens_of_a_draft_are_those_read_one_by_one(
    storage: KVStorage | None, heads: tuple[int, int, int], exact: bool
) -> None:
    m = model(heads, exact)
    want = passes(m, storage, 251, (1,) * 9)  # across the end of a split of keys
    for lengths in ((8, 1), (3, 4, 2), (2, 7)):
        for a, b in zip(passes(m, storage, 251, lengths), want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_a_prompt_is_the_same_in_any_chunks(storage: KVStorage | None, exact: bool) -> None:
    m, n = model((3, 1, 64), exact), 300
    ids = mx.array([[(7 * i * i + 5 * i) % 96 for i in range(n)]], mx.int32)

    def chunks(size: int) -> list[Array]:
        sequence = make_sequence(m.args, storage)
        parts = [ids[:, i : i + size] for i in range(0, n, size)]
        logits = [np.array(m(part, [(sequence, part.shape[1])], prompt=True))[0] for part in parts]
        return [np.concatenate(logits), *(np.array(a) for state in sequence.state() for a in state.values())]

    want = chunks(n)
    for size in (7, 64, 256, 299):
        for a, b in zip(chunks(size), want, strict=True):
            np.testing.assert_array_equal(a, b)


def layer(rng: np.random.Generator, exact: bool, embed: int = 192, inner: int = 320) -> Weights:
    heads, kv_heads, width = 6, 2, 64

    def products(depth: int, *outs: int) -> Products:
        packed = []
        for n in outs:
            dense = mx.array(rng.standard_normal((n, depth), np.float32) / depth**0.5)
            packed.append(tuple(mx.quantize(dense, group_size=64, bits=4)))
        return Products(packed, 64, 4, exact)  # type: ignore[arg-type]

    norms = [mx.array(1 + rng.standard_normal(embed, np.float32) / 9) for _ in range(2)]
    qkv = products(embed, heads * width, kv_heads * width, kv_heads * width)
    out, gate_up, down = products(heads * width, embed), products(embed, inner, inner), products(inner, embed)
    return Weights((norms[0], 1e-5), qkv, out, (norms[1], 1e-5), gate_up, down, heads, kv_heads)


@pytest.mark.parametrize("fmt", [None, mx.float16, RowFormat(64, 8, 4), RowFormat(64, 4, 4)], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_sequences_in_one_step_are_as_each_alone(fmt: Any, exact: bool) -> None:
    """Three sequences, of which two share their first tokens, and with segments that end anywhere."""
    rng = np.random.default_rng(5)
    layers, table = [layer(rng, exact) for _ in range(2)], RopeTable(64, 1e4)
    packed = fmt if isinstance(fmt, RowFormat) else None

    def storage(n: int) -> list[mx.array]:
        k, v = (mx.array(rng.standard_normal((1, 2, n, 64), np.float32)) for _ in range(2))
        if packed:
            return [packed.pack(k, v)]
        return [a.astype(fmt) if fmt else a for a in (k, v)]

    shared = [Segment(storage(260), 256) for _ in layers]
    more = [Segment(storage(40), 33) for _ in layers]
    # by sequence: its segments by layer, tokens in its tail before the new ones, and how many new ones
    texts: list[tuple[list[list[Segment]], int, int]] = [
        ([[a] for a in shared], 5, 3),
        ([[], []], 310, 1),
        ([[a, b] for a, b in zip(shared, more, strict=True)], 0, 4),
    ]
    tails = [[storage(held + 9) for _ in layers] for _, held, _ in texts]
    mx.eval([array for tail in tails for arrays in tail for array in arrays])
    xs = [normal(20 + i, 1, n, 192) for i, (_, _, n) in enumerate(texts)]

    def span(i: int, at: int, n: int, tail: list[list[mx.array]]) -> tuple[Span, mx.array, mx.array]:
        """Tokens at … at + n of sequence i, and their angles."""
        segments, held, _ = texts[i]
        before = sum(segment.n_tokens for segment in segments[0])
        place, total = held + at, before + held + at + n
        caches = [Held(arrays, place, total, packed, each) for arrays, each in zip(tail, segments, strict=True)]
        return Span(n, caches), *table.rows(total - n, n)

    def step(spans: list[tuple[Span, mx.array, mx.array]], x: mx.array) -> tuple[mx.array, list[list[list[mx.array]]]]:
        cos, sin = (mx.concatenate([one[j] for one in spans]) for j in (1, 2))  # type: ignore[misc]
        done = decoder_blocks(x, layers, cos, sin, [one[0] for one in spans], scale=0.125)
        assert done is not None
        return done

    together, stored = step([span(i, 0, n, tails[i]) for i, (_, _, n) in enumerate(texts)], mx.concatenate(xs, axis=1))
    first = 0
    for i, (_, _, n) in enumerate(texts):
        tail = tails[i]
        for t in range(n):
            alone, ((*tail,),) = step([span(i, t, 1, tail)], xs[i][:, t : t + 1])
            assert mx.array_equal(alone[0, 0], together[0, first + t])
        first += n
        for a, b in zip(
            [a for arrays in tail for a in arrays], [a for arrays in stored[i] for a in arrays], strict=True
        ):
            np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("fmt", [None, mx.float16, RowFormat(64, 8, 4), RowFormat(64, 4, 4)], ids=str)
@pytest.mark.parametrize("share", [1, 3, 8])
def test_attention_of_a_prompt_is_the_same_in_any_chunks_and_segments(fmt: Any, share: int) -> None:
    total, length = 1100, 90
    k, v = normal(1, 1, 2, total, 64) * 3, normal(2, 1, 2, total, 64)
    q = normal(3, 1, 2 * share, length, 64) * 3  # scores of some hundreds
    packed = fmt if isinstance(fmt, RowFormat) else None
    arrays = [packed.pack(k, v)] if packed else [a.astype(fmt) if fmt else a for a in (k, v)]

    def chunks(size: int, *ends: int) -> Array:
        found = []
        for i in range(0, length, size):
            n = min(size, length - i)
            seen, start, segments = total - length + i + n, 0, []
            for end in (*ends, seen):
                if start < min(end, seen):
                    segments.append(Segment([a[:, :, start:end] for a in arrays], min(end, seen) - start))
                    start = min(end, seen)
            found.append(kv_attention_segments(q[:, :, i : i + n], segments, packed, scale=0.125, prompt=True))
        return np.array(mx.concatenate(found, axis=2))

    want = chunks(length)
    for size, ends in ((1, ()), (7, ()), (64, (256, 512)), (length, (100, 101, 1024)), (33, (1050,))):
        np.testing.assert_array_equal(chunks(size, *ends), want)
    assert dispatch.paths()["kv_attention_rows" if packed else "kv_attention"].startswith("native")


@pytest.mark.parametrize("exact", [True, False])
def test_products_of_a_prompt_are_the_same_in_any_chunks(exact: bool) -> None:
    rng = np.random.default_rng(2)
    dense = [mx.array(rng.standard_normal((100, 448), np.float32)) for _ in range(2)]
    packed: Any = [tuple(mx.quantize(a, group_size=64, bits=4)) for a in dense]
    x, norm = normal(1, 1, 150, 448), (normal(2, 448), 1e-5)
    how: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine", "exact": exact, "norm": norm, "gated": True}

    def chunks(x: mx.array, size: int, prompt: bool = True) -> Array:
        parts = [x[:, i : i + size] for i in range(0, x.shape[1], size)]
        return np.concatenate([np.array(quant_linear(part, packed, **how, prompt=prompt)[0][0]) for part in parts])

    want = chunks(x, 150)
    for size in (1, 3, 7, 64):
        np.testing.assert_array_equal(chunks(x, size), want)
    few = chunks(x[:, :8], 1, prompt=False)
    for size in (2, 3, 5, 8):
        np.testing.assert_array_equal(chunks(x[:, :8], size, prompt=False), few)


@pytest.mark.parametrize(("isa", "threads"), [("avx512", "1"), ("avx2", "3"), ("portable", "2")])
def test_every_instruction_set_and_number_of_threads_keeps_it(isa: str, threads: str) -> None:
    run_again(__file__, "not every_instruction", isa, threads)
