"""Match paths against an exclude file of git: gitignore(5), byte for byte as git reads it.

A hostile file must not cost more than its size. So plain names are looked up, and all globs of a file run together in
one automaton whose states are the bits of an integer. A path then costs at most its length times the size of the file;
a backtracking matcher, git's own included, can cost a high power of that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

MOST_PATH_BYTES = 4096  # no path is longer, so a longer rule can never match
MOST_GLOB_TOKENS = 65_536  # per file; a glob of n characters has at most n tokens

_SLASH = ord("/")
_SPECIAL = b"*?[\\"
_STAR, _ALL, _DIRS = (
    -1,
    -2,
    -3,
)  # tokens: `*`; `**` at the end; `**/`. Others are sets of bytes, as integers of 256 bits
_EVERY = (1 << 256) - 1
_BUT_SLASH = _EVERY & ~(1 << _SLASH)


def _mask(characters: Iterable[int]) -> int:
    mask = 0
    for character in characters:
        mask |= 1 << character
    return mask


_UPPER, _LOWER = _mask(range(65, 91)), _mask(range(97, 123))
_DIGIT = _mask(range(48, 58))
_GRAPH = _mask(range(33, 127))
_CLASSES = {
    b"alnum": _UPPER | _LOWER | _DIGIT,
    b"alpha": _UPPER | _LOWER,
    b"blank": _mask(b" \t"),
    b"cntrl": _mask([*range(32), 127]),
    b"digit": _DIGIT,
    b"graph": _GRAPH,
    b"lower": _LOWER,
    b"print": _GRAPH | 1 << 32,
    b"punct": _GRAPH & ~(_UPPER | _LOWER | _DIGIT),
    b"space": _mask(b" \t\n\r"),  # git's definition of space, without \v and \f
    b"upper": _UPPER,
    b"xdigit": _mask(b"0123456789abcdefABCDEF"),
}


class TooManyGlobs(ValueError):
    """An exclude file has too many globs."""


class Rules:
    """The rules of one exclude file. The last one that matches decides.

    content      of the file
    base         the folder that holds it, relative to the top of the repository: b"" or b"a/b"
    ignore_case  git's core.ignorecase: ASCII letters match in either case

    Raises TooManyGlobs.
    """

    def __init__(self, content: bytes, base: bytes = b"", *, ignore_case: bool = False) -> None:
        self.n_bytes = len(content)
        self._base, self._fold = base, ignore_case
        self._keeps: list[bool] = []  # per rule: whether it begins with "!"
        # Each pair is (rules for anything, rules for folders), as {text: number of the last such rule}
        self._names: _Pair = ({}, {})
        self._paths: _Pair = ({}, {})
        self._endings: _Pair = ({}, {})
        name_globs: list[_Glob] = []
        path_globs: list[_Glob] = []
        for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            if not line.startswith(b"#"):
                self._add(_trimmed(line.removesuffix(b"\r").split(b"\0")[0]), name_globs, path_globs)
        if sum(len(tokens) + 1 for _, _, tokens in name_globs + path_globs) > MOST_GLOB_TOKENS:
            raise TooManyGlobs(f"more than {MOST_GLOB_TOKENS} characters in globs")
        self._name_globs, self._path_globs = _Automaton(name_globs), _Automaton(path_globs)
        self._lengths = sorted({len(ending) for endings in self._endings for ending in endings})

    def __bool__(self) -> bool:
        return bool(self._keeps)

    def cost(self, path: bytes) -> int:
        """Upper bound on the steps of `verdict`, in an arbitrary unit."""
        name_bytes = len(path) - path.rfind(b"/") - 1
        return len(self._lengths) + name_bytes * self._name_globs.cost + len(path) * self._path_globs.cost

    def verdict(self, path: bytes, is_folder: bool) -> bool | None:
        """Whether the path, relative to the top, is ignored; None if no rule matches. Does not check its parents."""
        path = path[len(self._base) + 1 :] if self._base else path
        path = path.lower() if self._fold else path
        name = path[path.rfind(b"/") + 1 :]
        last = max(self._name_globs.match(name, is_folder), self._path_globs.match(path, is_folder))
        for kind in range(1 + is_folder):
            last = max(last, self._names[kind].get(name, -1), self._paths[kind].get(path, -1))
            endings = self._endings[kind]
            for length in self._lengths if endings else ():
                if length > len(name):
                    break
                last = max(last, endings.get(name[len(name) - length :], -1))
        return None if last < 0 else not self._keeps[last]

    def _add(self, line: bytes, name_globs: list[_Glob], path_globs: list[_Glob]) -> None:
        """One line, as `parse_path_pattern` and `match_basename` / `match_pathname` of git's dir.c take it."""
        keeps = line.startswith(b"!")
        line = line[1:] if keeps else line
        kind = int(line.endswith(b"/"))  # 1: only folders
        line = line[:-1] if kind else line
        anchored = b"/" in line
        line = line[1:] if line.startswith(b"/") else line
        if not line:
            return
        plain = _plain_length(line)
        number = len(self._keeps)
        folded = line.lower() if self._fold else line
        if plain == len(line):
            (self._paths if anchored else self._names)[kind][folded] = number
        elif not anchored and line.startswith(b"*") and _plain_length(line[1:]) == len(line) - 1:
            self._endings[kind][folded[1:]] = number
        else:
            # If there is a slash, git compares the text before the first special character separately, and matches the
            # rest as if a pattern began there. So `a**/b` matches a/b and ab.
            start = plain if anchored else 0
            rest = _tokens(line[start:], self._fold, anchored)
            if rest is None or start + sum(token >= 0 for token in rest) > MOST_PATH_BYTES:
                return
            tokens = [1 << byte for byte in folded[:start]] + rest
            (path_globs if anchored else name_globs).append((number, kind, tokens))
        self._keeps.append(keeps)


