"""Codes laid out with more bits are the same numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_codellama.quant.affine import unpack
from mlx_codellama.weights import widen_codes


@pytest.mark.parametrize(("bits", "to"), [(2, 4), (3, 4), (5, 8), (6, 8), (2, 8), (3, 8)])
def test_wider_codes_are_the_same_numbers(bits: int, to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_codellama.weights.codes._CHUNK_BYTES", 1000)  # several chunks, the last one short
    words = np.random.default_rng(bits).integers(0, 1 << 32, (7, 96 * bits // 32), np.uint32)
    wide = widen_codes(mx.array(words), bits, to)
    assert wide.shape == (7, 96 * to // 32)
    assert np.array_equal(unpack(np.array(wide), to), unpack(words, bits))


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_mlx_reads_the_same_weights_from_wider_codes(bits: int) -> None:
    weight, scales, biases = mx.quantize(mx.random.normal((9, 160)), group_size=32, bits=bits)
    to = 4 if bits < 4 else 8
    before = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
    after = mx.dequantize(widen_codes(weight, bits, to), scales, biases, group_size=32, bits=to)
    assert mx.array_equal(before, after)
