"""The exceptions of the package. Each carries one clear sentence and a hint that says what to do next."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


def printable(text: str, *, keep: str = "") -> str:
    """text with everything that a terminal could obey, or that could pose as another line, written as an escape.

    File names, keys of a config and names of tensors come from outside. Control codes (C0, DEL, C1), line and paragraph
    separators, marks that reverse the direction of writing, and lone surrogates are escaped, unless they are in keep.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _commands(letter) else _escaped(letter) for letter in text)


def _commands(letter: str) -> bool:
    code = ord(letter)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0x200E <= code <= 0x200F  # left-to-right and right-to-left marks
        or 0x2028 <= code <= 0x202E  # separators; embeddings and overrides
        or 0x2066 <= code <= 0x2069  # isolates
        or 0xD800 <= code <= 0xDFFF
    )


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


class CodeLlamaError(Exception):
    """Root of everything the package raises on purpose. `str(e)` is the sentence; `e.hint` may be empty.

    Both are one line and safe to print: what they quote from outside is escaped (`printable`).
    """

    usual_hint = ""  # where an error of the class is raised without one

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(printable(message))
        self.hint = printable(hint or self.usual_hint)


class ConfigError(CodeLlamaError):
    """A model's configuration is missing, unknown, contradictory or out of range."""


class MissingThetaError(ConfigError):
    """The files do not say how fast rotary positions turn, and nobody else did."""


class CheckpointError(CodeLlamaError):
    """A weights file or folder is damaged, incomplete, or not what its config says."""

    usual_hint = "the files are damaged or do not belong together; fetch them again"


class UnsafePickleError(CheckpointError):
    """A pickle asks for something other than tensors. Nothing of it was executed."""


class NonFiniteError(CheckpointError):
    """Weights hold NaN or infinity."""


class TokenizerError(CodeLlamaError):
    """The tokenizer file is missing, damaged or does not match the model."""


class PromptError(CodeLlamaError):
    """The caller's text or messages cannot be made into a prompt."""


class ContextOverflowError(PromptError):
    """The prompt and the requested tokens do not fit the model's context."""


class NotSupported(CodeLlamaError):
    """The model at hand cannot do this, for example infill on a Python variant."""


class OutputExistsError(CodeLlamaError):
    """The output path exists; nothing was written."""


class OutputError(CodeLlamaError):
    """The output could not be written (disk full, no permission); the old state is kept."""


class DownloadError(CodeLlamaError):
    """A model could not be fetched from the hub."""


class CacheError(CodeLlamaError):
    """A saved key-value cache is damaged, or was made with another model or other settings."""

    usual_hint = "delete the file and let the prompt be read again"


class MemoryBudgetError(CodeLlamaError):
    """More memory is needed than there is, or than MLX_CODELLAMA_MEMORY allows. Nothing was allocated."""


class BackendError(CodeLlamaError):
    """MLX or a required kernel path is not available on this machine."""


def shown(value: object) -> str:
    """A value that came from outside as a message quotes it: on one line, escaped, and short."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:79]}…"


def refused_by_system(error: BaseException) -> CodeLlamaError | None:
    """What to tell someone whose system gave less memory or fewer threads than the work needs; None for other errors.

    MLX passes on from its own threads only the text of an error, as a RuntimeError.
    Use: `except (MemoryError, RuntimeError) as error: raise refused_by_system(error) or error from error`.
    """
    if not isinstance(error, (MemoryError, RuntimeError)):
        return None
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "bad_alloc" in text or "allocate" in text:
        return MemoryBudgetError(
            "out of memory: the system gave less than the work needs",
            hint="`mlx-codellama plan` says what fits; `ulimit -v` or a control group may allow less than that",
        )
    if text == "resource temporarily unavailable" or "can't start new thread" in text:
        return BackendError(
            "the system gives this process no more threads",
            hint="raise its limits (ulimit -u, ulimit -v, pids.max of its control group)",
        )
    return None


def missing_mlx(error: ImportError) -> BackendError | None:
    """What to tell someone whose MLX cannot be imported; None where the ImportError is about something else.

    Use: `except ImportError as error: raise missing_mlx(error) or error from error`.
    On Linux the package asks for one of two extras, which exclude each other: each brings its own `libmlx.so`.
    """
    name = error.name or ""
    if name != "mlx" and not name.startswith("mlx."):
        return None
    absent = isinstance(error, ModuleNotFoundError) and name == "mlx"
    message = "MLX is not installed" if absent else f"MLX is installed but does not load: {error}"
    if sys.platform == "darwin":
        hint = "MLX needs an Apple silicon Mac and a native (arm64) Python: pip install 'mlx>=0.32.4,<0.33'"
    elif sys.platform == "linux":
        hint = (
            "take one of two: pip install 'mlx-codellama[cpu]' (any x86-64 or arm64 machine) or "
            "pip install 'mlx-codellama[cuda]' (an NVIDIA GPU); they exclude each other"
        )
    else:
        hint = "MLX runs on macOS (Apple silicon) and on Linux"
    return BackendError(message, hint=hint)


def counted(n: int, word: str) -> str:
    """1 token, 1,200 tokens."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def bytes_text(n: float) -> str:
    """A size for people, in powers of 1000: 13.5 GB, 820 MB, 12 kB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            shown = n / scale
            digits = 0 if shown >= 100 else 1 if shown >= 10 else 2
            return f"{shown:.{digits}f} {unit}"
    return f"{n:.0f} B"


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Inside, memory and threads that the system refuses are errors of ours (`refused_by_system`)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = refused_by_system(error)
        if told is None:
            raise
        raise told from error
