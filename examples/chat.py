"""A dialog with history, streamed, and ended after a second: `python examples/chat.py [MODEL]`.

The bundled demo model was trained on source files only, so its answers are code-shaped at best; take an Instruct model.
"""

from __future__ import annotations

import sys
import time

from mlx_codellama import load


def main(path: str | None = None) -> None:
    model = load(path)
    messages = [{"role": "system", "content": "Answer with code only."}]
    for question in ("How do I open a file?", "And close it?"):
        messages.append({"role": "user", "content": question})
        deadline = time.monotonic() + 1
        print(f"\n> {question}")
        with model.stream_chat(messages, max_tokens=48, cancel=lambda end=deadline: time.monotonic() > end) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        answer = stream.result
        print(f"\n({answer.finish_reason}, {answer.stats.generated_tokens} tokens)")
        # An answer may be empty (cancelled at once), an empty turn may not.
        messages.append({"role": "assistant", "content": answer.text.strip() or "…"})


if __name__ == "__main__":
    main(*sys.argv[1:2])
