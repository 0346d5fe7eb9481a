"""Prompts as token ids: plain text, infilling (PSM and SPM) and dialogs, each exactly in Meta's format.

The formats are those of infilling_prompt_tokens, chat_completion and dialog_prompt_tokens in Meta's codellama
repository (llama/generation.py). Tags in the caller's text never become control ids (see tokenizer.py). The one
exception is `literal_infill=True`, because many editors send the infill prompt as a string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlx_codellama.errors import NotSupported, PromptError
from mlx_codellama.tokenizer import InfillIds, Tokenizer

DIALOG_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")
"""Not allowed in the messages of a dialog; Meta's code refuses the same five."""


class LiteralInfill(NamedTuple):
    """The parts of an infill prompt that was written as a string."""

    prefix: str
    suffix: str
    order: str  # "psm" | "spm"


def infill_ids(tok: Tokenizer, prefix: str, suffix: str, *, order: str = "psm") -> list[int]:
    """The prompt for an infill. The model continues with the middle and ends it with `tok.infill.eot`.

    psm: [bos, PRE] + prefix + [SUF] + suffix + [MID]         as a string: `<PRE> {prefix} <SUF>{suffix} <MID>`
    spm: [bos, PRE, SUF] + suffix + [MID] + prefix            as a string: `<PRE> <SUF>{suffix} <MID> {prefix}`

    The prefix gets the dummy space that the tokenizer adds before a text, the suffix does not. Either may be empty.
    Raises NotSupported if the model cannot infill, PromptError for another order or text that is not Unicode.
    """
    ids = _infill(tok)
    if order == "psm":
        return [tok.bos_id, ids.pre, *tok.encode(prefix), ids.suf, *tok.encode_infilling(suffix), ids.mid]
    if order == "spm":
        return [tok.bos_id, ids.pre, ids.suf, *tok.encode_infilling(suffix), ids.mid, *tok.encode(prefix)]
    raise PromptError(f"unknown infill order {order!r}", hint="use 'psm' or 'spm'")


