"""`mlx-codellama chat`: an interactive session."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.cache_file import KeptCache, cache_options
from mlx_codellama.cli.conversation import Conversation
from mlx_codellama.cli.cursor import STDIN, read_text
from mlx_codellama.cli.line_reader import is_command, line_reader, read_message
from mlx_codellama.config import MAX_TOKENS
from mlx_codellama.errors import CodeLlamaError, ConfigError, ContextOverflowError, PromptError

if TYPE_CHECKING:
    from mlx_codellama.api import CodeLlama, Completion

HELP = """\
/help              this list
/file FILE         put a file before your next message
/retry             answer the last question again
/reset             forget the conversation (the system message stays)
/system [TEXT]     set the system message, or show it
/set [NAME VALUE]  change how it answers, such as /set temperature 0.8, or show it
/save FILE         write the conversation to a new file (JSON if it ends in .json, else Markdown)
/load FILE         go on from a conversation that was saved as JSON
/quit              leave; Ctrl-D does the same
A pasted block is one message. Alt-Enter, or \\ at its end, goes on in a new line; \"\"\" begins and ends a block.
Ctrl-C stops the answer, or drops the line being typed."""


@click.command(name="chat")
@options.model_options
@cache_options
@click.option(
    "--system", type=options.Text(), default="", metavar="TEXT", help="System message: how the model should answer."
)
@click.option("--plain", is_flag=True, help="No dialog format: the model continues the text so far. For base models.")
@click.option(
    "--history",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the lines you type in this file; /dev/null: nowhere.  [default: in your state folder]",
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
    session = Session(model, Conversation(plain, system), options.sampling(chosen), stats, kept)
    if interactive:
        session.run(line_reader(history))
        return
    session.conversation.ask(question)
    result = session.answer(show=not as_json)
    if as_json:
        output.document(generation.completion_document(result))


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
            if not message.strip():
                continue
            try:
                if is_command(message):
                    if not self.command(message):
                        return
                else:
                    self.ask(message)
            except CodeLlamaError as error:
                output.failure(str(error), error.hint)

    def ask(self, message: str) -> None:
        """Answer a message; one that cannot be answered is not kept."""
        before = list(self.conversation.turns)
        self.conversation.ask(message)
        try:
            self.answer(show=True)
        except CodeLlamaError:
            self.conversation.turns[:] = before
            raise

    def command(self, line: str) -> bool:
        """Carry out a slash command; False means quit. Raises PromptError for an unknown one."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit", "/q"):
            return False
        commands = {
            "/help": self._help,
            "/?": self._help,
            "/file": self._file,
            "/retry": self._retry,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
        }
        if name not in commands:
            raise PromptError(
                f"unknown command {name}", hint="/help lists them; begin with a space to send such a line"
            )
        commands[name](rest.strip())
        return True

    def _help(self, _: str) -> None:
        output.report(HELP)

    def _file(self, rest: str) -> None:
        path = _path("/file", rest, "stack.py")
        try:
            self.conversation.attached.append((path.name, read_text(path)))
        except IsADirectoryError:
            raise PromptError(f"{path} is a folder") from None
        output.report(f"{path} goes before your next message")

    def _retry(self, _: str) -> None:
        before = list(self.conversation.turns)
        if not self.conversation.take_back():
            raise PromptError("there is no answer yet")
        if not self.sampling["temperature"]:
            output.note("the temperature is 0: the answer will be the same; /set temperature 0.8 draws others")
        try:
            self.answer(show=True)
        except CodeLlamaError:
            self.conversation.turns[:] = before
            raise

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        output.report("forgotten")

    def _system(self, rest: str) -> None:
        if not rest:
            output.report(self.conversation.system or "no system message")
            return
        self.conversation.system = rest
        self.conversation.reset()
        output.report("system message set; the conversation starts anew")

    def _set(self, rest: str) -> None:
        from mlx_codellama.sampling import SamplingParams

        name, _, value = rest.partition(" ")
        defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams) if f.name in self.sampling}
        if not rest:
            shown = {"max_tokens": self.sampling["max_tokens"], **{n: self.sampling[n] for n in defaults}}
            output.report(output.pairs(list(shown.items())))
            return
        if name != "max_tokens" and name not in defaults:
            raise PromptError(f"no setting {name}", hint=f"known: max_tokens, {', '.join(defaults)}")
        number: Any = _number(value)
        if name == "max_tokens":
            if not isinstance(number, int) or number < 1:
                raise PromptError(f"max_tokens is {value}; expected a whole number from 1")
        else:
            if isinstance(defaults[name], float) and number is not None:
                number = float(number)
            SamplingParams(**{name: number})  # raises ConfigError
        self.sampling[name] = number

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
        text = ""
        with generation.stop_on_interrupt() as stopped:
            if self.conversation.plain:
                stream = self.model.stream_complete(
                    self.conversation.text(), infill_tags=not show, cancel=stopped, **how
                )
            else:
                stream = self.model.stream_chat(self.conversation.messages(), cancel=stopped, **how)
            for piece in stream:
                text += piece
                if show:
                    output.data(piece, newline=False)
        result = stream.result
        self.conversation.answered(text)
        output.end_line()
        if result.finish_reason == "cancelled":
            output.report("(stopped)")
        if result.finish_reason == "length" and most < self._most():
            output.note(f"stopped: the context of {self.model.max_context:,} tokens is full")
        else:
            generation.note_if_cut(result, most)
        if self.kept is not None:
            self.kept.keep(self.model, result)
        if self.stats:
            output.report(generation.summary(result))
        return result

    def _most(self) -> int:
        """Tokens of an answer at most, if the context has room for them."""
        return int(self.sampling["max_tokens"] or MAX_TOKENS["chat"])

    def _make_room(self) -> int:
        """Forget the oldest turns, with a note, until the answer has its tokens or a quarter of the context.

        → tokens that the answer may have. Raises ContextOverflowError, and forgets nothing, if the last question alone
        leaves none.
        """
        from mlx_codellama.cli import generation

        talk, context = self.conversation, self.model.max_context
        room, turns, forgotten = min(self._most(), max(1, context // 4)), list(talk.turns), 0
        if talk.plain and self._n_prompt() + room > context:
            said = talk.text().removeprefix(talk.system)
            seen = generation.seen(
                self.model, "the text", said, "", lambda text, _: self._n_prompt(talk.system + text), room, 0
            )
            talk.turns[:] = [{"role": "user", "content": seen.prefix}]
        while (n := self._n_prompt()) + room > context and talk.forget_oldest():
            forgotten += 1
        if n >= context:
            talk.turns[:] = turns
            raise ContextOverflowError(
                f"the question has {n:,} tokens, the context {context:,}",
                hint="ask a shorter one, or see --max-context",
            )
        if forgotten:
            output.note(
                f"the context is full; forgotten, oldest first: {forgotten} of the questions with their answers"
            )
        return min(self._most(), context - n)

    def _n_prompt(self, text: str | None = None) -> int:
        """Tokens of the prompt; of one that is far too long a lower bound, for that it is not encoded."""
        from mlx_codellama.prompts import chat_ids

        tokenizer, messages = self.model.tokenizer, self.conversation.messages()
        if self.conversation.plain:
            text = self.conversation.text() if text is None else text
            least = tokenizer.least_tokens(text)
            return least if least > self.model.max_context else 1 + len(tokenizer.encode(text))
        least = sum(tokenizer.least_tokens(message["content"]) for message in messages)
        return least if least > self.model.max_context else len(chat_ids(tokenizer, messages))


def _path(command: str, rest: str, example: str) -> Path:
    if not rest:
        raise PromptError(f"{command} needs a file name", hint=f"for example: {command} {example}")
    return Path(rest).expanduser()


def _number(text: str) -> int | float | None:
    """Raises ConfigError; "none" is None."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{text!r} is not a number", hint="for example: /set temperature 0.8")
