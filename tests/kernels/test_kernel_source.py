"""Kernel files: how they are split, and what MLX would find in their bodies by searching for plain text."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from mlx_codellama.kernels.gpu import dialect, kv_attention, rope_append
from mlx_codellama.kernels.gpu.source import SUFFIX, file_text, files, kernel_names, kernel_text, without_comments

TEXTS = [
    (language, file, name) for language in SUFFIX for file in files(language) for name in kernel_names(language, file)
]
KERNELS = {*kv_attention.OF_SEGMENTS, *kv_attention.OF_SEGMENTS.values(), kv_attention.MERGE, rope_append.ROPE_APPEND}


def test_the_files_were_found() -> None:
    assert {"kv_attention_lanes", "kv_attention_tiles", "kv_attention_merge", "rope_append"} <= {t[2] for t in TEXTS}
    assert {"kv_attention_lanes", "kv_attention_mma", "rope_append"} <= {name for at, _, name in TEXTS if at == "cuda"}


def test_cuda_has_no_text_beside_the_translated_one() -> None:
    """A .cu of the same name would be a second copy that nobody reads."""
    folder = resources.files("mlx_codellama.kernels").joinpath("cuda")
    assert not dialect.SHARED & {entry.name.removesuffix(".cu") for entry in folder.iterdir()}
    assert set(files("metal")) >= dialect.SHARED


def test_a_file_is_translated_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    translate = dialect.cuda_text
    monkeypatch.setattr(dialect, "cuda_text", lambda file, metal: made.append(file) or translate(file, metal))
    file_text.cache_clear()
    kernel_text.cache_clear()
    for _ in range(2):
        for name in kernel_names("cuda", "kv_attention_rows"):
            kernel_text("cuda", "kv_attention_rows", name)
    assert sorted(made) == ["kv_attention_rows", "packed_kv"]


def test_cuda_has_no_matrix_kernel_of_metal() -> None:
    with pytest.raises(FileNotFoundError):
        file_text("cuda", "kv_attention_tiles")


@pytest.mark.parametrize(("language", "file", "name"), TEXTS)
def test_a_body_asks_for_no_buffer_by_accident(language: str, file: str, name: str) -> None:
    """MLX adds a buffer for `q_shape` wherever these letters stand; none of our kernels wants one."""
    text = kernel_text(language, file, name)
    assert not re.search(r"_shape|_strides|_ndim", text.body)
    assert "//" not in text.body
    assert len(text.body.strip()) > 100


@pytest.mark.parametrize("kernel", sorted(KERNELS), ids=lambda kernel: kernel.name)
def test_a_body_uses_all_its_arguments_and_stays_far_from_31_buffers(kernel: kv_attention.Kernel) -> None:
    text = kernel_text("metal", kernel.file, kernel.name)
    for name in (*kernel.inputs, *kernel.outputs):
        assert re.search(rf"\b{name}\b", text.header + text.body), name
    assert len(kernel.inputs) + len(kernel.outputs) <= 16


def test_headers_come_along_and_in_their_order() -> None:
    text = kernel_text("metal", "kv_attention_tiles", "kv_attention_tiles")
    assert text.header.index("load_words") < text.header.index("row_sum")
    assert kernel_text("metal", "kv_attention_rows", "kv_attention_merge").header.count("load_words") == 1


def test_a_variant_is_the_same_body_where_a_word_is_defined() -> None:
    for language in ("metal", "cuda"):
        text = kernel_text(language, "kv_attention_rows", "kv_attention_lanes")
        other = kernel_text(language, "kv_attention_rows", "kv_attention_lanes_segments")
        assert other == ("kv_attention_lanes_segments", "#define SEGMENTED 1\n" + text.header, text.body)
        assert other.digest != text.digest


def test_a_digest_changes_with_the_text_and_with_nothing_else() -> None:
    text = kernel_text("metal", "rope_append", "rope_append")
    assert text._replace(body=text.body + " ").digest != text.digest
    assert text._replace(header=text.header + " ").digest != text.digest
    assert kernel_text.__wrapped__("metal", "rope_append", "rope_append").digest == text.digest


def test_comments_go_and_lines_stay() -> None:
    assert without_comments("a;  // q_shape\n/* b\n c */ d;\ne") == "a;\n\n d;\ne"


def test_an_unknown_kernel_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        kernel_text("metal", "rope_append", "nothing")
