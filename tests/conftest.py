"""What every test may use: where the repository is, and the data beside it that the repository does not carry."""

from __future__ import annotations

import dataclasses
import inspect
import json.decoder
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mlx_codellama.tokenizer import Tokenizer, train_tokenizer, with_infill_pieces, without_dummy_prefix

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; children would inherit deafness
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is not a fault: no test of a property is held to a time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _counts_of_paths() -> None:
    """Each test counts the paths of ops from zero."""
    if dispatch := sys.modules.get("mlx_codellama.kernels.dispatch"):
        dispatch.forget_paths()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark problems and tokenizers beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data folder beside the checkout (HumanEval, MBPP, the Llama tokenizer)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 640 pieces with Code Llama's conventions and the infill pieces, trained here in a blink."""
    texts = [inspect.getsource(module) for module in (json.decoder, textwrap, dataclasses)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=640)


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data: Path) -> Tokenizer:
    """Llama 2's own tokenizer: 32,000 pieces, no infilling. Code Llama 34B and Python have the same file."""
    return Tokenizer.load(shared_data / "llama-tokenizer")


@pytest.fixture(scope="session")
def infill_tokenizer(llama_tokenizer: Tokenizer) -> Tokenizer:
    """7B and 13B: Llama 2's pieces and the 16 of infilling, reconstructed; it gives the official known sequence."""
    return Tokenizer(with_infill_pieces(llama_tokenizer.model_bytes))


@pytest.fixture(scope="session")
def step_tokenizer(llama_tokenizer: Tokenizer) -> Tokenizer:
    """70B-Instruct: with `<step>` in the last slot and no dummy prefix."""
    return Tokenizer(without_dummy_prefix(with_infill_pieces(llama_tokenizer.model_bytes, step=True)))
