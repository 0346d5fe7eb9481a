"""What a call returns."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_codellama.engine import FinishReason


@dataclass(frozen=True)
class Stats:
    """What one call did and how long it took.

    cached_tokens     prompt tokens taken over from an earlier call
    prompt_tokens     all tokens of the prompt, cached ones included
    generated_tokens  tokens the model produced, a stop id or the tokens of a stop string included
    ttft_s            from the tokenised prompt to the first token (or the end of the prompt, if there is none)
    prompt_tok_s      prompt tokens that were not cached, per second of ttft_s
    decode_tok_s      tokens after the first, per second since the first; 0 where there is only one
    peak_bytes        most memory MLX held at once during the call, weights included; one counter per process
    drafted_tokens    tokens that lookup proposed and the model checked
    accepted_tokens   those of them that the model would have written by itself, and so did
    dropped_tokens    tokens between the sinks and the window that the end of the text no longer saw; 0 without a window
    seed              what the tokens were drawn with, so that the call can be repeated; None if nothing was drawn
    """

    cached_tokens: int
    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    prompt_tok_s: float
    decode_tok_s: float
    peak_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    dropped_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token under the model itself, before penalty and temperature. Logarithms are natural.

    top  (id, logprob) of the most likely tokens, most likely first; as many as were asked for
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """Generated text and how it came about.

    text           continues the prompt; for an infill it goes between prefix and suffix, leading spaces kept
    ids            the tokens of the text. A stop id is not among them. After a stop string: the tokens whose text
                   begins before it, so the last one may reach into it, and decoding them gives text or a bit more
    finish_reason  "stop" for a stop id or stop string, "length" for max_tokens, "cancelled"
    logprobs       one entry for each of ids, where logprobs= was given
    stop           the stop string that ended the text, if one did
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    stop: str | None = None
