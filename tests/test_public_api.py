"""The names that scripts may rely on, exactly: more than this is not promised, less than this breaks somebody."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import mlx_codellama
from mlx_codellama import errors

PUBLIC = ["CodeLlama", "CodeLlamaError", "Completion", "NotSupported", "__version__", "load"]


def keywords(function: object) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()  # type: ignore[arg-type]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_all_is_exact_and_every_name_is_there() -> None:
    assert mlx_codellama.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(mlx_codellama, name) is not None
    assert set(PUBLIC) <= set(dir(mlx_codellama))


def test_star_import_gives_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from mlx_codellama import *", space)
    assert set(PUBLIC) <= set(space)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generate_text'"):
        mlx_codellama.generate_text  # noqa: B018


def test_load_takes_the_promised_keywords() -> None:
    parameters = inspect.signature(mlx_codellama.load).parameters
    first = next(iter(parameters.values()))
    assert first.default is None  # no path: the bundled demo model
    assert {"dtype", "adapter", "kv_bits", "max_context"} <= set(parameters)


@pytest.mark.parametrize("call", ["complete", "infill", "chat"])
def test_every_call_has_a_stream_twin_with_the_same_keywords(call: str) -> None:
    plain = getattr(mlx_codellama.CodeLlama, call)
    twin = getattr(mlx_codellama.CodeLlama, f"stream_{call}")
    assert keywords(plain) == keywords(twin)
    assert {"max_tokens"} <= keywords(plain)


def test_infill_takes_prefix_suffix_and_order() -> None:
    parameters = inspect.signature(mlx_codellama.CodeLlama.infill).parameters
    assert list(parameters)[:3] == ["self", "prefix", "suffix"]
    assert parameters["order"].default == "psm"


def test_completion_says_text_ids_reason_and_stats() -> None:
    assert {"text", "ids", "finish_reason", "stats"} <= {field.name for field in fields(mlx_codellama.Completion)}


def test_logits_are_public() -> None:
    assert callable(mlx_codellama.CodeLlama.logits)


def test_tokenizer_and_prompts_have_the_promised_names() -> None:
    from mlx_codellama.prompts import chat_ids, infill_ids
    from mlx_codellama.tokenizer import Tokenizer

    assert {"bos", "eos"} <= set(inspect.signature(Tokenizer.encode).parameters)
    assert callable(Tokenizer.load)
    assert callable(Tokenizer.decode)
    assert list(inspect.signature(infill_ids).parameters)[:3] == ["tok", "prefix", "suffix"]
    assert "order" in inspect.signature(infill_ids).parameters
    assert list(inspect.signature(chat_ids).parameters)[:2] == ["tok", "messages"]


def test_every_error_is_a_code_llama_error_with_a_hint() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("what happened", hint="what to do")
        assert isinstance(error, errors.CodeLlamaError)
        assert (str(error), error.hint) == ("what happened", "what to do")


def test_without_mlx_the_error_says_which_extra_to_take() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlx': raise ModuleNotFoundError(\"No module named 'mlx'\", name='mlx')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import mlx_codellama\n"
        "try:\n    mlx_codellama.load\n"
        "except mlx_codellama.CodeLlamaError as error:\n    print(type(error).__name__, error, error.hint, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, message, hint = done.stdout.strip().split("|")
    assert (kind, message) == ("BackendError", "MLX is not installed")
    if sys.platform == "linux":
        assert "mlx-codellama[cpu]" in hint
        assert "mlx-codellama[cuda]" in hint
        assert "exclude each other" in hint


def test_other_import_errors_are_not_mistaken_for_a_missing_mlx() -> None:
    assert errors.missing_mlx(ImportError("no", name="numpy")) is None
    assert errors.missing_mlx(ImportError("no", name="mlx_lm")) is None
    broken = errors.missing_mlx(ImportError("libmlx.so: cannot open shared object file", name="mlx.core"))
    assert broken is not None
    assert "does not load" in str(broken)
