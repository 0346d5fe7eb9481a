"""`mlx-codellama chat`: an interactive session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.conversation import Conversation, fitting, read_message
from mlx_codellama.cli.cursor import STDIN, read_text
from mlx_codellama.config import MAX_TOKENS
from mlx_codellama.errors import CodeLlamaError, ContextOverflowError

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion


@click.command(name="chat")
@options.model_options
@cache_options
@click.option(
    "--system", type=options.Text(), default="", metavar="TEXT", help="System message: how the model should answer."
)
@click.option("--plain", is_flag=True, help="No dialog format: the model continues the text so far. For base models.")
@click.option(
    "--history", type=click.Path(path_type=Path), metavar="FILE", help="Keep the lines you type in this file."
)
@options.sampling_options("chat")
@click.option("--stats", is_flag=True, help="Say after each answer how long it took.")
@options.json_option
def command(system: str, plain: bool, history: Path | None, stats: bool, as_json: bool, **chosen: Any) -> None:
    """Talk to an Instruct model.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal it is taken whole, as
    one question, and the answer goes to stdout. The bundled demo is a base model: without --model the session
    continues plain text.
    """
    interactive = sys.stdin.isatty()
    if interactive and as_json:
        raise click.UsageError("--json needs the question on stdin")
    from mlx_codellama.cli import generation

    if chosen["model"] is None and not plain:
        output.note("the demo model knows no dialogs: it continues the text so far (--model names an Instruct model)")
        plain = True
    question = "" if interactive else read_text(STDIN)
    if not interactive and not question.strip():
        raise click.UsageError("stdin is empty: pipe a question in, or run it in a terminal")
    kept = KeptCache(chosen)
    model = generation.open_model(chosen)
    kept.open(model)
    sampling = options.sampling(chosen)
    sampling["max_tokens"] = sampling["max_tokens"] or min(MAX_TOKENS["chat"], max(1, model.max_context // 2))
    session = Session(model, Conversation(plain, system), sampling, stats, kept)
    if not interactive:
        session.conversation.ask(question)
        result = session.answer(show=not as_json)
        if as_json:
            output.document(generation.completion_document(result))
        return
    session.run(_line_reader(history))


class Session:
    """A model, the conversation with it, and how it answers."""

    def __init__(
        self,
        model: CodeLlama,
        conversation: Conversation,
        sampling: dict[str, Any],
        stats: bool,
        kept: KeptCache | None = None,
    ) -> None:
        self.model, self.conversation, self.sampling, self.stats = model, conversation, sampling, stats
        self.kept = kept

    def run(self, read_line: Callable[[str], str]) -> None:
        """Until /quit or the end of input."""
        output.say("/help for help, Ctrl-D to leave")
        while True:
            try:
                message = read_message(read_line)
            except EOFError:
                output.report()
                return
            except KeyboardInterrupt:
                output.report("\n(Ctrl-D or /quit leaves)")
                continue
            if not message.strip():
                continue
            try:
                if message.startswith("/"):
                    if not self.conversation.command(message, output.report):
                        return
                    continue
                self.conversation.ask(message)
                self.answer(show=True)
            except CodeLlamaError as error:
                full = isinstance(error, ContextOverflowError)
                output.failure(str(error), "/reset forgets the conversation so far" if full else error.hint)
                if self.conversation.turns and self.conversation.turns[-1]["role"] == "user":
                    self.conversation.turns.pop()

    def answer(self, *, show: bool) -> Completion:
        """Answer the last question and keep the answer. Ctrl-C ends it early; what was said by then counts."""
        from mlx_codellama.cli import generation

        with generation.stop_on_interrupt() as stopped:
            stream = None
            text = ""

            def start() -> Iterator[str]:
                nonlocal stream
                how = {"cancel": stopped, "on_prefill": generation.prefill_meter(), **self.sampling}
                if self.conversation.plain:
                    stream = self.model.stream_complete(self.conversation.text(), infill_tags=not show, **how)
                else:
                    stream = self.model.stream_chat(self.conversation.messages(), **how)
                return stream

            for piece in fitting(self.conversation, start, output.note):
                text += piece
                if show:
                    output.data(piece, newline=False)
        assert stream is not None
        result: Completion = stream.result
        self.conversation.answered(text)
        output.end_line()
        if result.finish_reason == "cancelled":
            output.report("(stopped)")
        generation.note_if_cut(result, self.sampling["max_tokens"])
        if self.kept is not None:
            self.kept.keep(self.model, result)
        if self.stats:
            output.report(generation.summary(result))
        return result


def _line_reader(history: Path | None) -> Callable[[str], str]:
    """A line with editing and history (readline) where stdout is a terminal too; else the prompt goes to stderr."""
    if not sys.stdout.isatty():

        def plain(prompt: str) -> str:
            output.report(prompt, newline=False)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")

        return plain
    with suppress(ImportError):
        import atexit
        import readline

        if history is not None:
            with suppress(OSError):
                readline.read_history_file(str(history))
            readline.set_history_length(1000)
            atexit.register(_write_history, history)
    return input


def _write_history(path: Path) -> None:
    import readline

    with suppress(OSError):
        readline.write_history_file(str(path))
