"""Rotation and packing of new tokens on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import selftest, trust
from mlx_codellama.kernels.gpu.kernel import Kernel, type_name, whole_numbers
from mlx_codellama.kernels.packed_kv import RowFormat

HEAD_DIMS = (32, 64, 128, 256)
ROPE_APPEND = Kernel("rope_append", "rope_append", ("q", "k", "v", "cosine", "sine", "dims"), ("turned", "packed"))

Appended = tuple[mx.array, mx.array]  # q turned, packed rows


class Plan(NamedTuple):
    """What the kernel's text is specialised for."""

    language: str
    dtype: mx.Dtype
    fmt: RowFormat

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (ROPE_APPEND,)

    @property
    def label(self) -> str:
        """Names the compiled kernel in verdicts and warnings."""
        fmt = self.fmt
        return f"rope_append<{type_name(self.dtype)}, D{fmt.head_dim}, K{fmt.k_bits} V{fmt.v_bits}>"

    @property
    def template(self) -> dict[str, int | mx.Dtype]:
        fmt = self.fmt
        widths: dict[str, int | mx.Dtype] = {"KB": fmt.k_bits, "VB": fmt.v_bits}
        return widths | {"T": self.dtype, "D": fmt.head_dim, "GS": fmt.group_size}


@dispatch.remembered
def plan(language: str, dtype: mx.Dtype, fmt: RowFormat) -> Plan | None:
    """None where the kernel does not fit the head size."""
    return Plan(language, dtype, fmt) if fmt.head_dim in HEAD_DIMS else None


def append(plan: Plan, q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> Appended:
    """rope_append by a plan."""
    b, h, length, _ = q.shape
    n_kv = k.shape[1]
    turned, packed = ROPE_APPEND(
        plan.language,
        [q, k, v, cos, sin, whole_numbers(length, h, n_kv)],
        template=plan.template,
        grid=(32 * b * length, h + 2 * n_kv, 1),
        threadgroup=(32, 1, 1),
        shapes=[q.shape, (b, n_kv, length, plan.fmt.words)],
        dtypes=[plan.dtype, mx.uint32],
    )
    return turned, packed


def rope_append(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    fmt: RowFormat,
    reference: Callable[..., Appended],
) -> Appended | None:
    """`reference` by this device's kernel, or None where there is none for it or it is not trusted.

    Raises BackendError instead of None where MLX_CODELLAMA_REQUIRE names a GPU backend.
    """
    language = dispatch.backend()
    if language == "cpu":
        return None
    chosen = plan(language, q.dtype, fmt)
    if chosen is None or not q.dtype == k.dtype == v.dtype:
        trust.refuse(language, f"rope_append has no kernel for {type_name(q.dtype)} heads of {fmt.head_dim}")
        return None
    if not trust.trusted(chosen, lambda: selftest.append_error(chosen.fmt, chosen.dtype, reference, bound(chosen))):
        return None
    dispatch.record("rope_append", language)
    return append(chosen, q, k, v, cos, sin)


def bound(plan: Plan) -> Callable[..., Appended]:
    """`append` with its plan filled in."""
    return lambda *arrays: append(plan, *arrays)
