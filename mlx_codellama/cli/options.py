"""Options that several verbs share, and how they become arguments of the Python API."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_codellama import config, storage
from mlx_codellama.errors import CodeLlamaError
from mlx_codellama.memory import parse_bytes
from mlx_codellama.rotary import RopeScaling

F = TypeVar("F", bound=Callable[..., Any])

ExistingPath = partial(click.Path, exists=True, path_type=Path)

DTYPES = config.DTYPES
BITS = tuple(str(n) for n in config.BITS)
GROUP_SIZES = tuple(str(n) for n in config.GROUP_SIZES)
KV_BITS = tuple(str(n) for n in reversed(storage.WIDTHS))


class Text(click.types.StringParamType):
    """Text typed on the command line. The system hands over what is not UTF-8 as lone surrogates: wrong use."""

    def __init__(self, *, may_be_empty: bool = True) -> None:
        self._may_be_empty = may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value and not self._may_be_empty:
            self.fail("the text is empty", param, ctx)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            self.fail("the text is not UTF-8", param, ctx)
        return str(value)


class ModelName(click.types.StringParamType):
    """A folder, a hub id or the name of a release."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.strip():
            self.fail("the name is empty", param, ctx)
        return str(value)


class Tokens(click.IntRange):
    """A number of tokens, at most config.MOST_TOKENS."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(super().convert(value, param, ctx))
        if number > config.MOST_TOKENS:
            self.fail(f"{str(value)[:20]}… is more tokens than any machine holds", param, ctx)
        return number


class Number(click.FloatRange):
    """A finite number in a range. click alone lets nan and inf pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Checked(click.types.StringParamType):
    """Text that a function of the package understands; what it refuses is a usage error."""

    def __init__(self, check: Callable[[str], object]) -> None:
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            self._check(value)
        except CodeLlamaError as error:
            self.fail(f"{error}; {error.hint}" if error.hint else str(error), param, ctx)
        return str(value)


def stack(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator that gives a command these options, in the help's order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document as the last line of stdout."
)

exact_option = click.option(
    "--exact", is_flag=True, help="Keep activations in float32 on a CPU; otherwise they are rounded to 15 bits."
)

kv_options = stack(
    click.option(
        "--kv-bits", type=click.Choice(KV_BITS),
        help="Store keys and values in this many bits.  [default: the compute type's]"
    ),
    click.option("--kv-bits-k", type=click.Choice(KV_BITS), help="Bits of keys, if they differ from --kv-bits."),
    click.option("--kv-bits-v", type=click.Choice(KV_BITS), help="Bits of values, if they differ from --kv-bits."),
    click.option(
        "--window", type=click.IntRange(min=1), metavar="TOKENS",
        help="Keep only the first few and the last TOKENS tokens, and forget those between.",
    ),
    click.option(
        "--sinks", type=click.IntRange(min=0), default=storage.SINKS, show_default=True,
        help="Keep this many first tokens with --window.",
    ),
)  # fmt: skip

max_context_option = click.option(
    "--max-context", "--context", "max_context", type=Tokens(min=1),
    help="Allow this many tokens of prompt and answer.  [default: what the model was trained to read]",
)  # fmt: skip


SCALING, MEMORY = Checked(RopeScaling.parse), Checked(parse_bytes)

rope_scaling_option = click.option(
    "--rope-scaling", type=SCALING, metavar="KIND:FACTOR",
    help="Stretch positions for a longer context: linear, ntk, dynamic or yarn, such as yarn:4.",
)  # fmt: skip

model_options = stack(
    click.option(
        "--model", "-m", type=ModelName(), metavar="MODEL",
        help="Load this checkpoint, a folder or a hub id.  [default: the bundled demo]"
    ),
    click.option("--dtype", type=click.Choice(DTYPES), help="Compute in this type instead of the checkpoint's."),
    exact_option,
    max_context_option,
    rope_scaling_option,
    kv_options,
)  # fmt: skip


def sampling_options(kind: str) -> Callable[[F], F]:
    """How to choose tokens, and how many: `complete`, `infill` or `chat`. Greedy unless a temperature is given."""
    most = config.MAX_TOKENS[kind]
    return stack(
        click.option(
            "--max-tokens", "-n", type=click.IntRange(min=1), default=None if kind == "chat" else most,
            show_default=f"{most}, or what is left of the context" if kind == "chat" else True,
            help="Stop after this many new tokens.",
        ),
        click.option(
            "--temperature", "-t", type=Number(min=0), default=0.0, show_default=True,
            help="Raise it for more variety; 0 always takes the likeliest token.",
        ),
        click.option(
            "--top-p", type=Number(0, 1), default=1.0, show_default=True,
            help="Sample from the likeliest tokens that hold this share of the probability; 0: the likeliest alone.",
        ),
        click.option(
            "--top-k", type=click.IntRange(min=0), default=0, show_default=True,
            help="Sample from this many of the likeliest tokens; 0: from all.",
        ),
        click.option(
            "--min-p", type=Number(0, 1), default=0.0, show_default=True,
            help="Leave out tokens below this share of the likeliest one's probability.",
        ),
        click.option(
            "--repetition-penalty", type=Number(min=0, min_open=True), default=1.0, show_default=True,
            help="Make recent tokens less likely, if above 1.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**64 - 1),
            help="Make sampling repeatable; without it a seed is drawn, and --stats and --json show it.",
        ),
        click.option(
            "--lookup/--no-lookup", default=None,
            help="Check several tokens at once if the context suggests them and that is faster. With quantised weights "
            "on the native CPU kernels the answer stays the same, bit for bit; elsewhere a close choice may change.  "
            "[default: on in float32; with 4-bit keys or values only on the native CPU kernels]",
        ),
        click.option(
            "--stop", type=Text(may_be_empty=False), multiple=True, metavar="TEXT",
            help="Stop before this text; may be given several times. \\n is a newline, \\t a tab, \\\\ a backslash.",
        ),
    )  # fmt: skip


def kv_storage(options: dict[str, Any]) -> storage.KVStorage:
    """How keys and values are kept, taken out of a command's options (they are removed from `options`)."""
    both, keys, values = (options.pop(name) for name in ("kv_bits", "kv_bits_k", "kv_bits_v"))
    keys, values = keys or both, values or both
    if (keys is None) != (values is None):
        raise click.UsageError("give --kv-bits-k and --kv-bits-v, or one of them with --kv-bits")
    bits = None if keys is None or values is None else (int(keys), int(values))
    return storage.KVStorage.of(bits, window=options.pop("window"), sinks=options.pop("sinks"))


def stretched(args: config.ModelArgs, scaling: str | None) -> config.ModelArgs:
    """args under --rope-scaling. Raises ConfigError."""
    return args if scaling is None else args.with_scaling(RopeScaling.parse(scaling))


SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "lookup", "stop")


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling keywords of the API, taken out of a command's options (they are removed from `options`)."""
    chosen = {name: options.pop(name) for name in SAMPLING}
    chosen["stop"] = [unescape(text) for text in chosen["stop"]]
    return chosen


def unescape(text: str) -> str:
    """`\\n`, `\\t` and `\\\\` typed on a command line mean newline, tab and backslash."""
    named = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: named[match[1]], text)
