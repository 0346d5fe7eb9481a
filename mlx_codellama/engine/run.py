"""One generation inside the engine, and the prompt that one or several of them share."""

from __future__ import annotations

from collections import deque

import mlx.core as mx

from mlx_codellama.cache import Sequence
from mlx_codellama.engine.choices import Choices
from mlx_codellama.engine.request import FinishReason, Request, Step
from mlx_codellama.sampling import Sampler


class Prompt:
    """A prompt on its way into a sequence, for one run or for several samples of it.

    sequence   None until reading begins, and after the last sample has taken it
    logits     float32 [V] after the last token, once it is read
    cached     tokens that another call had read already
    n_foreign  of these, the tokens whose storage others made and hold
    foreign    that storage, by its identity
    pending    the runs, by their identity, that have not begun to generate
    """

    def __init__(self, requests: list[Request], sequence: Sequence | None = None) -> None:
        self.ids = requests[0].prompt
        self.n_tokens = max(request.n_tokens for request in requests)  # with the longest answer
        self.sequence, self.logits = sequence, None
        self.given, self.is_begun = sequence is not None, False
        self.cached = self.n_foreign = 0
        self.foreign: frozenset[object] = frozenset()
        self.pending: set[int] = set()
        self.chunk_limit: int | None = None

    sequence: Sequence | None
    logits: mx.array | None

    @property
    def n_read(self) -> int:
        return 0 if self.sequence is None else self.sequence.offset

    @property
    def is_read(self) -> bool:
        return self.logits is not None


class Run:
    """The state of one request. The engine alone changes it, except `abandoned` and `cancelled`, which anybody may set.

    steps     that came and were not fetched
    ids       of all steps, a stop id included
    choices   of the last forward pass, not yet read
    promised  bytes of keys and values that are reserved for it, beside those in `foreign`
    reads     its promise holds those of the prompt; other samples of the prompt have them from it. Whoever takes over
              reading when it leaves takes over that, too
    foreign   storage that it found and did not make, by its identity
    """

    def __init__(self, request: Request, prompt: Prompt) -> None:
        self.request, self.prompt = request, prompt
        prompt.pending.add(id(self))
        self.steps: deque[Step] = deque()
        self.ids: list[int] = []
        self.sequence: Sequence | None = None
        self.sampler: Sampler | None = None
        self.choices: Choices | None = None
        self.error: BaseException | None = None
        self.abandoned = self.cancelled = self.ended = False
        self.n_fetched = 0  # tokens among the steps that were fetched
        self.read_at = self.away_s = self.left_at = (
            0.0  # for lookup: when the last token was read, how long nobody asked
        )
        self.promised, self.reads = 0, False
        self.foreign: frozenset[object] = frozenset()
        self.dropped = 0

    @property
    def n_left(self) -> int:
        """Tokens that may still come, those already chosen on the device included."""
        return self.request.max_tokens - len(self.ids)

    @property
    def held(self) -> Sequence | None:
        """The sequence that it works on: its own, or as long as its prompt is read that of the prompt."""
        return self.sequence or self.prompt.sequence

    @property
    def own_bytes(self) -> int:
        """Bytes of storage that it has taken of what is promised to it."""
        sequence = self.sequence or (self.prompt.sequence if self.reads else None)
        storages = {} if sequence is None else sequence.storages
        return sum(n for key, n in storages.items() if key not in self.foreign)

    @property
    def is_ready(self) -> bool:
        """Whether its caller need not wait: for a step, an error or the end."""
        return bool(self.steps) or self.ended or self.error is not None

    def asks_to_stop(self) -> bool:
        should_stop = self.request.should_stop
        return self.cancelled or (should_stop is not None and should_stop())

    def end(self, reason: FinishReason) -> None:
        """End without a token."""
        self.steps.append(Step(None, finish_reason=reason))
        self.ended = True
