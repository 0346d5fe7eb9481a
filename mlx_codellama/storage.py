"""How keys and values are kept: the widths asked for, and which tokens. Arithmetic only, no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from mlx_codellama.errors import ConfigError

STEP = 256  # tokens by which storage grows
SHORT_STEP = 64  # while it holds fewer than STEP: many short tails over one shared beginning then stay small
WIDTHS = (16, 8, 4)
SINKS = 4  # first tokens that a window keeps
SPARE = 32  # tokens that a window keeps besides what it shows, so that as many can be taken back

KVBits: TypeAlias = "int | tuple[int, int] | None"  # as users write it: both, or keys and values apart


def steps(n_tokens: int) -> int:
    """n_tokens rounded up to what storage has room for."""
    step = SHORT_STEP if n_tokens < STEP else STEP
    return step * math.ceil(n_tokens / step)


@dataclass(frozen=True)
class KVStorage:
    """What a key-value cache stores.

    k_bits, v_bits  16, 8 or 4; None for the dtype of the activations. Both are None or neither. 16 with 16 is kept as
                    16-bit floats (the activations' own where they have 16 bits, else float16); any other pair as
                    packed rows (kernels/packed_kv.py), which hold float16 where a part has 16 bits
    window          None to keep every token; else only the first `sinks` tokens and the last `window`, the newest
                    included; SPARE more are stored, so that as many can be taken back. Keys keep the angles of the
                    positions at which they were read. Source: Xiao et al. 2023, "Efficient Streaming Language Models
                    with Attention Sinks" (arXiv:2309.17453); there positions are counted anew inside the window, here
                    they are not
    Raises ConfigError for anything else.
    """

    k_bits: int | None = None
    v_bits: int | None = None
    window: int | None = None
    sinks: int = SINKS

    def __post_init__(self) -> None:
        if (self.k_bits is None) != (self.v_bits is None):
            raise ConfigError("keys have bits and values have none, or the other way round", hint="give both, or none")
        for bits in (self.k_bits, self.v_bits):
            if bits is not None and (type(bits) is not int or bits not in WIDTHS):
                raise ConfigError(f"keys and values cannot have {bits!r} bits", hint="use 16, 8 or 4")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"a window of {self.window} tokens keeps nothing", hint="use 1 or more")
        if self.sinks < 0:
            raise ConfigError(f"sinks is {self.sinks}; expected 0 or more")

    @classmethod
    def of(cls, kv_bits: KVBits, *, window: int | None = None, sinks: int = SINKS) -> KVStorage:
        """kv_bits as users give it: None, one number for both, or a pair (keys, values)."""
        if isinstance(kv_bits, (tuple, list)):
            if len(kv_bits) != 2:
                raise ConfigError(f"kv_bits is {kv_bits!r}", hint="give one number, or two: (keys, values)")
            return cls(kv_bits[0], kv_bits[1], window, sinks)
        return cls(kv_bits, kv_bits, window, sinks)

    @property
    def bits(self) -> tuple[int, int] | None:
        """(keys, values), None for the activations' own."""
        return None if self.k_bits is None or self.v_bits is None else (self.k_bits, self.v_bits)

    @property
    def packed(self) -> bool:
        """Whether rows are packed; floats otherwise."""
        return self.bits is not None and min(self.bits) < 16

    def row_bytes(self, head_dim: int, compute_bytes: int) -> int:
        """Bytes of one token in one kv head, keys and values. compute_bytes: width of an activation."""
        if self.bits is None:
            return 2 * head_dim * compute_bytes
        group = 64 if head_dim % 64 == 0 else 32
        parts = (head_dim * bits // 8 + (4 * head_dim // group if bits < 16 else 0) for bits in self.bits)
        return sum(parts)

    def tokens(self, n_tokens: int) -> int:
        """Tokens that storage has room for once n_tokens were read: whole steps, or the sinks, the window and SPARE."""
        most = steps(n_tokens)
        return most if self.window is None else min(most, self.sinks + self.window + SPARE)

    def __str__(self) -> str:
        if self.k_bits is None:
            return "the activations' own width"
        return f"{self.k_bits} bits" if self.k_bits == self.v_bits else f"{self.k_bits} and {self.v_bits} bits"