def chat_ids(tok: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a dialog, up to the assistant's next answer.

    messages  [{"role": "system" | "user" | "assistant", "content": text}, …]: an optional system message, then user
              and assistant alternate; the last one is from the user. 70B messages may also have a "destination".

    Models whose tokenizer has `<step>` (70B) use the `Source:` format, others the `[INST]` format. Raises PromptError.
    """
    _check_dialog(messages)
    return _source_dialog(tok, messages) if tok.step_id is not None else _inst_dialog(tok, messages)


def prompt_ids(tok: Tokenizer, text: str, *, literal_infill: bool = False) -> list[int]:
    """Ids of a plain prompt: bos and the text.

    literal_infill: a text like `<PRE> … <SUF>… <MID>` is an infill request and gives the ids of infill_ids(); any other
    text stays plain. Raises PromptError, and NotSupported for such a text on a model that cannot infill.
    """
    literal = read_literal_infill(text) if literal_infill else None
    if literal is not None:
        return infill_ids(tok, literal.prefix, literal.suffix, order=literal.order)
    return tok.encode(text, bos=True)


def parse_literal_infill(text: str) -> tuple[str, str] | None:
    """(prefix, suffix) of an infill prompt written as a string, or None. Raises PromptError if it is ambiguous."""
    literal = read_literal_infill(text)
    return literal and (literal.prefix, literal.suffix)


def read_literal_infill(text: str) -> LiteralInfill | None:
    """Read `<PRE> {prefix} <SUF>{suffix} <MID>` or `<PRE> <SUF>{suffix} <MID> {prefix}`; None for any other text.

    One space after <PRE>, before <SUF>, before <MID> and (in the second form) after <MID> belongs to the tag and may be
    missing. A space after <SUF> belongs to the suffix, except in the form of one known client (twinny):
    `<PRE>{prefix} <SUF> {suffix} <MID>`. Raises PromptError if a tag occurs twice or text follows the first form,
    because such a prompt is ambiguous.
    """
    body = text.lstrip()
    if not body.startswith("<PRE>"):
        return None
    prefix, suf, rest = body[len("<PRE>") :].partition("<SUF>")
    suffix, mid, after = rest.partition("<MID>")
    if not (suf and mid):
        return None
    repeated = [tag for tag in ("<PRE>", "<SUF>", "<MID>") if text.count(tag) > 1]
    if repeated:
        raise PromptError(
            f"the infill prompt holds {repeated[0]} more than once, so it is not clear where its parts end",
            hint="send prefix and suffix as separate fields",
        )
    if prefix in ("", " "):
        return LiteralInfill(after.removeprefix(" "), suffix.removesuffix(" "), "spm")
    if after.strip():
        raise PromptError(
            "the infill prompt continues after <MID>, where the model's answer begins",
            hint="end it with <MID>, or send prefix and suffix as separate fields",
        )
    if prefix[0] != " " and prefix[-1] == suffix[:1] == " " and suffix[-1:] == " ":  # twinny
        suffix = suffix[1:]
    return LiteralInfill(prefix.removeprefix(" ").removesuffix(" "), suffix.removesuffix(" "), "psm")


def stop_ids(tok: Tokenizer, kind: str) -> frozenset[int]:
    """Ids that end an answer, as in Meta's code. kind: "complete" (eos), "infill" (EOT), "chat" (`<step>` or eos).

    Raises NotSupported for "infill" on a model that cannot infill, PromptError for another kind.
    """
    if kind == "complete":
        return frozenset({tok.eos_id})
    if kind == "infill":
        return frozenset({_infill(tok).eot})
    if kind == "chat":
        return frozenset({tok.eos_id if tok.step_id is None else tok.step_id})
    raise PromptError(f"unknown kind of prompt {kind!r}", hint="use 'complete', 'infill' or 'chat'")


def _infill(tok: Tokenizer) -> InfillIds:
    if tok.infill is None:
        raise NotSupported(
            "this model cannot infill: its tokenizer has no <PRE>, <SUF>, <MID> and <EOT> pieces",
            hint="use a 7B or 13B model, base or Instruct; the Python and 34B models were not trained for infilling",
        )
    return tok.infill


def _check_dialog(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise PromptError("the dialog is empty", hint='give at least {"role": "user", "content": …}')
    expected = "user"
    for n, message in enumerate(messages):
        role = message.get("role")
        unknown = sorted(set(message) - {"role", "content", "destination"})
        if unknown:
            raise PromptError(f"message {n} has an unknown key {unknown[0]!r}", hint="keys: role, content")
        for key in ("role", "content", *(["destination"] if message.get("destination") is not None else [])):
            value = message.get(key)
            if not isinstance(value, str):
                raise PromptError(f"message {n} has no text as its {key!r}", hint="role and content are strings")
            tag = next((tag for tag in DIALOG_TAGS if tag in value), None)
            if tag is not None:
                raise PromptError(
                    f"message {n} ({role}) holds the special tag {tag}, which is not allowed in a dialog",
                    hint="remove the tag or write it differently; otherwise it could pose as another speaker",
                )
        if role == "system" and n == 0:
            continue
        if role != expected:
            raise PromptError(
                f"message {n} is from {role!r} where {expected!r} was expected",
                hint="roles: an optional 'system', then 'user' and 'assistant' in turn",
            )
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "user":
        raise PromptError(
            f"the last message is from {messages[-1]['role']!r}; it must be from 'user'",
            hint="end the dialog with the question to be answered",
        )


def _inst_dialog(tok: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """7B, 13B, 34B: `<s>[INST] user [/INST] answer </s><s>[INST] user [/INST]`; system goes into the first user."""
    contents = [m["content"] for m in messages]
    if messages[0]["role"] == "system":
        contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
    contents = [c.strip() for c in contents]
    ids: list[int] = []
    for user, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        ids += tok.encode(f"[INST] {user} [/INST] {answer} ", bos=True, eos=True)
    return ids + tok.encode(f"[INST] {contents[-1]} [/INST]", bos=True)


def _source_dialog(tok: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """70B: ` Source: role\\n\\n content` and `<step>` for each message, then the header of the assistant's answer."""
    assert tok.step_id is not None
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    ids = [tok.bos_id]
    for message in messages:
        header = f" Source: {message['role']}"
        if message.get("destination") is not None:
            header += f"\nDestination: {message['destination'].strip()}"
        ids += tok.encode(header)
        if message["content"]:
            ids += tok.encode("\n\n " + message["content"].strip())
        ids.append(tok.step_id)
    return [*ids, *tok.encode(" Source: assistant\nDestination: user"), *tok.encode("\n\n ")]
