"""A placement is decided once, from dimensions, options and a machine, and says the same to everybody who asks."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from mlx_codellama import load
from mlx_codellama.config import GEOMETRIES, NATIVE_BITS, ModelArgs, QuantArgs
from mlx_codellama.errors import ConfigError, MemoryBudgetError
from mlx_codellama.kernels import dispatch
from mlx_codellama.memory import MachineMemory, with_bits
from mlx_codellama.placement import Machine, Placement, place
from mlx_codellama.storage import KVStorage

ARGS = replace(with_bits(GEOMETRIES["7b"], 3), dtype="bfloat16")


class MadeUp(Machine):
    """A machine with as much memory as a test wants; nothing is in use."""

    def __init__(self, backend: str, *, native: bool = False, free_bytes: int = 1 << 40) -> None:
        super().__init__()
        self._made_up = backend, native
        self.free_bytes = free_bytes

    @property
    def backend(self) -> str:
        return self._made_up[0]

    @property
    def native(self) -> bool:
        return self._made_up[1]

    def memory(self) -> MachineMemory:
        return MachineMemory(1 << 40, self.free_bytes)

    def active_bytes(self) -> int:
        return 0

    def collect(self) -> None:
        pass


def on(backend: str, args: ModelArgs = ARGS, *, native: bool = False, **options: str) -> Placement:
    return place(args, machine=MadeUp(backend, native=native), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "stored", "asked", "dtype"),
    [
        ("cpu", "bfloat16", None, "float32"),
        ("cpu", "bfloat16", "float16", "float16"),
        ("metal", "bfloat16", None, "bfloat16"),
        ("cuda", "float32", None, "float32"),
        ("metal", "float32", "bfloat16", "bfloat16"),
    ],
)
def test_activations_have_the_checkpoints_dtype_save_on_a_cpu(
    backend: str, stored: str, asked: str | None, dtype: str
) -> None:
    placement = on(backend, replace(ARGS, dtype=stored), dtype=asked)  # type: ignore[arg-type]
    assert placement.dtype == dtype
    assert placement.runtime.compute_bytes == (4 if dtype == "float32" else 2)
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        on(backend, dtype="int8")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_only_native_kernels_hold_codes_wider_and_scales_as_stored(bits: int) -> None:
    args, path = with_bits(ARGS, bits), "model.layers.0.mlp.up_proj"
    native, plain = on("cpu", args, native=True), on("cpu", args)
    assert native.held(path) == QuantArgs({2: 4, 3: 4, 5: 8, 6: 8}.get(bits, bits), 64)
    assert native.held_wider == (None if bits in NATIVE_BITS else True)
    assert native.keeps_dtype(f"{path}.scales")
    assert not native.keeps_dtype("model.embed_tokens.scales")  # MLX unpacks these
    assert not native.keeps_dtype("model.norm.weight")
    for other in (plain, on("metal", args), on("cuda", args)):
        assert (other.held(path), other.held_wider) == (QuantArgs(bits, 64), None)
        assert not other.keeps_dtype(f"{path}.scales")
    assert native.as_stored().keeps_dtype(f"{path}.scales") == (bits in NATIVE_BITS)


def test_codes_stay_as_stored_if_the_model_fits_only_so() -> None:
    args = with_bits(ARGS, 2)
    wide = on("cpu", args, native=True)
    need, least = (one.plan(256, most=16).total_bytes for one in (wide, wide.as_stored()))
    assert least < need
    for free, held_wider in ((need, True), (need - 1, False), (least, False)):
        chosen = place(args, machine=MadeUp("cpu", native=True, free_bytes=free)).for_loading(256)
        assert chosen.held_wider is held_wider
        assert chosen.plan_within(256, free) == wide.plan_within(256, free)  # what `plan` shows
    with pytest.raises(MemoryBudgetError, match="256 tokens need"):
        place(args, machine=MadeUp("cpu", native=True, free_bytes=least - 1)).for_loading(256)


def test_codes_that_would_take_more_as_stored_are_not_kept_so() -> None:
    """To unpack a layer's codes of 3 bits takes more than all of a 7B model saves."""
    wide = on("cpu", with_bits(ARGS, 3), native=True)
    need, stored = (one.plan(256, most=16).total_bytes for one in (wide, wide.as_stored()))
    assert need < stored
    assert wide.within(256, need - 1) is wide
    with pytest.raises(MemoryBudgetError, match=f"need {need / 1e9:.2f} GB"):
        place(wide.args, machine=MadeUp("cpu", native=True, free_bytes=need - 1)).for_loading(256)


def test_a_placement_is_frozen_and_equal_if_the_decisions_are() -> None:
    one, other = on("metal"), on("metal")
    assert one == other != on("cuda")
    assert one != one.as_stored()
    with pytest.raises(FrozenInstanceError):
        one.dtype = "float32"  # type: ignore[misc]


def test_a_plan_counts_the_chunk_that_the_engine_reads() -> None:
    for placement in (on("cpu"), on("cpu", native=True), on("metal")):
        for context in (5_000, 90_000):
            chunk = placement.chunk_tokens(context - placement.chunk_tokens(0))
            whole = placement.plan(context)
            assert placement.plan(context, most=chunk) == whole
            assert placement.plan(context, most=chunk // 2).activations_bytes < whole.activations_bytes


def test_without_mlx_a_plan_guesses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mlx_codellama.kernels.dispatch")
    monkeypatch.setitem(sys.modules, "mlx_codellama.kernels.dispatch", None)
    for system, backend in (("Darwin", "metal"), ("Linux", "cpu")):
        monkeypatch.setattr("platform.system", lambda system=system: system)
        placement = place(ARGS, machine=Machine("64GB"))
        assert (placement.runtime.name, placement.runtime.native, placement.why_slow()) == (backend, False, "")
        assert placement.plan(1000).total_bytes > 10**9


def test_load_keeps_the_placement_that_it_loaded_by() -> None:
    model = load(kv_bits=(8, 4), exact=True)
    placement = model.placement
    assert placement is not None
    assert placement == place(model.args, exact=True, storage=KVStorage(8, 4))
    assert (placement.kv_bits, f"mlx.core.{placement.dtype}") == ("8/4", str(model.model.dtype))
    assert placement.weights_bytes == sum(array.nbytes for _, array in model.model.named_parameters())
    assert placement.runtime.name == dispatch.backend()