_Pair = tuple[dict[bytes, int], dict[bytes, int]]
_Glob = tuple[int, int, list[int]]  # number of the rule, 1 for folders only, tokens


def is_ignored(path: bytes, is_folder: bool, lists: Iterable[Rules]) -> bool:
    """Whether lists of rules, the strongest first, ignore a path whose parents are not ignored."""
    for rules in lists:
        verdict = rules.verdict(path, is_folder)
        if verdict is not None:
            return verdict
    return False


class _Automaton:
    """Globs matched in parallel. Bit i of the state is set if the text so far brings some glob to its token i."""

    def __init__(self, globs: list[_Glob]) -> None:
        self._numbers = [number for number, _, _ in globs]
        self._ends: list[int] = []  # the bit of each glob's end
        size = sum(len(tokens) + 1 for _, _, tokens in globs)
        width = size // 8 + 1
        self.cost = 0 if not globs else 1 + size // 8192
        # Set bits in byte arrays, because each `|` of integers copies the whole integer.
        starts, stars, everything, dirs, wide = (bytearray(width) for _ in range(5))
        ends = (bytearray(width), bytearray(width))  # for rules for anything, for rules for folders
        narrow: dict[int, bytearray] = {}  # byte → tokens that match it
        barred: dict[int, bytearray] = {}  # byte → tokens in `wide` that do not
        members: dict[int, tuple[bool, list[int]]] = {}
        at = 0
        for _, kind, tokens in globs:
            _set(starts, at)
            for token in tokens:
                if token < 0:
                    _set(stars if token == _STAR else everything if token == _ALL else dirs, at)
                else:
                    if token not in members:
                        is_wide = bin(token).count("1") > 128
                        listed = ~token & _EVERY if is_wide else token
                        members[token] = is_wide, [byte for byte in range(256) if listed >> byte & 1]
                    is_wide, listed_bytes = members[token]
                    if is_wide:
                        _set(wide, at)
                    for byte in listed_bytes:
                        _set((barred if is_wide else narrow).setdefault(byte, bytearray(width)), at)
                at += 1
            _set(ends[kind], at)
            self._ends.append(at)
            at += 1
        all_wide = _integer(wide)
        self._moves = [
            _integer(narrow.get(byte, b"")) | (all_wide & ~_integer(barred.get(byte, b""))) for byte in range(256)
        ]
        self._dirs = _integer(dirs)
        self._skips = _integer(stars) | _integer(everything)  # tokens that also match nothing
        self._across = _integer(everything) | self._dirs  # tokens that match slashes
        self._within = self._skips | self._dirs
        anything, folders = _integer(ends[0]), _integer(ends[1])
        self._accepts = (anything, anything | folders)
        start = _integer(starts)
        start |= (start & self._dirs) << 1
        self._start = start | (start & self._skips) << 1

    def match(self, text: bytes, is_folder: bool) -> int:
        """The number of the last rule that matches, or -1."""
        state, moves, dirs, skips = self._start, self._moves, self._dirs, self._skips
        for byte in text:
            if not state:
                return -1
            moved = (state & moves[byte]) << 1
            if byte == _SLASH:  # here `**/` may end
                state = moved | (state & self._across)
                state |= (state & dirs) << 1
            else:
                state = moved | (state & self._within) | (moved & dirs) << 1
            state |= (state & skips) << 1
        last = (state & self._accepts[is_folder]).bit_length() - 1
        return -1 if last < 0 else self._numbers[bisect_left(self._ends, last)]


