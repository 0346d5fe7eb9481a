"""Metal text → CUDA text, for kernels written in the words that both languages have.

Address spaces go, `threadgroup` declarations become `__shared__`, and each body begins with the thread's attributes,
which Metal passes as arguments. What else Metal has and CUDA has not stands in cuda/metal_words.cu. Macros could not do
this: NVRTC expands `__device__` to an attribute that is itself named `device`. Matrix units have no common words.
"""

from __future__ import annotations

import re

SHARED = frozenset(
    {"packed_kv", "kv_attention_rows", "kv_attention_mma", "rope_append"}
)  # metal/FILE.metal in common words
HEADERS = {"packed_kv": "metal_words"}  # files that bring in a CUDA header of their own
_SPACES = re.compile(r"\b(?:device|constant|thread) ")
_COUNTED = re.compile(r"( *)for \(int \w+ = \w+; \w+ < [A-Z0-9]\w*( / \w+)?; ")  # as often as the compiler knows


def cuda_text(file: str, metal: str) -> str:
    """The CUDA text that follows from that of metal/FILE.metal, for a FILE in SHARED."""
    out = [f"// header: {HEADERS[file]}"] if file in HEADERS else []
    in_notes = False  # the comment lines below `// kernel: NAME`, before its first line of code
    for line in metal.splitlines():
        code, mark, comment = line.partition("//")
        if line.startswith("// kernel: "):
            in_notes = True
        elif in_notes and code.strip():
            out.append("  METAL_ATTRIBUTES")
            in_notes = False
        if known := _COUNTED.match(code):
            out.append(known[1] + "#pragma unroll")
        out.append(_SPACES.sub("", code).replace("threadgroup ", "__shared__ ") + mark + comment)
    return "\n".join(out) + "\n"
