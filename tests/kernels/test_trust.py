"""Trust: a kernel is tested once per device, MLX and source, and a wrong one is left aside with one warning."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_codellama.errors import BackendError
from mlx_codellama.kernels import dispatch
from mlx_codellama.kernels.gpu import trust

hashed: list[str] = []


class FakeKernel(NamedTuple):
    name: str
    text: str

    def digest(self, language: str) -> str:
        hashed.append(self.name)
        return f"{language}:{self.text}"


class FakePlan(NamedTuple):
    label: str = "spin<float16>"
    text: str = "v1"
    language: str = "metal"
    simdgroups: int = 8

    @property
    def template(self) -> dict[str, int]:
        return {"NSG": self.simdgroups}

    @property
    def kernels(self) -> tuple[FakeKernel, ...]:
        return (FakeKernel(self.label.partition("<")[0], self.text),)


class SelfTest:
    """Counts how often it is asked."""

    def __init__(self, outcome: float | Exception) -> None:
        self.outcome, self.runs = outcome, 0

    def __call__(self) -> float:
        self.runs += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLX_CODELLAMA_CACHE", str(tmp_path / "cache"))
    with dispatch.simulate("metal"):
        yield tmp_path / "cache"


def restart() -> None:
    """What a new process starts from: the file, and nothing else."""
    for cached in (trust._settled, trust._pauses, trust._known, trust._warned, trust._machine):
        cached.cache_clear()


def test_a_kernel_that_agrees_is_tried_once_and_remembered_by_the_next_process(folder: Path) -> None:
    selftest = SelfTest(0.4)
    assert trust.trusted(FakePlan(), selftest)
    assert trust.trusted(FakePlan(), selftest)
    restart()
    assert trust.trusted(FakePlan(), selftest)
    assert selftest.runs == 1
    (entry,) = json.loads((folder / "kernels.json").read_text()).values()
    assert entry["kernel"] == "spin<float16>"
    assert entry["passed"] is True
    assert os.listdir(folder) == ["kernels.json"]  # no temporary file is left


@pytest.mark.parametrize(
    "other",
    [FakePlan(text="v2"), FakePlan(label="spin<bfloat16>"), FakePlan(language="cuda"), FakePlan(simdgroups=4)],
)
def test_another_source_or_specialisation_is_tried_again(other: FakePlan) -> None:
    selftest = SelfTest(0.4)
    trust.trusted(FakePlan(), selftest)
    trust.trusted(other, selftest)
    assert selftest.runs == 2


@pytest.mark.parametrize("machine", [("Other GPU", "0.32.4"), ("this", "0.33.0")])
def test_another_device_or_mlx_is_tried_again(machine: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    selftest = SelfTest(0.4)
    monkeypatch.setattr(trust, "_machine", lambda: ("this", "0.32.4"))
    trust.trusted(FakePlan(), selftest)
    trust._settled.cache_clear()
    monkeypatch.setattr(trust, "_machine", lambda: machine)
    trust.trusted(FakePlan(), selftest)
    assert selftest.runs == 2


def test_another_version_of_this_package_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    selftest = SelfTest(0.4)
    trust.trusted(FakePlan(), selftest)
    restart()
    monkeypatch.setattr(trust, "__version__", "99.0")
    trust.trusted(FakePlan(), selftest)
    assert selftest.runs == 2


def test_source_texts_are_hashed_at_a_plans_first_call_only() -> None:
    selftest = SelfTest(0.4)
    assert trust.trusted(FakePlan(), selftest)
    hashed.clear()
    for _ in range(3):
        assert trust.trusted(FakePlan(), selftest)
        assert trust.known_good(FakePlan(), selftest)
    assert hashed == []


PASSING = [
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)."),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
    RuntimeError("[metal::Device] Unable to build metal library from source\nCompilation service was interrupted"),
    MemoryError(),
]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: str(failure)[:20])
def test_a_failure_that_may_pass_is_not_kept_and_tried_again_after_a_while(failure: Exception, folder: Path) -> None:
    selftest = SelfTest(failure)
    ran_at = []

    def ask(call: int) -> bool:
        before = selftest.runs
        passed = trust.trusted(FakePlan(), selftest)
        ran_at.extend([call] if selftest.runs > before else [])
        return passed

    with pytest.warns(trust.KernelWarning, match="left aside for now: .*[^.]. Pure MLX") as caught:
        assert not any(ask(call) for call in range(3 * trust.PAUSE))
    assert len(caught) == 1
    selftest.outcome = 0.4
    assert ask(3 * trust.PAUSE)
    assert ran_at == [0, trust.PAUSE, 3 * trust.PAUSE]  # twice as rarely each time
    assert [entry["passed"] for entry in json.loads((folder / "kernels.json").read_text()).values()] == [True]


def test_the_next_process_tries_at_once_what_failed_for_another_reason(folder: Path) -> None:
    with pytest.warns(trust.KernelWarning):
        assert not trust.trusted(FakePlan(), SelfTest(PASSING[0]))
    assert not (folder / "kernels.json").exists()
    restart()
    assert trust.trusted(FakePlan(), SelfTest(0.4))


LASTING = [
    RuntimeError('kernel.cu(12): error: identifier "q" is undefined'),
    ValueError("Thread group size (256) is greater than  the maximum allowed threads per threadgroup (192)."),
    RuntimeError("CUDA error: too many resources requested for launch"),
]


@pytest.mark.parametrize("failure", LASTING, ids=lambda failure: str(failure)[:20])
def test_what_the_compiler_or_the_device_refuses_is_kept(failure: Exception) -> None:
    selftest = SelfTest(failure)
    with pytest.warns(trust.KernelWarning, match=r"left aside: .*[^.]\. Pure MLX"):  # one full stop
        assert not trust.trusted(FakePlan(), selftest)
    restart()
    with pytest.warns(trust.KernelWarning):
        assert [trust.trusted(FakePlan(), selftest) for _ in range(3 * trust.PAUSE)] == [False] * 3 * trust.PAUSE
    assert selftest.runs == 1


BROKEN = [
    (SelfTest(3.5), "differs from the reference, by 3.5 times what is allowed"),
    (SelfTest(float("nan")), "differs from the reference, by nan times"),
    (SelfTest(RuntimeError("[metal] Unable to build\nfile:3:1: error: no 'q'\nmore")), "file:3:1: error: no 'q'"),
]


@pytest.mark.parametrize(("selftest", "said"), BROKEN, ids=["wrong", "not a number", "does not compile"])
def test_a_broken_kernel_is_left_aside_with_one_warning_that_says_what_and_where(selftest: SelfTest, said: str) -> None:
    before = selftest.runs
    plans = [FakePlan(), FakePlan(), FakePlan(label="spin<float32>")]  # the last: the same kernel, so no second warning
    with pytest.warns(trust.KernelWarning) as caught:
        assert not sum(trust.trusted(plan, selftest) for plan in plans)
    (warning,) = caught
    for word in ("spin<float16>", said, "mlx-codellama doctor --kernels", "pure MLX"):
        assert word.lower() in str(warning.message).lower()
    assert selftest.runs == before + 2
    restart()
    with pytest.warns(trust.KernelWarning, match="spin<float16>"):  # remembered, and said again to a new process
        assert not trust.trusted(FakePlan(), selftest)
    assert selftest.runs == before + 2


def test_a_broken_kernel_is_an_error_where_its_backend_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CODELLAMA_REQUIRE", "metal")
    for _ in range(2):  # found, then remembered
        with pytest.raises(BackendError, match=r"spin<float16>.* by 2 times") as caught:
            trust.trusted(FakePlan(), SelfTest(2.0))
        assert "doctor --kernels" in caught.value.hint


def test_a_folder_that_cannot_be_written_costs_a_selftest_per_process_and_nothing_else(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    selftest = SelfTest(0.4)
    with warnings.catch_warnings(record=True) as said:
        assert trust.trusted(FakePlan(), selftest)
        assert trust.trusted(FakePlan(), selftest)
        restart()
        assert trust.trusted(FakePlan(), selftest)
    assert selftest.runs == 2
    assert not said


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 3}', '{"a": {"passed": true}}', b"\xff\xfe".decode("latin-1")], ids=repr
)
def test_a_damaged_file_is_written_anew(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "kernels.json").write_text(text, encoding="latin-1")
    selftest = SelfTest(0.4)
    assert trust.trusted(FakePlan(), selftest)
    restart()
    assert trust.trusted(FakePlan(), selftest)
    assert selftest.runs == 1


def test_verdicts_of_two_processes_stand_side_by_side(folder: Path) -> None:
    trust.trusted(FakePlan(), SelfTest(0.4))
    known = dict(trust._known())
    restart()
    trust._known()  # this process read the file; another one adds to it; then this one does
    entry = next(iter(known.values()))._asdict() | {"kernel": "other<int>"}
    path = folder / "kernels.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"other": entry}))
    trust.trusted(FakePlan(label="third<int>"), SelfTest(0.4))
    assert {e["kernel"] for e in json.loads(path.read_text()).values()} == {"spin<float16>", "other<int>", "third<int>"}


def test_doctor_tries_again_what_is_known_to_fail() -> None:
    with pytest.warns(trust.KernelWarning):
        assert not trust.trusted(FakePlan(), SelfTest(2.0))
    assert trust.verdict(FakePlan(), SelfTest(0.5)).passed
    assert trust.trusted(FakePlan(), SelfTest(2.0))  # what doctor found counts from now on
