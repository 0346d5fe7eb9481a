"""Continue a text: seed, stop string, log-probabilities, stats: `python examples/complete.py [MODEL]`."""

from __future__ import annotations

import sys

from mlx_codellama import load

PROMPT = "import os\n\ndef list_files(path):\n"


def main(path: str | None = None) -> None:
    model = load(path)
    result = model.complete(PROMPT, max_tokens=32, temperature=0.2, top_p=0.9, seed=1, stop=["\ndef ", "\nclass "])
    print(PROMPT + result.text)
    print(f"ended by {result.stop or result.finish_reason!r}")

    # The second call shares its beginning with the first, so only the new tokens are read.
    longer = model.complete(PROMPT + "    names = ", max_tokens=4, logprobs=2)
    for token in longer.logprobs or []:
        print(f"{model.tokenizer.piece(token.id)!r:12} {token.logprob:6.2f}", [id for id, _ in token.top])
    stats = longer.stats
    print(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens reused, {stats.decode_tok_s:.0f} tok/s")


if __name__ == "__main__":
    main(*sys.argv[1:2])
