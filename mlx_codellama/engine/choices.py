"""From rows of logits to the tokens chosen after them, without waiting for the device."""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_codellama.engine.request import FinishReason, Request, Step
from mlx_codellama.errors import BackendError
from mlx_codellama.sampling import Sampler, SamplerState


class Choice(NamedTuple):
    """A token still on the device, with what the host will ask about it."""

    token: mx.array  # int32 []
    finite: mx.array  # bool [], of all logits
    logprob: mx.array | None = None  # float32 []
    top_ids: mx.array | None = None  # uint32 [n]
    top_logprobs: mx.array | None = None  # float32 [n]

    def step(self, finish_reason: FinishReason | None) -> Step:
        logprob = None if self.logprob is None else cast(float, self.logprob.item())
        top: tuple[tuple[int, float], ...] = ()
        if self.top_ids is not None and self.top_logprobs is not None:
            ids, values = cast(list[int], self.top_ids.tolist()), cast(list[float], self.top_logprobs.tolist())
            top = tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
        return Step(cast(int, self.token.item()), logprob, top, finish_reason)


class Choices:
    """What one generation chooses after its rows of a forward pass: a known token and a draft of those after it.

    Row i of the logits is right if the draft was right up to there, so the sampler, with its random key and its recent
    tokens, goes through exactly the states it has when every token is read by itself. The first choice that differs
    from the draft is still a true one: it is what the sampler takes in that place. All after it is forgotten.
    """

    def __init__(self, logits: mx.array, sampler: Sampler, request: Request, draft: list[int]) -> None:
        """logits float32 [1 + len(draft), V]. Nothing is evaluated here."""
        self.begun = time.perf_counter()
        self.draft, self._sampler, self._request = draft, sampler, request
        self._choices: list[Choice] = []
        self._states: list[SamplerState] = []
        for i in range(len(draft) + 1):
            self._choices.append(_choose(logits[i], sampler, request.logprobs))
            self._states.append(sampler.state)

    @property
    def n_rows(self) -> int:
        return len(self._choices)

    @property
    def next_token(self) -> mx.array:
        """The token chosen after the first row, int32 []: the answer's next one, whatever was drafted."""
        return self._choices[0].token

    @property
    def arrays(self) -> list[mx.array]:
        """All that `read` will ask for."""
        return [a for row in (*self._choices, *self._states) for a in row if a is not None]

    def read(self, n_before: int) -> list[Step]:
        """Wait for it. → at least one Step: the draft as far as it was chosen, and one more. n_before: tokens
        generated so far.

        Raises BackendError for logits with NaN or infinity; where they come later in the pass, it ends before them.
        """
        request, steps = self._request, list[Step]()
        for choice, drafted in zip_longest(self._choices, self.draft):
            if not choice.finite.item():
                if steps:
                    break
                raise BackendError(
                    f"the model's logits after {len(request.prompt) + n_before} tokens are not finite",
                    hint="float16 may overflow: try dtype='float32' or 'bfloat16'; else check the weights for NaN",
                )
            id, finish = choice.token.item(), cast("FinishReason | None", None)
            if id in request.stop_ids:
                finish = "stop"
            elif n_before + len(steps) + 1 == request.max_tokens:
                finish = "length"
            steps.append(choice.step(finish))
            if finish is not None or id != drafted:
                break
        return steps

    def rewind(self, n_rows: int) -> None:
        """Set the sampler back to before the last n_rows rows, which must be the last ones that it saw."""
        if n_rows:
            self._sampler.state = self._states[-1 - n_rows]


def _choose(logits: mx.array, sampler: Sampler, logprobs: int | None) -> Choice:
    """Choose a token and gather what was asked about it. logits float32 [V]; nothing is evaluated here."""
    token, finite = sampler(logits), mx.all(mx.isfinite(logits))
    if logprobs is None:
        return Choice(token, finite)
    values = logits - mx.logsumexp(logits)
    if logprobs == 0:
        return Choice(token, finite, values[token])
    top = mx.argpartition(-values, min(logprobs, values.size - 1))[:logprobs]
    return Choice(token, finite, values[token], top, values[top])
