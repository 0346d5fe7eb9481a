"""complete, infill and chat on a tiny random model: what goes to stdout, what to stderr, what to the file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from stand_ins import saying, tiny_tokenizer

from mlx_codellama import CodeLlama, load
from mlx_codellama.cli.generation import stop_on_interrupt
from mlx_codellama.hole import Hole
from mlx_codellama.prompts import infill_ids
from mlx_codellama.source_file import unified_diff
from mlx_codellama.tokenizer import Tokenizer

from .conftest import Run, document

SOURCE = "def f(a):\r\n    x = 1\r\n    return x\r\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "f.py"
    path.write_bytes(SOURCE.encode())
    path.chmod(0o740)
    return path


def test_complete_prints_what_the_api_generates(run: Run, tiny: str) -> None:
    expected = load(tiny).complete("def f(", max_tokens=9)
    result = run("complete", "def f(", "-m", tiny, "-n", 9)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected.text
    assert result.stderr == "note: stopped after 9 tokens; --max-tokens allows more\n"
    assert document(run("complete", "def f(", "-m", tiny, "-n", 1, "--json"))["finish_reason"] == "length"
    assert "after 1 token;" in run("complete", "def f(", "-m", tiny, "-n", 1, "--json").stderr


def test_complete_as_json_is_one_document_with_ids_and_stats(run: Run, tiny: str) -> None:
    expected = load(tiny).complete("def f(", max_tokens=9, logprobs=2)
    got = document(run("complete", "def f(", "-m", tiny, "-n", 9, "--json", "--logprobs", 2))
    assert got["text"] == expected.text
    assert got["ids"] == expected.ids
    assert got["finish_reason"] == "length"
    assert got["stats"]["generated_tokens"] == 9
    assert [entry["id"] for entry in got["logprobs"]] == expected.ids
    assert len(got["logprobs"][0]["top"]) == 2


def test_more_logprobs_than_the_vocabulary_are_wrong_use_before_anything_is_loaded(
    run: Run, tiny: str, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    most = load(tiny).args.vocab_size
    asked.clear()
    for model in (("-m", tiny), ()):
        result = run("complete", "def f(", *model, "-n", 1, "--json", "--logprobs", 100_000)
        assert result.exit_code == 2
        assert "error: Invalid value for '--logprobs': 100000 is more than this model's vocabulary has" in result.stderr
        assert "hint: see `" in result.stderr
    assert asked == []
    got = document(run("complete", "def f(", "-m", tiny, "-n", 1, "--json", "--logprobs", most))
    assert len(got["logprobs"][0]["top"]) == most


def test_complete_reads_stdin_or_a_file(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f(")
    argument = run("complete", "def f(", "-m", tiny, "-n", 5).stdout
    assert run("complete", "-m", tiny, "-n", 5, input="def f(").stdout == argument
    assert run("complete", "-f", tmp_path / "p.txt", "-m", tiny, "-n", 5).stdout == argument
    assert run("complete", "def f(", "-m", tiny, "-n", 5, "--echo").stdout == "def f(" + argument
    for dash in (("-",), ("-f", "-")):
        assert run("complete", *dash, "-m", tiny, "-n", 5, input="def f(").stdout == argument


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
def test_a_text_longer_than_the_context_is_continued_at_its_end_and_that_is_said(
    run: Run, tiny: str, tmp_path: Path, how: str
) -> None:
    text = "".join(f"x{n} = {n}\n" for n in range(200))
    file = tmp_path / "p.py"
    file.write_text(text)
    arguments = {"argument": (text,), "file": ("-f", file), "stdin": ("-",)}[how]
    result = run("complete", *arguments, "-m", tiny, "-n", 5, "--json", input=text)
    assert result.exit_code == 0, result.stderr
    seen = document(result)["prompt"]
    assert text.endswith("\n" + seen)
    assert 60 < document(result)["stats"]["prompt_tokens"] <= 96 - 5
    name = file if how == "file" else "the prompt"
    assert (
        f"note: {name} is longer than the context; the model sees lines {201 - seen.count(chr(10))} to 200"
        in result.stderr
    )


@pytest.mark.parametrize("n_bytes", [17 * 2**20, 10 * 2**20])
def test_a_text_that_no_context_holds_is_not_tokenised(
    run: Run, tiny: str, n_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    encode = Tokenizer._encode

    def counting(self: Tokenizer, processor: object, text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, processor, text)

    monkeypatch.setattr(Tokenizer, "_encode", counting)
    content = b"x" * n_bytes
    for verb in ("complete", "infill", "chat"):
        result = run(verb, "-m", tiny, "-n", 5, input=content)
        assert (verb, result.exit_code) == (verb, int(verb != "complete" or n_bytes > 16 * 2**20)), result.stderr
    assert longest < 20_000


@pytest.fixture
def asked(tiny: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a command asks of `load` and of the streams of the model."""
    import mlx_codellama

    calls: list[tuple[str, dict[str, Any]]] = []
    real = mlx_codellama.load

    def load(path: object, **how: Any) -> CodeLlama:
        calls.append(("load", how))
        return real(path, **how)

    monkeypatch.setattr(mlx_codellama, "load", load)
    for name in ("stream_complete", "stream_chat"):
        stream = getattr(CodeLlama, name)

        def recorded(self: CodeLlama, what: Any, *, _stream: Any = stream, _name: str = name, **how: Any) -> Any:
            calls.append((_name, {"what": what, **how}))
            return _stream(self, what, **how)

        monkeypatch.setattr(CodeLlama, name, recorded)
    return calls


