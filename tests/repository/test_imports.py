"""What a source file imports, found in its text alone, in linear time."""

from __future__ import annotations

import pytest

from mlx_codellama.repository.imports import distance, imported

KNOWN = ["pkg/__init__.py", "pkg/a.py", "pkg/b.py", "pkg/sub/__init__.py", "pkg/sub/c.py", "top.py", "src/lib/d.py",
         "src/lib/e.pyi", "x/util.h", "x/in/util.h", "ui/part.ts", "ui/index.ts", "ui/more/index.js"]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("pkg/sub/c.py", "from . import c", ["pkg/sub/__init__.py"]),
        ("pkg/sub/c.py", "from .. import a", ["pkg/a.py", "pkg/__init__.py"]),
        ("pkg/sub/c.py", "from ..b import x, y", ["pkg/b.py"]),
        ("top.py", "import pkg.sub.c as k, pkg.a", ["pkg/sub/c.py", "pkg/a.py"]),
        ("top.py", "from pkg import (\n    a,\n    b as bb,\n)", ["pkg/a.py", "pkg/b.py", "pkg/__init__.py"]),
        ("top.py", "from pkg import (a,\n", ["pkg/a.py", "pkg/__init__.py"]),  # being written
        (
            "top.py",
            "from pkg import (  # why, then\n  a,  # b,\n # sub,\n)\nimport d",
            ["pkg/a.py", "pkg/__init__.py", "src/lib/d.py"],
        ),
        ("top.py", "from pkg import a, \\\n  b\n", ["pkg/a.py", "pkg/b.py", "pkg/__init__.py"]),
        ("top.py", "from pkg import (a,\nx = f(b)\nimport lib.d", ["pkg/a.py", "pkg/__init__.py", "src/lib/d.py"]),
        ("top.py", "from pkg import (a,\nfrom lib import d", ["pkg/a.py", "pkg/__init__.py", "src/lib/d.py"]),
        ("top.py", "import\tpkg.a; x = 1\r\nfrom\tpkg\timport\tb\r\n", ["pkg/a.py", "pkg/b.py", "pkg/__init__.py"]),
        ("pkg/sub/c.py", "from ....... import a\nfrom ... import top", ["top.py"]),
        ("top.py", "if x:\n\timport lib.d  # why\nfrom lib import e", ["src/lib/d.py", "src/lib/e.pyi"]),
        ("pkg/a.py", "import a, os, b.c, .x, 3", []),
        ("pkg/a.py", "text = 'import top'", []),
        ("x/in/main.c", '#include "util.h"\n#include <top.h>', ["x/in/util.h"]),
        ("y/main.c", '#  include "in/util.h"', ["x/in/util.h"]),
        ("ui/a.ts", "import {b} from './part.js'; const c = require('./more')", ["ui/part.ts", "ui/more/index.js"]),
        ("ui/more/b.tsx", 'import x from "..";\nimport "../part"', ["ui/index.ts", "ui/part.ts"]),
        ("ui/a.ts", "import('./part'); xfrom './index'; import  (  './more'", ["ui/part.ts", "ui/more/index.js"]),
        ("notes.txt", "import top", []),
    ],
)
def test_imports_are_found(path: str, text: str, found: list[str]) -> None:
    assert imported(path, text, KNOWN) == found


def test_of_several_files_of_a_name_the_closest_is_imported() -> None:
    known = ["one/util.py", "two/util.py", "two/deep/main.py"]
    assert imported("two/deep/main.py", "import util", known) == ["two/util.py"]
    assert imported("one/x.py", "import util", known) == ["one/util.py"]


def test_distance_counts_steps_up_and_down() -> None:
    assert [distance("a/b", p) for p in ("a/b/x", "a/x", "a/b/c/x", "x", "d/x", "a/c/x")] == [0, 1, 1, 2, 3, 2]


MANY = [f"{folder}/x{n}.{ending}" for folder in ("a", "b/c") for n in range(1000) for ending in ("py", "h", "ts")]


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize(
    ("path", "text", "n_found"),
    [
        ("m.py", "from " + "." * 1_000_000, 0),
        ("m.py", "from " + "." * 1_000_000 + " import a", 0),
        ("m.py", "from " + "a." * 500_000 + "b import c", 0),
        ("m.py", "import" + " " * 1_000_000 + "x", 0),
        ("m.py", "import " + "x1," * 500_000, 1),
        ("m.py", "import " + ",".join(f"x{n}" for n in range(25_000)), 1000),
        ("m.py", "".join(f"import c.x{n}\n" for n in range(25_000)), 1000),
        ("m.py", "from a import (\n" * 25_000, 0),
        ("m.py", "from a import (x1,\n" * 25_000, 1),
        ("m.py", "from a import (" + "x1,\n" * 25_000, 1),
        ("m.py", "from a import " + "\\\n" * 25_000, 0),
        ("m.js", "import" + " " * 1_000_000, 0),
        ("m.js", ("import" + " " * 90) * 20_000, 0),
        ("m.js", "from'" * 200_000, 0),
        ("m.js", "".join(f"from './a/x{n}';" for n in range(25_000)), 1000),
        ("m.js", "import './" + "../" * 300_000 + "x1'", 0),
        ("m.c", "".join(f'#include "x{n}.h"\n' for n in range(25_000)), 1000),
        ("m.c", "#" + " " * 1_000_000 + "include", 0),
        ("m.c", "\n".join([" " * 100] * 20_000), 0),
        (None, "from './" * 25_000, 0),
    ],
    ids=lambda value: str(value)[:24],
)
def test_time_is_linear_in_the_text_and_the_files(path: str | None, text: str, n_found: int) -> None:
    assert len(imported(path, text, MANY)) == n_found
