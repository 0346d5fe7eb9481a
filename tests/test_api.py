"""The Python face: text in, text out, on models whose answer is known."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from oracles.meta_reference import forward, hf_config, random_weights, to_hf
from stand_ins import CONTEXT, GEOMETRY, ScriptedModel, saying, tiny_codellama, tiny_tokenizer

import mlx_codellama
from mlx_codellama.api import CodeLlama, Completion, StopMatcher, codellama
from mlx_codellama.errors import (
    CheckpointError,
    ConfigError,
    ContextOverflowError,
    NotSupported,
    PromptError,
)
from mlx_codellama.prompts import chat_ids, infill_ids
from mlx_codellama.tokenizer import Tokenizer

TOK = tiny_tokenizer()
PROMPT = "def f(x):"


def answering(ids: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer = TOK) -> CodeLlama:
    """A CodeLlama that answers exactly this prompt with these ids, then eos."""
    return CodeLlama(saying(tokenizer, ids, after=len(prompt)), tokenizer)  # type: ignore[arg-type]


def completing(text: str, prompt: str = PROMPT) -> CodeLlama:
    return answering(TOK.encode_infilling(text), TOK.encode(prompt, bos=True))


# ── the three calls ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_complete_keeps_leading_spaces_and_stops_at_the_end_of_sequence() -> None:
    r = completing("    return  x\n").complete(PROMPT)
    assert r.text == "    return  x\n"
    assert r.ids == TOK.encode_infilling("    return  x\n")
    assert r.finish_reason == "stop"
    assert r.stop is None
    assert TOK.eos_id not in r.ids


def test_complete_takes_ids_as_the_whole_prompt() -> None:
    ids = TOK.encode(PROMPT, bos=True)
    m = completing(" y")
    assert m.complete(ids).text == m.complete(PROMPT).text == " y"


def test_an_empty_prompt_is_the_beginning_of_sequence_alone() -> None:
    m = answering(TOK.encode_infilling("hi"), [TOK.bos_id])
    assert m.complete("").text == "hi"
    assert m.model.read[0] == TOK.bos_id


@pytest.mark.parametrize("order", ["psm", "spm"])
@pytest.mark.parametrize("end", ["eot", "eos"])
def test_infill_ends_at_eot_or_eos_and_shows_neither(order: str, end: str) -> None:
    assert TOK.infill is not None
    last = TOK.infill.eot if end == "eot" else TOK.eos_id
    middle = TOK.encode_infilling("  x + 1")
    m = answering([*middle, last, *TOK.encode_infilling("never")], infill_ids(TOK, "a =", "\n", order=order))
    r = m.infill("a =", "\n", order=order)
    assert (r.text, r.ids, r.finish_reason) == ("  x + 1", middle, "stop")
    assert r.stats.generated_tokens == len(middle) + 1


def test_infill_of_nothing_is_empty() -> None:
    assert TOK.infill is not None
    r = answering([TOK.infill.eot], infill_ids(TOK, "", "")).infill("", "")
    assert (r.text, r.ids, r.finish_reason) == ("", [], "stop")


def test_plain_completion_does_not_end_at_eot_but_a_literal_infill_prompt_does() -> None:
    assert TOK.infill is not None
    text = "<PRE> a <SUF>b <MID>"
    ids = [*TOK.encode_infilling("x"), TOK.infill.eot, *TOK.encode_infilling("y")]
    r = answering(ids, infill_ids(TOK, "a", "b")).complete(text, literal_infill=True)
    assert r.text == "x"
    plain = answering(ids, TOK.encode(text, bos=True)).complete(text)  # tags in text are text; Meta's stop is eos
    assert plain.text == "x <EOT>y"


def test_infill_tags_that_a_model_writes_by_itself_can_be_left_out_of_the_text_but_not_of_the_ids() -> None:
    assert TOK.infill is not None
    ids = [TOK.infill.pre, *TOK.encode_infilling("x"), TOK.infill.suf, TOK.infill.mid, *TOK.encode_infilling(" <MID>")]
    r = completing("").complete(PROMPT, infill_tags=False)
    assert r.text == ""
    r = answering(ids, TOK.encode(PROMPT, bos=True)).complete(PROMPT, infill_tags=False)
    assert (r.text, r.ids) == ("x <MID>", ids)  # what only looks like a tag stays
    stopped = answering(ids, TOK.encode(PROMPT, bos=True)).complete(PROMPT, infill_tags=False, stop="<")
    assert (stopped.text, stopped.ids[0]) == ("x ", TOK.infill.pre)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.complete(b"x"), r"prompt is b'x' \(bytes\); expected text \(str\) or a list of token ids"),
        (lambda m: m.complete(None), r"prompt is None \(NoneType\); expected text"),
        (lambda m: m.complete([1, 2.5]), r"prompt\[1\] is 2\.5 \(float\); token ids are whole numbers"),
        (lambda m: m.complete({3: 4}), "prompt is {3: 4} .dict."),
        (lambda m: m.logits([1.5]), r"ids\[0\] is 1\.5 \(float\)"),
        (lambda m: m.logits(np.array([1.0])), r"ids\[0\] is 1\.0"),
        (lambda m: m.logits("x"), r"ids is 'x' \(str\); expected a list of token ids"),
        (lambda m: m.infill(b"x", "y"), r"prefix is b'x' \(bytes\); expected text"),
        (lambda m: m.infill("x", None), "suffix is None"),
        (lambda m: m.chat("hi"), r"messages is 'hi' \(str\); expected a list of"),
        (lambda m: m.chat(["hi"]), r"messages\[0\] is 'hi'"),
        (lambda m: m.complete("x", stop=3), r"stop is 3 \(int\); expected a text"),
        (lambda m: m.complete("x", stop=b"y"), "stop is b'y'"),
        (lambda m: m.complete("x", max_tokens=1.5), r"max_tokens is 1\.5 \(float\); expected a whole number"),
        (lambda m: m.complete("x", max_tokens="5"), "max_tokens is '5'"),
        (lambda m: m.complete("x", logprobs="2"), "logprobs is '2'"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(call: Callable[[CodeLlama], object], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        call(completing("y"))


def test_ids_may_come_as_arrays() -> None:
    ids = TOK.encode(PROMPT, bos=True)
    m = completing(" y")
    for same in (tuple(ids), np.array(ids), mx.array(ids), iter(ids)):
        assert m.complete(same).text == " y"  # type: ignore[arg-type]


def test_infill_on_a_model_without_it_says_which_models_can() -> None:
    m = CodeLlama(ScriptedModel({}), tiny_tokenizer(infill=False))  # type: ignore[arg-type]
    assert not m.can_infill
    with pytest.raises(NotSupported, match="cannot infill") as e:
        m.infill("a", "b")
    assert "7B" in e.value.hint


@pytest.mark.parametrize("step", [False, True], ids=["inst", "source"])
@pytest.mark.parametrize("end", ["eos", "step"])
def test_chat_drops_the_dummy_space_and_ends_at_eos_or_step(step: bool, end: str) -> None:
    tok = tiny_tokenizer(step=step)
    if end == "step" and tok.step_id is None:
        pytest.skip("no <step> in this tokenizer")
    dialog = [{"role": "user", "content": "hi"}]
    answer = tok.encode("hello there")  # begins with the dummy space, as answers of these models do
    last = tok.eos_id if end == "eos" else tok.step_id
    assert last is not None
    r = answering([*answer, last, 300], chat_ids(tok, dialog), tok).chat(dialog)
    assert r.text == tok.decode(r.ids) == "hello there"
    assert r.finish_reason == "stop"


def test_the_configs_own_ends_of_sequence_count_too() -> None:
    m = completing("a")
    object.__setattr__(m.args, "eos_token_id", (2, 77))
    m.model.script[len(TOK.encode(PROMPT, bos=True))] = 77
    assert m.complete(PROMPT).ids == []


# ── stop strings ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_string_ends_the_text_before_it() -> None:
    r = completing("a = 1\nb = 2\n").complete(PROMPT, stop="\nb")
    assert (r.text, r.finish_reason, r.stop) == ("a = 1", "stop", "\nb")


def test_what_might_become_a_stop_string_is_held_back_and_released() -> None:
    matcher = StopMatcher(["bcd"])
    assert [matcher.feed(t) for t in ("xab", "c", "e", "b")] == ["xa", "", "bce", ""]
    assert matcher.finish() == "b"
    assert matcher.matched is None


def test_the_stop_string_complete_first_wins_then_the_longest() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert (matcher.feed("xabcd"), matcher.matched) == ("xa", "bc")
    matcher = StopMatcher(["bc", "abc"])
    assert (matcher.feed("xabc"), matcher.matched) == ("x", "abc")
    assert (matcher.feed("more"), matcher.finish()) == ("", "")


def test_a_held_back_end_is_shown_when_the_tokens_run_out() -> None:
    n = len(TOK.encode_infilling("12 en"))
    r = completing("12 en").complete(PROMPT, stop=["end"], max_tokens=n)
    assert (r.text, r.finish_reason) == ("12 en", "length")


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(stop: object) -> None:
    with pytest.raises(PromptError, match="stop string is empty"):
        completing("x").complete(PROMPT, stop=stop)  # type: ignore[arg-type]


def test_logprobs_are_as_many_as_ids() -> None:
    m = completing("one two three")
    r = m.complete(PROMPT, stop="two", logprobs=2)
    assert r.logprobs is not None
    assert [entry.id for entry in r.logprobs] == r.ids
    assert all(entry.logprob == pytest.approx(0, abs=1e-4) and len(entry.top) == 2 for entry in r.logprobs)
    assert m.complete(PROMPT).logprobs is None


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_half_a_character_is_never_shown() -> None:
    pieces = list(completing("é🙂 ok").stream_complete(PROMPT))
    assert "".join(pieces) == "é🙂 ok"
    assert pieces[0] == "é"
    assert "\ufffd" not in "".join(pieces)


def test_a_character_cut_off_by_max_tokens_is_marked() -> None:
    n = len(TOK.encode_infilling("a🙂"))
    assert completing("a🙂").complete(PROMPT, max_tokens=n - 1).text == "a" + "\ufffd" * 3


def test_every_call_streams_the_same_text() -> None:
    m = tiny_codellama()
    dialog = [{"role": "user", "content": "sum?"}]
    for plain, stream in [
        (m.complete(PROMPT, max_tokens=20), m.stream_complete(PROMPT, max_tokens=20)),
        (m.infill("a", "b", max_tokens=20), m.stream_infill("a", "b", max_tokens=20)),
        (m.chat(dialog, max_tokens=20), m.stream_chat(dialog, max_tokens=20)),
    ]:
        assert "".join(stream) == plain.text
        assert stream.result.ids == plain.ids


def test_a_stream_has_no_result_before_its_end() -> None:
    stream = completing("abc").stream_complete(PROMPT)
    with pytest.raises(RuntimeError, match="has not ended"):
        stream.result  # noqa: B018
    next(stream)
    with pytest.raises(RuntimeError, match="has not ended"):
        stream.result  # noqa: B018
    list(stream)
    assert isinstance(stream.result, Completion)


def test_a_stream_closed_early_says_what_was_shown() -> None:
    m = completing("a = 1 en")
    with m.stream_complete(PROMPT, stop="end") as stream:
        shown = next(stream) + next(stream)
    assert (stream.result.text, stream.result.finish_reason) == (shown, "cancelled")
    assert list(stream) == []
    stream.close()
    unread = m.stream_complete(PROMPT)
    unread.close()
    assert (unread.result.text, unread.result.stats.generated_tokens) == ("", 0)


def test_streams_take_turns_and_do_not_disturb_each_other() -> None:
    m = tiny_codellama()
    prompts = ["import os", "class A:", "import sys"]
    expected = [tiny_codellama().complete(p, max_tokens=12).text for p in prompts]
    streams = [m.stream_complete(p, max_tokens=12) for p in prompts]
    texts = ["", "", ""]
    for _ in range(13):
        for n, stream in enumerate(streams):
            texts[n] += next(stream, "")
    assert texts == expected


def test_an_abandoned_stream_blocks_nobody() -> None:
    m = tiny_codellama()
    stream = m.stream_complete(PROMPT, max_tokens=50)
    next(stream)
    assert m.complete(PROMPT, max_tokens=2).finish_reason == "length"
    del stream
    gc.collect()
    assert m.complete(PROMPT, max_tokens=2).finish_reason == "length"


def test_an_error_in_the_middle_leaves_the_model_usable() -> None:
    m = tiny_codellama()
    expected = m.complete(PROMPT, max_tokens=6).text

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.complete(PROMPT + " y" * 20, max_tokens=6, on_prefill=interrupt)
    r = m.complete(PROMPT, max_tokens=6)
    assert r.text == expected


# ── threads and cancellation ────────────────────────────────────────────────────────────────────────────────────────


def in_threads(n: int, work: object) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(k: int) -> None:
        try:
            work(k)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_threads_share_one_model() -> None:
    m = tiny_codellama()
    prompts = ["x", "import os", "x", "def f(a, b):"]
    expected = [tiny_codellama().complete(p, max_tokens=10).text for p in prompts]
    texts: dict[int, str] = {}

    def work(k: int) -> None:
        for _ in range(3):
            texts[k] = m.complete(prompts[k], max_tokens=10).text
            assert texts[k] == expected[k]
            m.logits([1, 2, 3])

    assert in_threads(4, work) == []


def test_a_stream_may_move_between_threads() -> None:
    # MLX evaluates a lazy graph only in the thread that built it: nothing may be left lazy between steps.
    m = tiny_codellama()
    expected = m.complete(PROMPT, max_tokens=8, temperature=1.0, seed=1, repetition_penalty=1.1).text
    stream = m.stream_complete(PROMPT, max_tokens=8, temperature=1.0, seed=1, repetition_penalty=1.1)
    pieces: list[str] = []
    while not pieces or pieces[-1]:
        assert in_threads(1, lambda k: pieces.append(next(stream, ""))) == []
    assert "".join(pieces) == expected
    assert in_threads(1, lambda k: m.complete(PROMPT + "y", max_tokens=3)) == []  # with the cache of another thread


def test_a_cancelled_prompt_is_taken_up_where_it_was_left() -> None:
    m, prompt, asked = tiny_codellama(prefill_chunk=10), [1, *range(3, 40)], iter([False, False, True])
    assert m.complete(prompt, cancel=lambda: next(asked)).finish_reason == "cancelled"
    r = m.complete(prompt, max_tokens=8)
    assert r.stats.cached_tokens == 20
    assert r.ids == tiny_codellama().complete(prompt, max_tokens=8).ids


def test_cancel_may_be_an_event_or_a_function() -> None:
    event = threading.Event()
    m = tiny_codellama()
    stream = m.stream_complete(PROMPT, max_tokens=50, cancel=event)
    shown = next(stream)
    event.set()
    shown += "".join(stream)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == shown
    assert stream.result.stats.generated_tokens < 50
    r = m.complete(PROMPT, cancel=lambda: True)
    assert (r.text, r.finish_reason, r.stats.prompt_tok_s) == ("", "cancelled", 0)


# ── limits, options, stats ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_context_is_never_overrun_and_never_cut_silently() -> None:
    m = tiny_codellama()
    n = len(TOK.encode(PROMPT, bos=True))
    with pytest.raises(ContextOverflowError, match=rf"{n} prompt tokens \+ max_tokens 512 = {n + 512}"):
        m.complete(PROMPT, max_tokens=512)
    with pytest.raises(ContextOverflowError, match="the prompt has 600 tokens"):
        m.complete([1] * 600)
    with pytest.raises(ContextOverflowError, match="the prompt has 600 tokens"):
        m.logits([1] * 600)


def test_without_max_tokens_the_end_of_the_context_is_the_end() -> None:
    ids = [1] + [5] * (CONTEXT - 4)
    r = answering([7] * 9, ids).complete(ids)
    assert (len(r.ids), r.finish_reason) == (3, "length")


def test_a_longer_context_is_taken_only_when_asked_for() -> None:
    m = tiny_codellama(max_context=CONTEXT + 100)
    assert len(m.complete([1] + [5] * CONTEXT, max_tokens=3).ids) <= 3
    with pytest.raises(ContextOverflowError, match=f"the context {CONTEXT + 100}"):
        m.complete([1] * (CONTEXT + 101))
    with pytest.raises(ConfigError, match="max_context is 0"):
        tiny_codellama(max_context=0)


def test_no_tokens_is_a_warm_up() -> None:
    m = tiny_codellama()
    n = len(TOK.encode(PROMPT, bos=True))
    r = m.complete(PROMPT, max_tokens=0)
    assert (r.text, r.ids, r.finish_reason) == ("", [], "length")
    assert r.stats.ttft_s > 0
    assert m.complete(PROMPT, max_tokens=1).stats.cached_tokens == n - 1


def test_unknown_options_and_bad_values_are_named() -> None:
    m = tiny_codellama()
    with pytest.raises(TypeError, match="unknown option: temprature"):
        m.complete(PROMPT, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="top_p is 2"):
        m.stream_complete(PROMPT, top_p=2)  # at the call, not at the first piece
    with pytest.raises(PromptError, match="max_tokens is -1"):
        m.complete(PROMPT, max_tokens=-1)
    with pytest.raises(PromptError, match="logprobs is -2"):
        m.stream_complete(PROMPT, logprobs=-2)


def test_a_seed_reproduces_the_text_and_reaches_the_sampler() -> None:
    m = tiny_codellama()
    texts = [m.complete(PROMPT, max_tokens=20, temperature=1.0, seed=s).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert (
        m.complete(PROMPT, max_tokens=20, temperature=1.0, seed=1, top_k=1).text
        == m.complete(PROMPT, max_tokens=20).text
    )


def test_stats_count_tokens_time_and_memory() -> None:
    m, told = tiny_codellama(prefill_chunk=10), []
    prompt = [1, *range(3, 40)]
    s = m.complete(prompt, max_tokens=30, on_prefill=lambda done, total: told.append((done, total))).stats
    assert (s.cached_tokens, s.prompt_tokens, s.generated_tokens) == (0, 38, 30)
    assert told == [(10, 38), (20, 38), (30, 38), (38, 38)]
    assert s.ttft_s > 0
    assert s.prompt_tok_s == pytest.approx(38 / s.ttft_s)
    assert s.decode_tok_s > 0
    weights = sum(array.nbytes for _, array in tree_flatten(m.model.parameters()))
    assert s.peak_bytes > weights
    again = m.complete(prompt, max_tokens=1).stats
    assert (again.cached_tokens, again.decode_tok_s) == (37, 0)
    assert again.prompt_tok_s == pytest.approx(1 / again.ttft_s)


def test_logits_are_teacher_forced_float32_rows() -> None:
    ids = np.random.RandomState(1).randint(0, 416, 30).tolist()
    truth = forward(random_weights(GEOMETRY, seed=5), GEOMETRY, [ids])[0]
    for chunk in (None, 7):
        x = tiny_codellama(prefill_chunk=chunk).logits(ids)  # type: ignore[arg-type]
        assert isinstance(x, np.ndarray)
        assert (x.dtype, x.shape) == (np.float32, (30, 416))
        assert np.abs(x - truth).max() < 1e-4
    with pytest.raises(PromptError, match="empty"):
        tiny_codellama().logits([])


# ── load ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(hf_config(GEOMETRY)))
    (path / "tokenizer.model").write_bytes(TOK.model_bytes)
    weights = to_hf(random_weights(GEOMETRY, seed=5), GEOMETRY)
    mx.save_safetensors(str(path / "model.safetensors"), {name: mx.array(w) for name, w in weights.items()})
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_load_takes_a_folder(folder: Path, kind: type) -> None:
    m = mlx_codellama.load(kind(folder))
    assert isinstance(m, mlx_codellama.CodeLlama)
    assert m.path == folder
    assert m.complete(PROMPT, max_tokens=5).ids == tiny_codellama().complete(PROMPT, max_tokens=5).ids


def test_load_takes_dtype_and_context(folder: Path) -> None:
    m = mlx_codellama.load(folder, dtype="bfloat16", max_context=99)
    assert m.model.model.norm.weight.dtype == mx.bfloat16
    assert m.max_context == 99
    assert m.logits([1, 2]).dtype == np.float32
    with pytest.raises(ConfigError, match="unknown dtype"):
        mlx_codellama.load(folder, dtype="float8")
    with pytest.raises(ConfigError, match="max_context"):
        mlx_codellama.load(folder, max_context=0)


def test_load_refuses_what_is_not_there_yet(folder: Path) -> None:
    with pytest.raises(NotSupported, match="adapters"):
        mlx_codellama.load(folder, adapter="x")


def test_load_of_nothing_takes_the_bundled_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codellama, "DEMO", folder)
    assert mlx_codellama.load().path == folder
    monkeypatch.setattr(codellama, "DEMO", folder / "absent")
    with pytest.raises(CheckpointError, match="no bundled demo"):
        mlx_codellama.load()


def test_load_of_a_hub_id_fetches_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_codellama import hub

    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(
        hub, "fetch", lambda name, *, revision=None, progress=None: asked.append((name, revision)) or folder
    )
    assert mlx_codellama.load("some-owner/some-model", revision="v2").path == folder
    assert asked == [("some-owner/some-model", "v2")]


def test_load_of_a_missing_folder_says_so() -> None:
    with pytest.raises(mlx_codellama.CodeLlamaError, match="not-there"):
        mlx_codellama.load("./not-there/at/all")


def test_a_fresh_process_completes_in_a_thread_of_its_own(folder: Path) -> None:
    # Loaded in one thread, first used in another: any array left lazy by loading would fail here.
    code = (
        "import threading, mlx_codellama, sys\n"
        "m = mlx_codellama.load(sys.argv[1])\n"
        "out = []\n"
        "t = threading.Thread(target=lambda: out.append(m.complete('x', max_tokens=3).finish_reason))\n"
        "t.start(); t.join(); print(out)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("['length']", "")