def test_every_option_of_complete_reaches_the_model(
    run: Run, tiny: str, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    options = {
        "-n": 3,
        "-t": 0.5,
        "--top-p": 0.9,
        "--top-k": 7,
        "--min-p": 0.01,
        "--repetition-penalty": 1.1,
        "--seed": 4,
    }
    flat = [str(x) for pair in options.items() for x in pair]
    command = ("complete", "<PRE> a <SUF> b <MID>", "-m", tiny, *flat, "--stop", r"a\n", "--stop", r"\\n\t")
    result = run(*command, "--literal-infill", "--context", 50, "--dtype", "bfloat16", "--json", "--logprobs", 1)
    assert result.exit_code == 0, result.stderr
    (_, loaded), (_, how) = asked
    assert {key: loaded[key] for key in ("dtype", "max_context")} == {"dtype": "bfloat16", "max_context": 50}
    expected = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "seed": 4, "logprobs": 1}
    assert {key: how[key] for key in expected} == expected
    assert (how["repetition_penalty"], how["literal_infill"]) == (1.1, True)
    assert how["stop"] == ["a\n", "\\n\t"]


def test_infill_tags_are_not_shown_as_text_but_the_document_is_exact(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.infill is not None
    ids = [tokenizer.infill.pre, *tokenizer.encode_infilling("x"), tokenizer.infill.eot]
    model = saying(tokenizer, ids, after=1)
    monkeypatch.setattr("mlx_codellama.load", lambda path, **how: CodeLlama(model, tokenizer))  # type: ignore[arg-type]
    shown = run("complete", "")
    assert (shown.exit_code, shown.stdout) == (0, "x")
    assert shown.stderr == "note: left out 2 infill tags that the model wrote; --json shows the ids\n"
    got = document(run("complete", "", "--json"))
    assert (got["text"], got["ids"]) == (" <PRE>x <EOT>", ids)


def test_stats_and_json_keep_apart(run: Run, tiny: str) -> None:
    plain = run("complete", "def f(", "-m", tiny, "-n", 9)
    told = run("complete", "def f(", "-m", tiny, "-n", 9, "--stats")
    assert told.stdout == plain.stdout
    assert "9 tokens at" in told.stderr
    assert "ended by length" in told.stderr
    assert len(run("complete", "def f(", "-m", tiny, "-n", 9, "--json", "--echo").stdout.splitlines()) == 1


def test_a_prompt_comes_from_one_place(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("a")
    assert run("complete", "b", "-f", tmp_path / "p", "-m", tiny).exit_code == 2
    assert run("complete", "-m", tiny, input=b"caf\xe9").exit_code == 1


def test_an_interrupt_while_answering_is_asked_for_at_every_step_and_the_handler_goes_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_typed_at_the_demo_continues_a_text(run: Run, asked: list[tuple[str, dict[str, Any]]]) -> None:
    result = run("chat", "-n", 2, input="def f(x):")
    assert result.exit_code == 0, result.stderr
    assert "knows no dialogs" in result.stderr
    assert [name for name, _ in asked] == ["load", "stream_complete"]
    assert asked[1][1]["what"] == "def f(x):"


def test_sampling_is_repeatable_with_a_seed_and_differs_without(run: Run, tiny: str) -> None:
    hot = ("complete", "x", "-m", tiny, "-n", 20, "-t", 1.5, "--json", "--seed")
    assert document(run(*hot, 7))["ids"] == document(run(*hot, 7))["ids"]
    assert document(run(*hot, 7))["ids"] != document(run(*hot, 8))["ids"]  # 20 hot tokens of 640: no luck


def test_a_stop_text_with_an_escape_ends_before_it(run: Run, tiny: str) -> None:
    whole = document(run("complete", "def f(", "-m", tiny, "-n", 9, "--json"))["text"]
    stop = whole[3]
    got = document(run("complete", "def f(", "-m", tiny, "-n", 9, "--json", "--stop", stop, "--stop", "\\n"))
    assert got["text"] == whole[: min(whole.find(s) for s in (stop, "\n") if s in whole)]
    assert got["finish_reason"] == "stop"


def test_infill_prints_what_the_api_generates_for_the_text_with_newlines(run: Run, tiny: str, source: Path) -> None:
    expected = load(tiny).infill("def f(a):\n    x", " = 1\n    return x\n", max_tokens=7)
    result = run("infill", f"{source}:2:6", "-m", tiny, "-n", 7)
    assert result.stdout == expected.text
    assert source.read_bytes() == SOURCE.encode()


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_infill_knows_both_orders(run: Run, tiny: str, source: Path, order: str) -> None:
    expected = load(tiny).infill("def f(a):", "\n    x = 1\n    return x\n", order=order, max_tokens=7)
    assert run("infill", f"{source}:1", "-m", tiny, "-n", 7, "--order", order).stdout == expected.text


def test_infill_in_place_keeps_line_endings_and_mode(run: Run, tiny: str, source: Path) -> None:
    answer = load(tiny).infill("def f(a):\n    x", " = 1\n    return x\n", max_tokens=7).text.rstrip("\ufffd")
    result = run("infill", f"{source}:2:6", "-m", tiny, "-n", 7, "--in-place", "--accept-cut")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    filled = "def f(a):\r\n    x" + answer.replace("\n", "\r\n") + " = 1\r\n    return x\r\n"
    assert source.read_bytes() == filled.encode()
    assert stat.S_IMODE(source.stat().st_mode) == 0o740


@pytest.mark.parametrize("shown", ["", "--diff", "--json"])
def test_an_edit_made_while_the_model_writes_is_not_lost_nor_is_the_completion(
    run: Run, tiny: str, source: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    answer = load(tiny).infill("def f(a):\n    x", " = 1\n    return x\n", max_tokens=7).text
    edited = SOURCE.encode() + b"y = 2\r\n"
    stream = CodeLlama.stream_infill

    def slow(self: CodeLlama, *parts: str, **how: Any) -> Any:
        source.write_bytes(edited)
        return stream(self, *parts, **how)

    monkeypatch.setattr(CodeLlama, "stream_infill", slow)
    result = run("infill", f"{source}:2:6", "-m", tiny, "-n", 7, "--in-place", "--accept-cut", *filter(None, [shown]))
    assert source.read_bytes() == edited
    assert [path.name for path in source.parent.iterdir()] == ["f.py"]
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "changed while" in result.stderr
    assert "hint: run the command again; the completion is on stdout" in result.stderr
    assert f"filled {source}" not in result.stderr
    if shown == "--json":
        assert document(result)["text"] == answer
    elif shown == "--diff":
        assert result.stdout.startswith("--- a/")
    else:
        assert result.stdout == answer + "\n" * (not answer.endswith("\n"))


def test_an_answer_cut_in_the_middle_of_a_character_leaves_no_half_of_it_in_the_file(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    prompt = infill_ids(tokenizer, "def f(a):\n    x", " = 1\n    return x\n")
    ids = tokenizer.encode_infilling("_☃")
    assert tokenizer.decode_infilling(ids[:-1]).rstrip("\ufffd") == "_"  # a snowman is three byte pieces
    model = saying(tokenizer, ids, after=len(prompt))
    monkeypatch.setattr("mlx_codellama.load", lambda path, **how: CodeLlama(model, tokenizer))  # type: ignore[arg-type]
    command = ("infill", f"{source}:2:6", "-n", len(ids) - 1)
    assert document(run(*command, "--json", "--whole"))["whole"] == SOURCE.replace("x =", "x_ =")
    assert "\ufffd" in run(*command).stdout  # the terminal shows what there is
    result = run(*command, "--in-place", "--accept-cut")
    assert result.exit_code == 0, result.stderr
    assert source.read_bytes() == SOURCE.replace("x =", "x_ =").encode()


@pytest.mark.parametrize("shown", ["", "--diff", "--json"])
def test_an_answer_that_was_cut_is_not_written_into_the_file_unless_asked(
    run: Run, tiny: str, source: Path, shown: str
) -> None:
    answer = load(tiny).infill("def f(a):\n    x", " = 1\n    return x\n", max_tokens=7).text
    result = run("infill", f"{source}:2:6", "-m", tiny, "-n", 7, "--in-place", *filter(None, [shown]))
    assert result.exit_code == 1
    assert source.read_bytes() == SOURCE.encode()
    assert f"error: --max-tokens cut the answer, and {source} is as it was\n" in result.stderr
    assert "--accept-cut; the completion is on stdout" in result.stderr
    if shown == "--json":
        assert document(result)["text"] == answer
    elif shown == "--diff":
        assert result.stdout.startswith("--- a/")
    else:
        assert result.stdout == answer + "\n" * (not answer.endswith("\n"))


def test_a_line_in_a_file_that_has_the_mark_too_is_told(run: Run, tiny: str, source: Path) -> None:
    source.write_text("a = '<FILL_ME>'\nb = \n")
    result = run("infill", f"{source}:2:", "-m", tiny, "-n", 2)
    assert result.exit_code == 0
    assert f"note: {source} holds <FILL_ME>, which is read as text: the hole is in line 2" in result.stderr


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.py", "--- a/a.py\n"),
        ("./a.py", "--- a/a.py\n"),
        ("d/../a.py", "--- a/a.py\n"),
        ("d/b c.py", "--- a/d/b c.py\t\n"),
        ('q"t\t.py', '--- "a/q\\"t\\t.py"\n'),
    ],
)
def test_a_patch_names_the_file_so_that_patch_and_git_find_it(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, header: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path(name).write_text("x = <FILL_ME>\n")
    git = shutil.which("git")
    for given in (name, str(tmp_path / name)):
        patch = run("infill", given, "-m", tiny, "-n", 3, "--diff").stdout
        assert patch.startswith(header)
    if git:
        subprocess.run([git, "apply", "-p1", "-"], input=patch.encode(), check=True)
        assert "<FILL_ME>" not in Path(name).read_text()


def test_a_patch_for_a_file_elsewhere_names_its_whole_path(
    run: Run, tiny: str, source: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    patch = run("infill", f"{os.path.relpath(source)}:2", "-m", tiny, "-n", 3, "--diff").stdout
    assert patch.startswith(f"--- a{source}\n+++ b{source}\n")


def test_the_seed_that_was_drawn_is_reported_and_repeats_the_answer(run: Run, tiny: str) -> None:
    first = run("complete", "x", "-m", tiny, "-n", 9, "-t", 2, "--json", "--stats")
    seed = document(first)["stats"]["seed"]
    assert first.stderr.splitlines()[-1].endswith(f", seed {seed}")
    again = run("complete", "x", "-m", tiny, "-n", 9, "-t", 2, "--json", "--seed", seed)
    assert document(again)["ids"] == document(first)["ids"]
    assert document(run("complete", "x", "-m", tiny, "-n", 2, "--json"))["stats"]["seed"] is None


def test_top_p_of_nothing_takes_the_likeliest_as_in_python(run: Run, tiny: str) -> None:
    greedy = run("complete", "x", "-m", tiny, "-n", 9)
    assert run("complete", "x", "-m", tiny, "-n", 9, "-t", 2, "--top-p", 0).stdout == greedy.stdout


def test_a_read_only_file_is_refused_before_the_model_is_loaded(
    run: Run, tiny: str, source: Path, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    source.chmod(0o444)
    result = run("infill", f"{source}:2", "-m", tiny, "-n", 7, "--in-place")
    assert result.exit_code == 1
    assert f"error: {source} is read-only\nhint: allow writing with chmod u+w" in result.stderr
    assert source.read_bytes() == SOURCE.encode()
    assert asked == []
    assert run("infill", f"{source}:2", "-m", tiny, "-n", 7).exit_code == 0


def test_infill_whole_and_diff_show_the_same_text(run: Run, tiny: str, source: Path) -> None:
    whole = run("infill", f"{source}:2", "-m", tiny, "-n", 7, "--whole")
    assert whole.stdout_bytes.decode().startswith("def f(a):\r\n    x = 1")
    got = document(run("infill", f"{source}:2", "-m", tiny, "-n", 7, "--diff", "--json"))
    added = [line for line in got["diff"].splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added
    assert all(line[1:].rstrip("\r") in whole.stdout_bytes.decode() for line in added)
    assert source.read_bytes() == SOURCE.encode()


def test_a_diff_cuts_lines_at_newlines_only() -> None:
    # A form feed between the functions of a Python file is common; cut there, the patch would not apply.
    hole = Hole("a = 1\n\fb = ", "\u2028\n\x1cc\rd\n", "\n")
    assert unified_diff(hole.text, hole.filled("2"), "f.py").split("\n") == [
        "--- a/f.py",
        "+++ b/f.py",
        "@@ -1,3 +1,3 @@",
        " a = 1",
        "-\fb = \u2028",
        "+\fb = 2\u2028",
        " \x1cc\rd",
        "",
    ]


def test_a_diff_is_a_patch_for_the_file_with_its_mark(run: Run, tiny: str, tmp_path: Path) -> None:
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    file = tmp_path / "f.py"
    file.write_text("def f(a):\n    return <FILL_ME>\n")
    made = run("infill", str(file), "-m", tiny, "-n", 5, "--diff").stdout
    wanted = run("infill", str(file), "-m", tiny, "-n", 5, "--whole").stdout
    subprocess.run(["patch", "-s", str(file)], input=made, text=True, check=True)
    assert file.read_text() == wanted
    assert "<FILL_ME>" not in wanted


def test_infill_reads_a_mark_from_stdin(run: Run, tiny: str) -> None:
    expected = load(tiny).infill("a = ", "\nb\n", max_tokens=5).text
    assert run("infill", "-m", tiny, "-n", 5, input="a = <FILL_ME>\nb\n").stdout == expected
    assert run("infill", "-", "-m", tiny, "-n", 5, input="a = <FILL_ME>\nb\n").stdout == expected


def test_single_line_ends_at_the_newline(run: Run, tiny: str, source: Path) -> None:
    got = document(run("infill", f"{source}:1", "-m", tiny, "-n", 40, "--single-line", "--json"))
    assert "\n" not in got["text"]


def test_a_file_longer_than_the_context_is_windowed_and_that_is_said(run: Run, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("".join(f"value_{i} = {i}\n" for i in range(400)))
    result = run("infill", f"{path}:200", "-m", tiny, "-n", 8, "--json")
    assert result.exit_code == 0, result.stderr
    assert "the model sees lines" in result.stderr
    got = document(result)
    assert 1 < got["window"]["first_line"] < 200 <= got["window"]["last_line"] < 400
    assert 40 < got["stats"]["prompt_tokens"] <= 96 - 8


def test_a_long_line_that_is_cut_is_told_in_columns(run: Run, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text("x = 1; " * 3000)
    result = run("infill", f"{path}:1:10000", "-m", tiny, "-n", 8, "--json")
    assert result.exit_code == 0, result.stderr
    window = document(result)["window"]
    assert 1 < window["first_column"] < 10000 <= window["last_column"] < 21000
    columns = f"columns {window['first_column']:,} to {window['last_column']:,}"
    assert f"longer than the context; the model sees {columns} of line 1\n" in result.stderr


def test_an_answer_that_fills_the_context_is_refused(run: Run, tiny: str, source: Path) -> None:
    result = run("infill", f"{source}:1", "-m", tiny, "-n", 96)
    assert result.exit_code == 1
    assert "leave no room in a context of 96" in result.stderr
    assert "hint: lower --max-tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("infill", "{f}:9"), 1, "has no line 9"),
        (("infill", "{f}:1:99"), 1, "has no column 99"),
        (("infill", "{f}"), 1, "holds no <FILL_ME>"),
        (("infill", "{f}.no:1"), 1, "does not exist"),
        (("infill", "{d}"), 1, "is a folder"),
        (("infill", "{latin}:1"), 1, "is not UTF-8"),
        (("complete", "-f", "{latin}"), 1, "is not UTF-8"),
        (("infill", "{f}:1", "--whole", "--in-place"), 2, "give one of"),
        (("complete", "a", "--logprobs", "1"), 2, "--logprobs needs --json"),
        (("complete", "a", "-t", "-1"), 2, "--temperature"),
        (("complete", "a", "-m", "{d}/none"), 1, "does not exist"),
        (("complete", "a", "-n", "96"), 1, "leave no room in a context of 96"),
        (("complete", "a " * 200, "--literal-infill"), 1, "context"),
    ],
)
def test_bad_requests_are_an_error_with_a_hint(
    run: Run, tiny: str, source: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    latin = source.with_name("latin.py")
    latin.write_bytes(b"caf\xe9\n")
    filled = [a.format(f=source, d=source.parent, latin=latin) for a in arguments]
    if "-m" not in filled:
        filled += ["-m", tiny]
    result = run(*filled)
    assert result.exit_code == status, result.stderr
    assert message in result.stderr
    assert "\nhint: " in result.stderr
    assert result.stdout == ""


def test_hints_name_only_what_the_command_at_hand_can_do(run: Run, tiny: str, tmp_path: Path) -> None:
    told = run("infill", "-m", tiny, input="no mark")
    assert told.exit_code == 1
    assert told.stderr.endswith("hint: mark the one place to fill with <FILL_ME>\n")
    silent = Path(shutil.copytree(tiny, tmp_path / "silent"))
    config = json.loads((silent / "config.json").read_text())
    del config["rope_theta"]
    (silent / "config.json").write_text(json.dumps(config))
    told = run("complete", "x", "-m", silent)
    assert told.exit_code == 1
    assert 'hint: add "rope_theta": 1000000 to config.json, or convert with --rope-theta 1000000' in told.stderr
    (tmp_path / "crlf.py").write_bytes(SOURCE.encode())
    told = run("complete", "x", "-m", tmp_path / "crlf.py")
    assert told.exit_code == 1
    assert told.stderr.endswith("crlf.py is a file\nhint: name the folder that holds config.json and the weights\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("complete", "\udcff"), "'[PROMPT]': the text is not UTF-8"),  # so the system hands over a byte that is none
        (("complete", "a", "--stop", ""), "'--stop': the text is empty"),
        (("complete", "a", "--stop", "\udcff"), "'--stop': the text is not UTF-8"),
        (("chat", "--system", "\udcff"), "'--system': the text is not UTF-8"),
        (("complete", "a", "-t", "nan"), "'--temperature' / '-t': nan is not a finite number"),
        (("infill", "{f}:1", "-t", "inf"), "'--temperature' / '-t': inf is not a finite number"),
        (("complete", "a", "--top-p", "nan"), "'--top-p': nan is not a finite number"),
        (("complete", "a", "--min-p", "nan"), "'--min-p': nan is not a finite number"),
        (("complete", "a", "--repetition-penalty", "inf"), "'--repetition-penalty': inf is not a finite number"),
        (("complete", "a", "--seed", "-1"), "'--seed': -1 is not in the range"),
        (("complete", "a", "--rope-scaling", "foo"), "'--rope-scaling': 'foo' is not a rotary scaling; write"),
        (("plan", "--memory", "abc"), "'--memory': 'abc' is not an amount of memory; write it like 12GB"),
        (("convert", "a", "b", "--rope-theta", "nan"), "'--rope-theta': nan is not a finite number"),
    ],
)
def test_values_that_cannot_be_are_wrong_use_in_the_words_of_the_command_line(
    run: Run, source: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*(a.format(f=source) for a in arguments))
    assert result.exit_code == 2, result.stderr
    assert f"error: Invalid value for {message}" in result.stderr
    assert f" {arguments[0]} --help`\n" in result.stderr.partition("hint: see `")[2]


def test_in_place_from_stdin_is_wrong_use(run: Run, tiny: str) -> None:
    assert run("infill", "--in-place", "-m", tiny, input="<FILL_ME>").exit_code == 2


def test_infill_on_a_model_without_infilling_says_which_models_can(
    run: Run, tmp_path: Path, llama_tokenizer: object
) -> None:
    from mlx_codellama.tokenizer import Tokenizer

    from .conftest import write_checkpoint

    assert isinstance(llama_tokenizer, Tokenizer)
    folder = write_checkpoint(tmp_path / "plain", llama_tokenizer)
    result = run("infill", "-m", folder, "-n", 4, input="a<FILL_ME>b")
    assert result.exit_code == 1
    assert "cannot infill" in result.stderr
    assert "hint: use a 7B or 13B model" in result.stderr
