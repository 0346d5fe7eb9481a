"""How keys and values are stored: their widths, and which tokens. Arithmetic only, no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from mlx_codellama.errors import ConfigError

STEP = 256  # storage grows by this many tokens
SHORT_STEP = 64  # growth below STEP tokens, so that many short tails of a shared beginning stay small
WIDTHS = (16, 8, 4)
SINKS = 4  # the first tokens, which a window keeps
SPARE = 32  # extra tokens that a window stores; as many can be rewound

KVBits: TypeAlias = "int | tuple[int, int] | None"  # as users write it: one width, or (keys, values)


def steps(n_tokens: int) -> int:
    """The capacity of storage for n_tokens: rounded up to whole steps."""
    step = SHORT_STEP if n_tokens < STEP else STEP
    return step * math.ceil(n_tokens / step)


@dataclass(frozen=True)
class KVStorage:
    """The storage of a key-value cache.

    k_bits, v_bits  16, 8 or 4; None for the dtype of the activations. Both are None or neither. 16 and 16 means 16-bit
                    floats (the activations' dtype if it has 16 bits, else float16). Any other pair means packed rows
                    (kernels/packed_kv.py), in which a 16-bit part is float16
    window          None to keep every token; else only the first `sinks` tokens and the last `window`, including the
                    newest. SPARE more are stored, and as many can be rewound. Keys keep the rotary angles of their
                    original positions. Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention
                    Sinks" (arXiv:2309.17453); unlike there, positions are not renumbered inside the window
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
        """From kv_bits as users write it: None, one number for both, or a pair (keys, values)."""
        if isinstance(kv_bits, (tuple, list)):
            if len(kv_bits) != 2:
                raise ConfigError(f"kv_bits is {kv_bits!r}", hint="give one number, or two: (keys, values)")
            return cls(kv_bits[0], kv_bits[1], window, sinks)
        return cls(kv_bits, kv_bits, window, sinks)

    @property
    def bits(self) -> tuple[int, int] | None:
        """Bits of (keys, values); None for the dtype of the activations."""
        return None if self.k_bits is None or self.v_bits is None else (self.k_bits, self.v_bits)

    @property
    def packed(self) -> bool:
        """Whether rows are packed; otherwise keys and values are floats."""
        return self.bits is not None and min(self.bits) < 16

    def row_bytes(self, head_dim: int, compute_bytes: int) -> int:
        """Bytes of keys and values of one token in one kv head. compute_bytes: width of an activation."""
        if self.bits is None:
            return 2 * head_dim * compute_bytes
        group = 64 if head_dim % 64 == 0 else 32
        parts = (head_dim * bits // 8 + (4 * head_dim // group if bits < 16 else 0) for bits in self.bits)
        return sum(parts)

    def tokens(self, n_tokens: int) -> int:
        """Capacity in tokens after n_tokens were read: whole steps, or the sinks, the window and SPARE."""
        most = steps(n_tokens)
        return most if self.window is None else min(most, self.sinks + self.window + SPARE)

    def __str__(self) -> str:
        if self.k_bits is None:
            return "the activations' own width"
        return f"{self.k_bits} bits" if self.k_bits == self.v_bits else f"{self.k_bits} and {self.v_bits} bits"
