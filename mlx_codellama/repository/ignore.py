"""Which paths a `.gitignore` leaves out. The rules are those of gitignore(5)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Rule(NamedTuple):
    """One line of a .gitignore, as a pattern for paths relative to the repository's root."""

    pattern: re.Pattern[str]
    keeps: bool  # the line began with "!"
    folders_only: bool


def read_rules(text: str, folder: str) -> list[Rule]:
    """The rules of a .gitignore that lies in `folder` ("" for the root, else "a/b")."""
    rules = []
    for line in text.splitlines():
        line = re.sub(r"(?<!\\)[ \t]+$", "", line)
        if not line or line.startswith("#"):
            continue
        keeps = line.startswith("!")
        line = line[1:] if keeps else line
        folders_only = line.endswith("/")
        line = line.rstrip("/")
        if not line:
            continue
        anchored = "/" in line
        inside = re.escape(folder) + "/" if folder else ""
        body = _translated(line.lstrip("/"))
        try:
            pattern = re.compile(inside + ("" if anchored else "(?:.*/)?") + body)
        except re.error:  # a set such as [b-a] matches nothing
            continue
        rules.append(Rule(pattern, keeps, folders_only))
    return rules


def is_ignored(path: str, is_folder: bool, rules: Iterable[Rule]) -> bool:
    """Whether the last rule that matches leaves the path out. Its parents are taken to be kept."""
    ignored = False
    for rule in rules:
        if (is_folder or not rule.folders_only) and rule.pattern.fullmatch(path):
            ignored = not rule.keeps
    return ignored


def _translated(glob: str) -> str:
    """A glob of gitignore as a regular expression: `*` and `?` stop at slashes, `**` as a whole part does not."""
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i) and (i == 0 or glob[i - 1] == "/"):
            out, i = out + "(?:.*/)?", i + 3
        elif glob[i:] == "**" and (i == 0 or glob[i - 1] == "/"):
            out, i = out + ".*", len(glob)
        elif glob[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif glob[i] == "?":
            out, i = out + "[^/]", i + 1
        elif glob[i] == "[" and (end := glob.find("]", i + 2)) > 0:
            inner = re.sub(r"([\\\[&~|^])", r"\\\1", glob[i + 1 : end])
            inner = re.sub(r"(?<=.)--", r"-\\-", inner)  # or Python warns of sets that one day may be subtracted
            inner = "^" + inner.lstrip("\\")[1:] if glob[i + 1] in "!^" else inner
            out, i = out + f"(?!/)[{inner}]", end + 1
        else:
            i += glob[i] == "\\" and i + 1 < len(glob)
            out, i = out + re.escape(glob[i]), i + 1
    return out
