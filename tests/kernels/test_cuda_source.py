"""The CUDA twins: translated from their Metal text, and accepted by NVRTC in the frame that MLX gives them. No GPU."""

from __future__ import annotations

import os
import re

import cuda_check
import mlx.core as mx
import pytest

from mlx_codellama.kernels.gpu import dialect
from mlx_codellama.kernels.gpu import kernel as built
from mlx_codellama.kernels.gpu import kv_attention as attention
from mlx_codellama.kernels.gpu import rope_append as appending
from mlx_codellama.kernels.gpu.kernel import Kernel
from mlx_codellama.kernels.gpu.source import kernel_text
from mlx_codellama.kernels.packed_kv import RowFormat

ROWS = dict.fromkeys(("rows", *(f"rows_{i}" for i in range(1, attention.MOST_SEGMENTS))), mx.uint32)
INPUTS = {**ROWS, "dims": mx.int32} | dict.fromkeys(
    ("scale", "cosine", "sine", "part_o", "part_m", "part_l"), mx.float32
)
Template = dict[str, int | mx.Dtype]


def test_translation_changes_the_words_that_cuda_lacks_and_nothing_else() -> None:
    metal = """constant constexpr float LOW = 1; // a device pointer
// kernel: some
//   notes
  const device uint* from = rows;
  threadgroup float shared_sum[4];
  for (int i = 0; i < N / 2; i++) {
  for (int i = 0; i < n; i++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
"""
    assert (
        dialect.cuda_text("rope_append", metal)
        == """constexpr float LOW = 1; // a device pointer
// kernel: some
//   notes
  METAL_ATTRIBUTES
  const uint* from = rows;
  __shared__ float shared_sum[4];
  #pragma unroll
  for (int i = 0; i < N / 2; i++) {
  for (int i = 0; i < n; i++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
"""
    )


def source(kernel: Kernel, dtype: mx.Dtype, template: Template) -> str:
    text = kernel_text("cuda", kernel.file, kernel.name)
    inputs = [(name, INPUTS.get(name, dtype)) for name in kernel.inputs]
    outputs = [(name, mx.uint32 if name == "packed" else INPUTS.get(name, dtype)) for name in kernel.outputs]
    return cuda_check.framed(text, inputs, outputs, template)


def attention_source(
    dtype: mx.Dtype, bits: tuple[int, int], n_rows: int, head_dim: int = 128, window: bool = False, **how: bool
) -> str:
    plan = attention.plan("cuda", dtype, RowFormat(head_dim, *bits), n_rows, window, **how)
    assert plan is not None
    return source(plan.kernels[0], dtype, plan.template)


def append_source(dtype: mx.Dtype, bits: tuple[int, int], head_dim: int = 128) -> str:
    plan = appending.plan("cuda", dtype, RowFormat(head_dim, *bits))
    assert plan is not None
    return source(appending.ROPE_APPEND, dtype, plan.template)


def merge_source(dtype: mx.Dtype) -> str:
    return source(attention.MERGE, dtype, {"T": dtype, "D": 128})


FEW = {
    "lanes": lambda: attention_source(mx.bfloat16, (4, 8), 1),
    "window": lambda: attention_source(mx.float16, (4, 4), 2, window=True),
    "matrix products": lambda: attention_source(mx.bfloat16, (8, 4), 8, window=True),
    "segments": lambda: attention_source(mx.float16, (8, 4), 1, segments=True),
    "matrix products of segments": lambda: attention_source(mx.float16, (4, 4), 8, segments=True),
    "four rows": lambda: attention_source(mx.float16, (8, 4), 4),
    "merge": lambda: merge_source(mx.float16),
    "append": lambda: append_source(mx.float16, (8, 16), 64),
}
ALL = {
    f"{name} {dtype} {bits}": (lambda make=make, dtype=dtype, bits=bits: make(dtype, bits))
    for dtype in (mx.float32, mx.float16, mx.bfloat16)
    for bits in ((4, 4), (8, 4), (16, 8), (16, 16))
    for name, make in {
        "lanes 1": lambda dtype, bits: attention_source(dtype, bits, 1),
        "lanes 4": lambda dtype, bits: attention_source(dtype, bits, 4, head_dim=64),
        "rows 8": lambda dtype, bits: attention_source(dtype, bits, 8),
        "rows 16 in a window": lambda dtype, bits: attention_source(dtype, bits, 16, 64, window=True),
        "segments": lambda dtype, bits: attention_source(dtype, bits, 3, segments=True),
        "rows 8 of segments": lambda dtype, bits: attention_source(dtype, bits, 8, segments=True),
        "append": append_source,
    }.items()
}


def compiles(text: str, arch: str) -> None:
    try:
        built = cuda_check.compiled(text, arch)
    except cuda_check.Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    assert built.cubin_bytes > 0
    assert "warning" not in built.log
    assert built.stack_bytes == 0


@pytest.mark.parametrize("name", FEW)
def test_nvrtc_accepts_a_kernel_without_a_warning(name: str) -> None:
    compiles(FEW[name](), "sm_80")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ALL)
def test_nvrtc_accepts_every_specialisation(name: str, arch: str) -> None:
    compiles(ALL[name](), arch)


def test_two_texts_of_a_kernel_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps compiled CUDA modules by name, in a folder that the next version of this package meets."""
    names = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda name, **_: names.append(name))
    text = kernel_text("cuda", attention.LANES.file, attention.LANES.name)
    for each in (text, text, text._replace(body=text.body + ";"), text._replace(header=text.header + "\n")):
        monkeypatch.setattr(built, "kernel_text", lambda *_, each=each: each)
        built._built.cache_clear()
        built._built("cuda", attention.LANES)
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\w+", name) for name in names)


@pytest.mark.parametrize(
    ("old", "new"),
    [("const uint* row", "const device uint* row"), ("score += simd_", "score += smd_"), ("__shared__", "threadgroup")],
)
def test_nvrtc_refuses_what_is_no_cuda(old: str, new: str) -> None:
    text = FEW["lanes"]()
    assert old in text
    with pytest.raises(RuntimeError) as caught:
        cuda_check.compiled(text.replace(old, new), "sm_80")
    if isinstance(caught.value, cuda_check.Unavailable):
        pytest.skip(str(caught.value))
    assert "error" in str(caught.value)
