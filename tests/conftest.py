"""What every test may use: where the repository is, and the data beside it that the repository does not carry."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark problems and tokenizers beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data folder beside the checkout (HumanEval, MBPP, the Llama tokenizer)")
    return SHARED_DATA
