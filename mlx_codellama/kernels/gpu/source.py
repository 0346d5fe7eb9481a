"""Kernel files: a header, then one body per kernel, as `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` want them.

A line `// kernel: NAME` begins a body, a line `// header: FILE` in the header brings in another file's header. A line
`// variant: OTHER of NAME with WORD` in the header is a second kernel, OTHER: the body of NAME where WORD is defined.
MLX looks for names such as `q_shape` in a body as plain text, comments included, and adds a buffer for each it
finds. So bodies are handed over without their comments.
"""

from __future__ import annotations

import functools
import hashlib
import re
from importlib import resources
from typing import NamedTuple

from mlx_codellama.kernels.gpu import dialect

SUFFIX = {"metal": "metal", "cuda": "cu"}
_KERNEL = re.compile(r"^// kernel: (\w+)\n", re.MULTILINE)
_HEADER = re.compile(r"^// header: (\w+)\n", re.MULTILINE)
_VARIANT = re.compile(r"^// variant: (\w+) of (\w+) with (\w+)\n", re.MULTILINE)
_COMMENT = re.compile(r"[ \t]*//[^\n]*|/\*.*?\*/", re.DOTALL)


class KernelText(NamedTuple):
    """What MLX is given for one kernel."""

    name: str
    header: str
    body: str

    @property
    def digest(self) -> str:
        """Changes with any change of the text; 16 hexadecimal digits."""
        return hashlib.sha256("\0".join(self).encode()).hexdigest()[:16]


@functools.cache
def file_text(language: str, file: str) -> str:
    """The text of a kernel file: metal/FILE.metal or cuda/FILE.cu as installed, or CUDA made from Metal (`dialect`).

    Raises FileNotFoundError for a file that the language does not have.
    """
    if language == "cuda" and file in dialect.SHARED:
        return dialect.cuda_text(file, file_text("metal", file))
    folder = resources.files("mlx_codellama.kernels").joinpath(language)
    return folder.joinpath(f"{file}.{SUFFIX[language]}").read_text(encoding="utf-8")


def files(language: str) -> list[str]:
    """The files that the language has, by name."""
    folder = resources.files("mlx_codellama.kernels").joinpath(language)
    suffix = f".{SUFFIX[language]}"
    found = {entry.name.removesuffix(suffix) for entry in folder.iterdir() if entry.name.endswith(suffix)}
    return sorted(found | dialect.SHARED if language == "cuda" else found)


def kernel_names(language: str, file: str) -> list[str]:
    """The kernels of a file: those with a body of their own, in its order, then variants."""
    text = file_text(language, file)
    return _KERNEL.findall(text) + [name for name, _, _ in _VARIANT.findall(text)]


@functools.cache
def kernel_text(language: str, file: str, name: str) -> KernelText:
    """Header and body of one kernel. Raises KeyError for a name that the file does not hold."""
    head, *rest = _KERNEL.split(file_text(language, file))
    bodies = dict(zip(rest[::2], rest[1::2], strict=True))
    header = _with_headers(language, head)
    for other, body, word in _VARIANT.findall(head):
        if other == name:
            return KernelText(name, f"#define {word} 1\n{header}", without_comments(bodies[body]))
    return KernelText(name, header, without_comments(bodies[name]))


def _with_headers(language: str, head: str) -> str:
    parts = [_with_headers(language, file_text(language, other)) for other in _HEADER.findall(head)]
    return "\n".join([*parts, without_comments(head)])


def without_comments(text: str) -> str:
    """The text with its lines in their places and nothing in them that is a comment."""
    return _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
