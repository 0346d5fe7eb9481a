"""The tokens of one forward pass: some of each of several sequences, or whole documents, one after the other.

Products, norms and feed-forward take all N tokens as one row [1, N, E]. Only rotation, which needs each token's
position, and attention, which stays inside a span, know where a span begins:

    spans      (a, 1) (b, 3)      (None, 4)
    tokens     a9 |  b5 b6 b7 |  c0 c1 c2 c3       a sequence has read 9 tokens, b 5; c is a document without cache
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from mlx_codellama.cache.encodings import Encoding
from mlx_codellama.cache.sequence import Sequence
from mlx_codellama.kernels.kv_attention_documents import kv_attention_documents
from mlx_codellama.kernels.rope import rope

Span: TypeAlias = "tuple[Sequence | None, int]"  # and its new tokens; None is a document without cache


class _Run(NamedTuple):
    """Neighbouring spans that are rotated and encoded together: tokens first … end - 1 of the pass."""

    first: int
    end: int
    encoding: Encoding | None  # None for documents
    spans: list[Span]


class Spans:
    """Which tokens of a pass belong to whom, with the angles of their positions.

    spans     N = Σ n tokens; a sequence stands at most once
    cos, sin  float32 [N, D/2]
    prompt    which family of kernels computes: see `kernels.kv_attention_segments`
    Raises ValueError for a span without tokens and for a sequence that stands twice.
    """

    def __init__(self, spans: List[Span], cos: mx.array, sin: mx.array, *, prompt: bool) -> None:
        self.spans, self.cos, self.sin, self.prompt = list(spans), cos, sin, prompt
        self._runs: list[_Run] = []
        at, seen = 0, set()
        for sequence, n_tokens in self.spans:
            if n_tokens < 1:
                raise ValueError(f"a span of {n_tokens} tokens")
            if sequence is not None and id(sequence) in seen:
                raise ValueError("a sequence stands twice in a pass")
            seen.add(id(sequence))
            encoding = None if sequence is None else sequence.encoding
            if self._runs and self._runs[-1].encoding == encoding:
                last = self._runs.pop()
                self._runs.append(last._replace(end=at + n_tokens, spans=[*last.spans, (sequence, n_tokens)]))
            else:
                self._runs.append(_Run(at, at + n_tokens, encoding, [(sequence, n_tokens)]))
            at += n_tokens
        self.n_tokens = at

    @property
    def cached(self) -> bool:
        """Whether some span has a cache: such a pass has no gradient."""
        return any(sequence is not None for sequence, _ in self.spans)

    def attend(self, i: int, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Rotate all tokens, store those of sequences in their layer i, and attend inside each span, causally.

        q [1, H, N, D]; k, v [1, K, N, D] → [1, H, N, D] in q.dtype
        """
        out = [part for run in self._runs for part in self._attend(run, i, q, k, v, scale)]
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)

    def advance(self) -> None:
        """Count the new tokens, after the last layer: in every sequence or, if a layer failed, in none."""
        for sequence, n_tokens in self.spans:
            if sequence is not None:
                sequence.advance(n_tokens)

    def _attend(self, run: _Run, i: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> list[mx.array]:
        cos, sin = self.cos, self.sin
        if len(self._runs) > 1:
            q, k, v = (x[:, :, run.first : run.end] for x in (q, k, v))
            cos, sin = cos[run.first : run.end], sin[run.first : run.end]
        if run.encoding is None:
            lengths = [n_tokens for _, n_tokens in run.spans]
            return [kv_attention_documents(rope(q, cos, sin), rope(k, cos, sin), v, lengths, scale=scale)]
        q, new = run.encoding.rotate_and_encode(q, k, v, cos, sin)
        out, at = [], 0
        for sequence, n_tokens in run.spans:
            assert sequence is not None
            if len(run.spans) > 1:
                part, own = q[:, :, at : at + n_tokens], [array[:, :, at : at + n_tokens] for array in new]
            else:
                part, own = q, new
            out.append(sequence.layer(i).attend(part, own, scale=scale, prompt=self.prompt))
            at += n_tokens
        return out
