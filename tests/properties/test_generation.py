"""What must not change anything: chunk sizes, trimming, reuse of a cache, and how text is cut into tokens."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.meta_reference import forward, random_weights
from stand_ins import GEOMETRY, saying, tiny_codellama, tiny_model, tiny_tokenizer

from mlx_codellama.api import CodeLlama
from mlx_codellama.api.stopping import StopMatcher
from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.engine import generate
from mlx_codellama.sampling import SamplingParams

IDS = np.random.RandomState(8).randint(3, 400, 61).tolist()
RNG = np.random.RandomState


@functools.lru_cache
def truth() -> np.ndarray:
    """float64 logits [61, V] of IDS."""
    return forward(random_weights(GEOMETRY, seed=5), GEOMETRY, [IDS])[0]


@functools.lru_cache
def bound() -> float:
    """Twice the largest error of a plain float32 pass: what any order of the same operations may be off by."""
    plain = forward(random_weights(GEOMETRY, seed=5), GEOMETRY, [IDS], dtype=np.float32)[0]
    return 2 * float(np.abs(plain - truth()).max())


def cached_logits(cache: Sequence, ids: list[int], cuts: list[int]) -> np.ndarray:
    """Feed ids to the tiny model in pieces that end at `cuts`; logits of all of them."""
    parts, start = [], 0
    for end in [*cuts, len(ids)]:
        if end > start:
            parts.append(np.array(tiny_model()(mx.array([ids[start:end]]), [(cache, end - start)])[0]))
            start = end
    return np.concatenate(parts)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, 60)))
def test_chunked_prefill_equals_one_pass(cuts: set[int]) -> None:
    # A cache that lost, repeated or misplaced one token is off by order 1, some 10^5 times the bound.
    logits = cached_logits(make_sequence(tiny_model().args), IDS, sorted(cuts))
    assert np.abs(logits - truth()).max() <= bound()


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 60, 61, 62, 512])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=3)], ids=str)
def test_generated_ids_do_not_depend_on_the_chunk_size(chunk: int, params: SamplingParams) -> None:
    def ids(prefill_chunk: int | None) -> list[int | None]:
        steps = generate(tiny_model(), IDS, max_tokens=16, params=params, prefill_chunk=prefill_chunk)
        return [step.id for step in steps]

    assert ids(chunk) == ids(None)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=3), st.integers(0, 60))
def test_trimmed_equals_never_appended(detours: list[tuple[int, int]], keep: int) -> None:
    """Wander off and come back any number of times (300 tokens cross a growth step), then read IDS."""
    cache = make_sequence(tiny_model().args)
    for n, (length, back) in enumerate(detours):
        cached_logits(cache, RNG(n).randint(3, 400, length).tolist(), [])
        cache.trim(back)
    cache.trim(cache.offset)
    cached_logits(cache, [*IDS[:keep], 7, 7, 7], [keep])
    cache.trim(3)
    assert np.abs(cached_logits(cache, IDS[keep:], []) - truth()[keep:]).max() <= bound()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from([{}, {"temperature": 0.9, "seed": 4}]),
)
def test_a_reused_cache_equals_a_fresh_one(calls: list[tuple[int, int, int]], options: dict) -> None:
    """Prompts that share a beginning, then differ, become shorter, or are the same again."""
    reusing = tiny_codellama()
    for shared, extra, seed in calls:
        prompt = [1, *IDS[:shared], *RNG(seed).randint(3, 400, extra).tolist()]
        again = reusing.complete(prompt, max_tokens=9, **options)
        fresh = tiny_codellama().complete(prompt, max_tokens=9, **options)
        assert (again.ids, again.text) == (fresh.ids, fresh.text)
        assert fresh.stats.cached_tokens == 0


def test_the_reuse_that_was_tested_is_real() -> None:
    m = tiny_codellama()
    first = m.complete([1, *IDS], max_tokens=5)
    assert m.complete([1, *IDS, *first.ids, 9], max_tokens=1).stats.cached_tokens == 66  # but the unread last
    assert m.complete([1, *IDS], max_tokens=1).stats.cached_tokens == 61  # all but one: the last must be read
    assert m.complete([1, *IDS[:20], 399], max_tokens=1).stats.cached_tokens == 21
    m.forget()
    assert m.complete([1, *IDS], max_tokens=1).stats.cached_tokens == 0


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ALPHABET = "ab\n é🙂"
TEXTS = st.text(ALPHABET, max_size=40)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=3)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read the text one character longer each time until str.find finds a stop string in it."""
    for end in range(len(text) + 1):
        found = [(text[:end].find(s), s) for s in stops if text[:end].find(s) >= 0]
        if found:
            start, stop = min(found)
            return text[:start], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(TEXTS, STOPS, st.sets(st.integers(1, 39)))
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: set[int]) -> None:
    matcher, shown, start = StopMatcher(stops), "", 0
    expected, stop = cut_at_stop(text, stops)
    for end in [*sorted(cut for cut in cuts if cut < len(text)), len(text)]:
        shown += matcher.feed(text[start:end])
        start = end
        assert expected.startswith(shown)  # nothing is shown that would have to be taken back
        seen, done = cut_at_stop(text[:end], stops)
        assert (matcher.matched is not None) == (done is not None)  # the end is noticed as soon as it is there
        if done is None:
            # held back is only what may become a stop string
            held = seen[len(shown) :]
            assert not held or any(s.startswith(held) and s != held for s in stops)
    shown += matcher.finish()
    assert (shown, matcher.matched) == (expected, stop)


@settings(max_examples=60, deadline=None)
@given(TEXTS, STOPS, st.booleans())
def test_streamed_pieces_join_to_the_text_of_one_call(text: str, stops: list[str], bytewise: bool) -> None:
    tok = tiny_tokenizer()
    ids = [i for c in text for i in tok.encode_infilling(c)] if bytewise else tok.encode_infilling(text)
    assert tok.decode_infilling(ids) == text

    def model() -> CodeLlama:
        return CodeLlama(saying(tok, ids, after=2), tok)  # type: ignore[arg-type]

    whole = model().complete([1, 5], stop=stops)
    stream = model().stream_complete([1, 5], stop=stops)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == whole.text == stream.result.text
    assert (whole.text, whole.stop) == cut_at_stop(text, stops)
    assert whole.finish_reason == "stop"
    # The ids are those of the text, and no more than the text needs.
    assert whole.ids == ids[: len(whole.ids)]
    assert tok.decode_infilling(whole.ids).rstrip("\ufffd").startswith(whole.text) or not whole.text
    if whole.stop is not None and whole.ids:
        assert len(tok.decode_infilling(whole.ids[:-1]).rstrip("\ufffd")) < len(whole.text)
    if whole.stop is None:
        assert whole.ids == ids
