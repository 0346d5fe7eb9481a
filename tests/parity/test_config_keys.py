"""The keys that config.json may have, held to what transformers itself writes."""

from __future__ import annotations

import pytest

from mlx_codellama.config import ModelArgs
from mlx_codellama.config_keys import FIXED, INERT


def test_no_key_is_both_free_and_fixed() -> None:
    assert not INERT & FIXED.keys()


@pytest.mark.peers
def test_every_attribute_of_transformers_configs_is_known() -> None:
    from transformers import LlamaConfig, PretrainedConfig

    read = set(ModelArgs.from_dict(LlamaConfig(rope_theta=1e6).to_dict()).to_dict()) | {"rope_parameters", "dtype"}
    for config in (PretrainedConfig(), LlamaConfig()):
        assert set(config.to_dict()) | set(vars(config)) <= INERT | FIXED.keys() | read
