"""`mlx-codellama chat`: an interactive session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import cache_options
from mlx_codellama.cli.call import STDIN, Call, note_window, read_input, stats_option
from mlx_codellama.cli.line_reader import is_command, line_reader, read_message
from mlx_codellama.config import MAX_TOKENS
from mlx_codellama.errors import CodeLlamaError, PromptError
from mlx_codellama.source_file import read_text

if TYPE_CHECKING:
    from mlx_codellama.api import Completion
    from mlx_codellama.conversation import Conversation

HELP = """\
/help              show this list
/file FILE         put a file before your next message
/retry             answer the last question again
/reset             forget the conversation (the system message stays)
/system [TEXT]     set the system message, or show it
/set [NAME VALUE]  change how it answers, such as /set temperature 0.8, or show it
/save FILE         write the conversation to a new file (JSON if it ends in .json, else Markdown)
/load FILE         continue a conversation that was saved as JSON
/quit              leave; Ctrl-D does the same
A pasted block is one message. Alt-Enter, or \\ at the end of a line, starts a new line; \"\"\" begins and ends a block.
Ctrl-C stops the answer, or drops the line being typed."""


@click.command(name="chat")
@options.model_options
@cache_options
@click.option("--system", type=options.Text(), default="", metavar="TEXT", help="Tell the model how to answer.")
@click.option("--plain", is_flag=True, help="Use no dialog format: continue the text so far. For base models.")
@click.option(
    "--history",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the lines you type in this file; /dev/null keeps none.  [default: a file in your state folder]",
)
@options.sampling_options("chat")
@stats_option
@options.json_option
def command(system: str, plain: bool, history: Path | None, as_json: bool, **chosen: Any) -> None:
    """Talk to an Instruct model.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. If stdin is not a terminal, all of it is one
    question, and the answer goes to stdout. The bundled demo is a base model: without --model the session continues
    plain text.
    """
    interactive = sys.stdin.isatty()
    if interactive and as_json:
        raise click.UsageError("--json needs the question on stdin")
    if chosen["model"] is None and not plain:
        output.note("the demo model knows no dialogs: it continues the text so far (--model names an Instruct model)")
        plain = True
    question = "" if interactive else read_input(STDIN)
    if not interactive and not question.strip():
        raise click.UsageError("stdin is empty: pipe a question in, or run it in a terminal")
    from mlx_codellama.conversation import Conversation

    session = Session(Call.of(chosen), Conversation(plain, system))
    if interactive:
        session.run(line_reader(history))
        return
    session.conversation.ask(question)
    result = session.answer(show=not as_json)
    if as_json:
        from mlx_codellama.cli.generation import completion_document

        output.document(completion_document(result))


class Session:
    """A model, the conversation with it, and how it answers."""

    def __init__(self, call: Call, conversation: Conversation) -> None:
        self.call, self.conversation = call, conversation
        self.sampling = call.sampling

    def run(self, read_line: Callable[[str], str]) -> None:
        """Answer messages until /quit or the end of input."""
        output.report("/help for help, Ctrl-D to leave")
        while True:
            try:
                message = read_message(read_line)
            except EOFError:
                output.report()
                return
            except KeyboardInterrupt:
                output.report("\n(Ctrl-D or /quit leaves)")
                continue
            try:
                if is_command(message):
                    if not self.command(message):
                        return
                elif message.strip():
                    self.ask(message)
            except CodeLlamaError as error:
                output.failure(str(error), error.hint)

    def ask(self, message: str) -> None:
        """Answer a message; one that cannot be answered is not kept."""
        with self.conversation.unchanged_on_error():
            self.conversation.ask(message)
            self.answer(show=True)

    def command(self, line: str) -> bool:
        """Carry out a slash command; False means quit. Raises PromptError for an unknown one."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit", "/q"):
            return False
        commands = {
            "/help": lambda _: output.report(HELP),
            "/?": lambda _: output.report(HELP),
            "/file": self._file,
            "/retry": self._retry,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
        }
        if name not in commands:
            raise PromptError(f"unknown command {name}", hint="see /help; begin with a space to send such a line")
        commands[name](rest.strip())
        return True

    def _file(self, rest: str) -> None:
        path = _path("/file", rest, "stack.py")
        self.conversation.attached.append((path.name, read_text(path)))
        output.report(f"{path} goes before your next message")

    def _retry(self, _: str) -> None:
        with self.conversation.unchanged_on_error():
            self.conversation.take_back()
            if not self.sampling["temperature"]:
                output.note("the temperature is 0: the answer will be the same; /set temperature 0.8 draws others")
            self.answer(show=True)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        output.report("forgotten")

    def _system(self, rest: str) -> None:
        if not rest:
            output.report(self.conversation.system or "no system message")
            return
        self.conversation.system = rest
        self.conversation.reset()
        output.report("system message set; the conversation starts again")

    def _set(self, rest: str) -> None:
        """Set a sampling option as on the command line; "none" if it has no default."""
        known = {p.name: p for p in command.params if p.name in self.sampling and p.name not in ("stop", "lookup")}
        if not rest:
            output.report(output.pairs([(str(name), self.sampling[name]) for name in known]))
            return
        name, _, value = rest.partition(" ")
        if name not in known:
            raise PromptError(f"no setting {name}", hint=f"choose one of {', '.join(map(str, known))}")
        option = known[name]
        try:
            unset = value == "none" and option.default is None
            self.sampling[name] = None if unset else option.type.convert(value.strip(), None, None)
        except click.UsageError as error:
            raise PromptError(f"{name}: {error.message.rstrip('.')}", hint="try /set temperature 0.8") from None

    def _save(self, rest: str) -> None:
        path = _path("/save", rest, "talk.md")
        self.conversation.save(path)
        output.report(f"saved to {path}")

    def _load(self, rest: str) -> None:
        path = _path("/load", rest, "talk.json")
        self.conversation.load(path)
        output.report(f"{path}: {output.counted(len(self.conversation.turns), 'turn')}")

    def answer(self, *, show: bool) -> Completion:
        """Answer the last question and keep the answer. Ctrl-C ends it early; what was said by then counts."""
        from mlx_codellama.cli import generation

        most = self._make_room()
        how = {**self.sampling, "max_tokens": most, "on_prefill": generation.prefill_meter()}
        text, talk, model = "", self.conversation, self.call.model
        with generation.stop_on_interrupt() as stopped:
            if talk.plain:
                stream = model.stream_complete(talk.text(), infill_tags=not show, cancel=stopped, **how)
            else:
                stream = model.stream_chat(talk.messages(), cancel=stopped, **how)
            for piece in stream:
                text += piece
                if show:
                    output.data(piece, newline=False)
        result = stream.result
        talk.answered(text)
        output.end_line()
        if result.finish_reason == "cancelled":
            output.report("(stopped)")
        if result.finish_reason == "length" and most < self._most:
            output.note(f"stopped: the context of {model.max_context:,} tokens is full")
        else:
            generation.note_if_cut(result, most)
        self.call.end(result)
        return result

    @property
    def _most(self) -> int:
        """Tokens of an answer at most, if the context has room for them."""
        return int(self.sampling["max_tokens"] or MAX_TOKENS["chat"])

    def _make_room(self) -> int:
        """Make the conversation fit; notes tell what was forgotten. → tokens that the answer may have."""
        model = self.call.model
        room = self.conversation.fit(model.tokenizer, model.max_context, self._most)
        note_window("the text", room.window)
        if room.n_forgotten:
            n = output.counted(room.n_forgotten, "question")
            output.note(f"the context is full: the oldest {n} and the answers to them are forgotten")
        return room.max_tokens


def _path(command: str, rest: str, example: str) -> Path:
    if not rest:
        raise PromptError(f"{command} needs a file name", hint=f"for example: {command} {example}")
    return Path(rest).expanduser()
