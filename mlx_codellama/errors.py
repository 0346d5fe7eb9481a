"""The exceptions of the package. Each carries one clear sentence and a hint that says what to do next."""

from __future__ import annotations


class CodeLlamaError(Exception):
    """Root of everything the package raises on purpose. `str(e)` is the sentence; `e.hint` may be empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CodeLlamaError):
    """A model's configuration is missing, unknown, contradictory or out of range."""


class CheckpointError(CodeLlamaError):
    """A weights file or folder is damaged, incomplete, or not what its config says."""


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


class BackendError(CodeLlamaError):
    """MLX or a required kernel path is not available on this machine."""


class MemoryBudgetError(CodeLlamaError):
    """The plan does not fit the memory budget; nothing was allocated."""
