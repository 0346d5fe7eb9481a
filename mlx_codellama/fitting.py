"""A prompt that fits its context: files of a repository, then the part of a text around the cursor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_codellama.hole import Window, fit_window
from mlx_codellama.repository import Packed, pack_before, path_inside, read_folder
from mlx_codellama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fitted:
    """A prompt: `before`, made of the files in `packed`, and the part of the text that `window` shows."""

    window: Window
    before: str = ""
    packed: Packed | None = None

    @property
    def prefix(self) -> str:
        return self.before + self.window.prefix

    @property
    def suffix(self) -> str:
        return self.window.suffix


def fit(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    n_prompt: Callable[[str, str], int],
    *,
    context: int,
    max_tokens: int,
    repository: Path | None = None,
    repository_tokens: int = 0,
    file: Path | None = None,
) -> Fitted:
    """Choose what the model sees of a text and of the repository around it.

    n_prompt           tokens of a prompt made of (prefix, suffix)
    context            tokens of prompt and answer;  max_tokens: of the answer
    repository_tokens  at most this many for other files, and at most half of the prompt if the text needs the rest
    file               of the text, if it has one: what it imports comes first, then what is near
    Raises ContextOverflowError; PromptError if the file is not inside the repository.
    """
    most = context - max_tokens
    reserved = min(repository_tokens, most // 2) if repository else 0
    window = fit_window(tokenizer, prefix, suffix, n_prompt, context=context, max_tokens=max_tokens, reserved=reserved)
    if repository is None:
        return Fitted(window)
    own = None if file is None else path_inside(repository, file)
    before, packed = pack_before(
        read_folder(repository, os.path.dirname(own or "")),
        own,
        prefix + suffix,
        budget=repository_tokens,
        n_tokens=lambda part: len(tokenizer.encode(part)),
        most_prompt=most,
        prompt_tokens=lambda before: n_prompt(before + window.prefix, window.suffix),
    )
    return Fitted(window, before, packed)