def _set(bits: bytearray, at: int) -> None:
    bits[at >> 3] |= 1 << (at & 7)


def _integer(bits: bytes | bytearray) -> int:
    return int.from_bytes(bits, "little")


def _trimmed(line: bytes) -> bytes:
    """The line without trailing spaces, except one after a backslash. Tabs stay."""
    bare = line.rstrip(b" ")
    escapes = len(bare) - len(bare.rstrip(b"\\"))
    return bare + b" " if escapes % 2 and len(bare) < len(line) else bare


def _plain_length(pattern: bytes) -> int:
    """Number of bytes before the first special byte of a glob."""
    return min((at for special in _SPECIAL if (at := pattern.find(special)) >= 0), default=len(pattern))


def _tokens(glob: bytes, fold: bool, is_path: bool) -> list[int] | None:
    """The tokens of a glob, as in git's wildmatch.c; None if it matches nothing. Equal neighbours are merged."""
    any_byte = _BUT_SLASH if is_path else _EVERY
    tokens: list[int] = []
    i = 0
    while i < len(glob):
        byte = glob[i]
        if byte == ord("*"):
            first = i
            while i < len(glob) and glob[i] == ord("*"):
                i += 1
            whole = is_path and i - first > 1 and (first == 0 or glob[first - 1] == _SLASH)
            if whole and i == len(glob):
                token = _ALL
            elif whole and glob[i] == _SLASH:
                token, i = _DIRS, i + 1
            elif whole and glob.startswith(b"\\/", i):
                token = _ALL
            else:
                token = _STAR
            if token == _ALL and tokens and tokens[-1] == _DIRS:
                tokens.pop()
            if not (token == _DIRS and tokens and tokens[-1] == _DIRS):
                tokens.append(token)
            continue
        if byte == ord("?"):
            tokens.append(any_byte)
        elif byte == ord("["):
            found = _set_of_bytes(glob, i + 1, fold)
            if found is None:
                return None
            members, i = found
            tokens.append(members & any_byte)
        elif byte == ord("\\"):
            i += 1
            if i == len(glob):
                return None
            tokens.append(1 << glob[i])  # never folded: an escaped capital then matches nothing, as in git
        else:
            tokens.append(1 << (byte + 32 if fold and 65 <= byte <= 90 else byte))
        i += 1
    return tokens


def _set_of_bytes(glob: bytes, i: int, fold: bool) -> tuple[int, int] | None:
    """(members, position of the closing bracket) of a set that opens before i; None if it is malformed.

    With fold the text is in lower case, so only lower-case letters count. A single capital then matches nothing, as in
    git.
    """
    negated = glob[i : i + 1] in (b"!", b"^")
    i += negated
    members, previous, first = 0, 0, True
    bracket = -1  # position of the next "]" at or after i, once known
    while True:
        if i >= len(glob):
            return None
        byte = glob[i]
        if byte == ord("]") and not first:
            break
        first = False
        if byte == ord("\\"):
            i += 1
            if i >= len(glob):
                return None
            byte = glob[i]
            members |= 1 << byte
            previous = byte
        elif byte == ord("-") and previous and i + 1 < len(glob) and glob[i + 1] != ord("]"):
            i += 1
            if glob[i] == ord("\\"):
                i += 1
                if i >= len(glob):
                    return None
            if glob[i] >= previous:
                span = (1 << (glob[i] + 1)) - (1 << previous)
                members |= span | ((span & _UPPER) << 32 if fold else 0)
            previous = 0
        elif glob.startswith(b"[:", i):
            if bracket < i + 2:
                bracket = glob.find(b"]", i + 2)
            if bracket < 0:
                return None
            if bracket == i + 2 or glob[bracket - 1] != ord(":"):  # no class: the bracket is a member
                members |= 1 << byte
                previous = byte
            else:
                name = glob[i + 2 : bracket - 1]
                if name not in _CLASSES:
                    return None
                members |= _CLASSES[name] | (_LOWER if fold and name == b"upper" else 0)
                previous, i = 0, bracket
        else:
            members |= 1 << byte
            previous = byte
        i += 1
    return (~members & _EVERY if negated else members), i
