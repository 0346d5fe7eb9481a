"""What is asked of the engine, and what comes back, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import ContextOverflowError, PromptError
from mlx_codellama.lookup import Lookup
from mlx_codellama.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """Everything that determines one generation.

    prompt       ids of the whole prompt
    max_tokens   0 only reads the prompt (a warm-up)
    params       how tokens are chosen; greedy by default
    stop_ids     a token among these ends the generation; it is the last Step's id
    logprobs     None for none, 0 for the chosen token's, n for the n most likely ones as well
    lookup       drafts tokens from the context and counts what came of it; None never drafts. The ids are the same
    should_stop  polled before each prompt chunk and before each Step; True ends with finish_reason "cancelled"
    on_prefill   called with (tokens of the prompt read, tokens of the prompt) after each chunk
    """

    prompt: list[int]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    lookup: Lookup | None = None
    should_stop: Callable[[], bool] | None = None
    on_prefill: Callable[[int, int], None] | None = None

    @property
    def n_tokens(self) -> int:
        """Prompt and answer together, at most."""
        return len(self.prompt) + self.max_tokens

    def check(self, args: ModelArgs, context: int) -> None:
        """Raise PromptError or ContextOverflowError for a request that this model cannot serve."""
        check_ids(self.prompt, args)
        check_context(len(self.prompt), self.max_tokens, context)
        check_logprobs(self.logprobs, args)


@dataclass(frozen=True)
class Step:
    """One generated token, or (id None) an end that came without one.

    id             the token; the stop id itself where that ended the generation
    logprob        natural logarithm of its probability under the model, before penalty and temperature, if asked for
    top            the n most likely tokens and their logarithms, most likely first
    finish_reason  None while there is more to come; after "stop", "length" or "cancelled" nothing follows
    """

    id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


def check_ids(ids: Sequence[int], args: ModelArgs) -> None:
    """Raises PromptError for an empty sequence or an id outside the vocabulary."""
    if not ids:
        raise PromptError("the prompt is empty", hint="an empty text still has one token, the beginning of sequence")
    low, high = min(ids), max(ids)
    if low < 0 or high >= args.vocab_size:
        raise PromptError(f"token id {low if low < 0 else high} is outside the vocabulary of {args.vocab_size}")


def check_logprobs(logprobs: int | None, args: ModelArgs) -> None:
    """Raises PromptError for a number of tokens that the vocabulary does not have."""
    if logprobs is not None and not 0 <= logprobs <= args.vocab_size:
        raise PromptError(
            f"logprobs is {logprobs}; expected 0 to {args.vocab_size}",
            hint="0 for the chosen token's alone; a model has no more tokens than its vocabulary",
        )


def check_context(n_prompt: int, max_tokens: int, context: int) -> None:
    """Raises ContextOverflowError where n_prompt + max_tokens exceeds context; PromptError for a negative count."""
    if max_tokens < 0:
        raise PromptError(f"max_tokens is {max_tokens}; expected 0 or more")
    if n_prompt + max_tokens <= context:
        return
    if n_prompt > context:
        raise ContextOverflowError(
            f"the prompt has {n_prompt} tokens, the context {context}",
            hint="shorten the prompt, or read beyond what the model was trained for (max_context=, --max-context)",
        )
    raise ContextOverflowError(
        f"{n_prompt} prompt tokens + max_tokens {max_tokens} = {n_prompt + max_tokens}, the context has {context}",
        hint=f"ask for at most {context - n_prompt} tokens, shorten the prompt, or extend the context (--max-context)",
    )
