"""Metal text → CUDA text, for kernels written in the words that both have: `make docs` writes cuda/*.cu with it.

Address spaces go, `threadgroup` declarations become `__shared__`, and each body begins with the thread's attributes,
which Metal passes as arguments. What else Metal has and CUDA has not stands in cuda/metal_words.cu. Macros could not do
this: NVRTC expands `__device__` to an attribute that is itself named `device`. Matrix units have no common words.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_codellama.kernels.device.source import file_text

SHARED = (
    "packed_kv",
    "kv_attention_rows",
    "kv_attention_mma",
    "rope_append",
)  # what is translated; the rest is written by hand
_SPACES = re.compile(r"\b(?:device|constant|thread) ")
_COUNTED = re.compile(r"( *)for \(int \w+ = \w+; \w+ < [A-Z0-9]\w*( / \w+)?; ")  # as often as the compiler knows
_NOTE = "// Translated from metal/{file}.metal by kernels/device/dialect.py: edit that file, then run `make docs`.\n"


def cuda_text(file: str) -> str:
    """cuda/FILE.cu as it follows from metal/FILE.metal."""
    out = []
    in_notes = False  # the comment lines below `// kernel: NAME`, before its first line of code
    for line in file_text("metal", file).splitlines():
        code, mark, comment = line.partition("//")
        if line.startswith("// kernel: "):
            in_notes = True
        elif in_notes and code.strip():
            out.append("  METAL_ATTRIBUTES")
            in_notes = False
        if known := _COUNTED.match(code):
            out.append(known[1] + "#pragma unroll")
        out.append(_SPACES.sub("", code).replace("threadgroup ", "__shared__ ") + mark + comment)
    head = "// header: metal_words\n" if file == "packed_kv" else ""
    return _NOTE.format(file=file) + head + "\n".join(out) + "\n"


def write(folder: Path) -> None:
    """Write every translated file into cuda/."""
    for file in SHARED:
        (folder / f"{file}.cu").write_text(cuda_text(file), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[1] / "cuda")
