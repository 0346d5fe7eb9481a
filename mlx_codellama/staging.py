"""Writing all or nothing: under a staging name beside the target, synced, then renamed. Every writer goes through here.

A staging name is `.NAME.RANDOM-MARK.partial`, made anew each time (O_EXCL, never through a link). The mark is a digest
of the other parts, and the file or folder is locked while its process lives. So what a killed process left can be told
from everything else: a right mark, our own, no lock. Only that is ever removed; other names are not looked at.

`.NAME.RANDOM-MARK.old` is a folder on its way out, where the system cannot swap two names in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_codellama.errors import OutputError, OutputExistsError

STEM = 40  # characters of the target's name that a staging name begins with: names have a limit of 255 bytes
_STAGED = re.compile(r"\.(.{1,40})\.([0-9a-f]{16})-([0-9a-f]{16})\.(partial|old)", re.DOTALL)
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # what a file system cannot do
_UNLOCKABLE = (errno.ENOLCK, *_UNKNOWN)
_HINTS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "your quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ELOOP: "its symbolic links lead in a circle: name the file itself",
    errno.ENOENT: "make the folder first, or choose another place",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk reports a fault: choose another one",
    errno.EFBIG: "the file is larger than this system allows: choose another disk, or raise `ulimit -f`",
    errno.ETXTBSY: "another program runs or uses it: end that first",
    errno.EBUSY: "another program uses it, or it is a mount point: choose another name",
}


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_file(
    path: str | Path,
    data: bytes,
    *,
    new: bool = False,
    private: bool = False,
    before: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole file; arguments and errors as in `replacing`."""
    with replacing(path, new=new, private=private, before=before) as fd:
        write_at(fd, memoryview(data), 0)


@contextlib.contextmanager
def replacing(
    path: str | Path, *, new: bool = False, private: bool = False, before: Callable[[Path], None] | None = None
) -> Iterator[int]:
    """Yield the descriptor of an empty file, which takes the place of `path` once the block ends without an error.

    new      never replace: a file that is there is an OutputExistsError
    private  a new file can be read by its owner alone (0600); else the umask decides
    before   called with the file to be replaced, as the last thing before that; what it raises leaves the file as it is

    A file that is replaced keeps its mode, its owner and its extended attributes; a symbolic link stays, and the file
    that it names is replaced. Raises OutputError for what is read-only or no ordinary file, where another process is
    writing the same file, and for whatever the system refuses. What was there is then kept, and nothing else is left.
    """
    path = Path(path)
    with writing(path):
        target = path if new else ordinary(path)
        if new and os.path.lexists(target):
            raise OutputExistsError(f"{path} exists", hint="name another file")
        old = None if new else _lstat(target)
        if old is not None and not old.st_mode & 0o222:  # root may write it all the same; it was meant to stay
            raise OutputError(f"{path} is read-only", hint="allow writing with chmod u+w, or name another file")
        clear_files(target)
        temporary, fd = _new_file(target, 0o600 if private or old is not None else 0o666)
        try:
            yield fd
            if old is not None:
                _take_over(fd, target, old)
            os.fsync(fd)
            if before is not None:
                before(target)
            if new:
                rename_new(temporary, target)
            else:
                ordinary(target)  # whatever came meanwhile
                os.replace(temporary, target)
            sync_folder(target.parent)
        finally:
            try:
                if (found := _lstat(temporary)) and os.path.samestat(found, os.fstat(fd)):
                    os.unlink(temporary)
            finally:
                os.close(fd)


def ordinary(path: str | Path) -> Path:
    """The file that `path` names, links followed. Raises OutputError if there is one and it is no ordinary file."""
    with writing(path):
        target = Path(os.path.realpath(path))
        found = _lstat(target)
    if found is None or stat.S_ISREG(found.st_mode):
        return target
    if stat.S_ISLNK(found.st_mode):
        with writing(path):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    raise OutputError(f"{path} is {kind(found.st_mode)}, which is not replaced", hint="name an ordinary file")


def kind(mode: int) -> str:
    """What a file of this mode is, in words."""
    for test, name in (
        (stat.S_ISREG, "an ordinary file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def open_own(path: Path, flags: int) -> int:
    """Open a file of ours that is written piece by piece (a log, a download) and make it where there is none.

    Raises OutputError for a link, for what is no ordinary file and for the file of another user.
    """
    with writing(path):
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if (found := _lstat(path)) and not stat.S_ISREG(found.st_mode):
                raise _not_own(path, kind(found.st_mode)) from error
            raise
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            os.close(fd)
            what = "another user's" if stat.S_ISREG(found.st_mode) else kind(found.st_mode)
            raise _not_own(path, what)
        return fd


def _not_own(path: Path, what: str) -> OutputError:
    return OutputError(f"{path} is {what}, and nothing is written to it", hint="move it away, or choose another place")


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of data; → its length in bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


def _take_over(fd: int, target: Path, old: os.stat_result) -> None:
    """Give a new file the owner (only root may give files away), group, mode and extended attributes of an old one."""
    with contextlib.suppress(PermissionError):
        os.fchown(fd, -1, old.st_gid)
    with contextlib.suppress(PermissionError):
        os.fchown(fd, old.st_uid, -1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a file system without them
            for name in os.listxattr(target):
                with contextlib.suppress(OSError):
                    os.setxattr(fd, name, os.getxattr(target, name))
    os.fchmod(fd, stat.S_IMODE(old.st_mode))


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask the same. Raises OutputError where one has it."""
    with writing(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with writing(folder):
            if not _locked(Path(os.path.realpath(folder)), fd):
                raise _busy(folder)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def folder_beside(target: Path, owned: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a new, empty, locked folder under a staging name beside target; it is gone afterwards, unless renamed.

    owned  says of an entry of a folder whether this program writes such; others are never removed

    First undoes or removes what a killed process left of the same target. Raises OutputError, also where another
    process is writing there.
    """
    with writing(target):
        _recover(target, owned)
        folder, lock = _new_folder(target)
    try:
        yield folder
    finally:
        try:
            if (found := _lstat(folder)) and os.path.samestat(found, os.fstat(lock)):
                with contextlib.suppress(OSError):  # the error that ended the block says more
                    remove_folder(folder, owned)
        finally:
            os.close(lock)


def place_folder(folder: Path, target: Path, owned: Callable[[Path], bool], check: Callable[[Path], None]) -> None:
    """Give a folder of `folder_beside` the name target. A target that exists is replaced, in one step if possible.

    check  raises where the folder that it is given must not be replaced. It is asked before the replacement, and again
           of what was replaced: if something came in meanwhile, that is put back
    """
    if not os.path.lexists(target):
        rename_new(folder, target)
    else:
        check(target)
        out_of_the_way = folder
        if not exchange(folder, target):
            out_of_the_way = staging_name(target, "old")
            os.rename(target, out_of_the_way)
            os.rename(folder, target)
        try:
            check(out_of_the_way)
        except BaseException:
            if not exchange(out_of_the_way, target):
                os.rename(target, folder)
                os.rename(out_of_the_way, target)
            raise
        sync_folder(target.parent)  # the old one goes when the new one's name is on the disk
        if not remove_folder(out_of_the_way, owned):
            raise OutputError(
                f"{target} is written, but files came into the one that it replaced: they are in {out_of_the_way}",
                hint="move them where they belong",
            )
    sync_folder(target.parent)


def remove_folder(folder: Path, owned: Callable[[Path], bool]) -> bool:
    """Remove a flat folder of files that are all `owned`. False, and nothing is removed, where one is not."""
    with contextlib.suppress(FileNotFoundError):
        entries = [folder / name for name in os.listdir(folder)]
        if not all(owned(entry) for entry in entries):
            return False
        for entry in entries:
            entry.unlink(missing_ok=True)
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux renameat2, macOS renamex_np). False where that is not to be had."""
    return _rename_with(one, other, 2) == 0


def rename_new(one: Path, other: Path) -> None:
    """Rename, unless the other name is taken: then OutputExistsError, and nothing is changed."""
    code = _rename_with(one, other, 4 if sys.platform == "darwin" else 1)
    if code in _UNKNOWN and not os.path.lexists(other):
        os.rename(one, other)  # the best that this file system has
    elif code in (*_UNKNOWN, errno.EEXIST, errno.ENOTEMPTY):
        raise OutputExistsError(f"{other} exists", hint="it came meanwhile and is kept; choose another name")
    elif code:
        raise OSError(code, os.strerror(code), str(other))


def _rename_with(one: Path, other: Path, flag: int) -> int:
    """Rename with a flag of the system's; → 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            done = libc.renamex_np(os.fsencode(one), os.fsencode(other), flag)
        else:
            done = libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), flag)
    except AttributeError:
        return errno.ENOSYS
    return 0 if done == 0 else ctypes.get_errno() or errno.ENOSYS


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system lets us."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # we may write in it, not read it
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(fd)


# ── what killed processes left ──────────────────────────────────────────────────────────────────────────────────────


def is_staged(path: Path) -> bool:
    """Whether this is an ordinary file of ours under a staging name: being written, or left by a killed process."""
    found = _lstat(path)
    return found is not None and stat.S_ISREG(found.st_mode) and _is_ours(found) and _kind_of(path.name) is not None


def clear_files(target: Path) -> None:
    """Remove what killed processes left of files in target's folder. Raises OutputError where a living one is writing
    target itself."""
    for name in _names(target.parent):
        of_target = _kind_of(name, target.name) is not None
        if not of_target and _kind_of(name) is None:
            continue
        path = target.with_name(name)
        with _taken(path, stat.S_ISREG) as state:
            if state == "free":
                path.unlink(missing_ok=True)
            elif state == "busy" and of_target:
                raise _busy(target)


def _recover(target: Path, owned: Callable[[Path], bool]) -> None:
    """Put back a target that was cut off between the two steps of its replacement; remove what else was left of it."""
    left = [(name, found) for name in _names(target.parent) if (found := _kind_of(name, target.name)) is not None]
    with contextlib.ExitStack() as stack:
        free = []
        for name, what in left:
            path = target.with_name(name)
            state = stack.enter_context(_taken(path, stat.S_ISDIR))
            if state == "busy":
                raise _busy(target)
            if state == "free":
                free.append((path, what))
        for path, what in free:
            if what == "old" and not os.path.lexists(target):
                rename_new(path, target)
            else:
                with contextlib.suppress(OSError):  # it stays: no reason not to write
                    remove_folder(path, owned)


@contextlib.contextmanager
def _taken(path: Path, right_kind: Callable[[int], bool]) -> Iterator[str]:
    """Try to lock what a staging name names. Yields free (ours now), busy (its process lives) or foreign."""
    found = _lstat(path)
    if found is None or not right_kind(found.st_mode) or not _is_ours(found):
        yield "foreign"
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield "foreign"
        return
    try:
        state = "free" if os.path.samestat(found, os.fstat(fd)) else "foreign"
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            state = "busy"
        except OSError:
            state = "foreign"  # nobody can say whether its process lives
        if state == "free" and not ((again := _lstat(path)) and os.path.samestat(again, found)):
            state = "foreign"  # renamed by its process, which ended meanwhile
        yield state
    finally:
        os.close(fd)


def _new_file(target: Path, mode: int) -> tuple[Path, int]:
    while True:
        path = staging_name(target, "partial")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        if _locked(path, fd):
            return path, fd
        os.close(fd)


def _new_folder(target: Path) -> tuple[Path, int]:
    while True:
        path = staging_name(target, "partial")
        os.mkdir(path)
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover before it was locked
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if _locked(path, fd):
                return path, fd
            os.close(fd)


def _locked(path: Path, fd: int) -> bool:
    """Lock what was just made. False where another process took it for a leftover before it was locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNLOCKABLE:
            raise
    found = _lstat(path)
    return found is not None and os.path.samestat(found, os.fstat(fd))


def staging_name(target: Path, what: str) -> Path:
    """A new name beside target; what is `partial` or `old`."""
    random = secrets.token_hex(8)
    return target.with_name(f".{target.name[:STEM]}.{random}-{_mark(target.name, random, what)}.{what}")


def _kind_of(name: str, target: str | None = None) -> str | None:
    """`partial` or `old` for a staging name with the right mark: of this target, or without one of any short name."""
    match = _STAGED.fullmatch(name)
    if match is None or (target is not None and match[1] != target[:STEM]):
        return None
    right = _mark(match[1] if target is None else target, match[2], match[4])
    return match[4] if secrets.compare_digest(match[3], right) else None


def _mark(name: str, random: str, what: str) -> str:
    text = "\0".join(("mlx-codellama staging", name, random, what))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (PermissionError, FileNotFoundError):
        return []


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid()


def _busy(target: Path) -> OutputError:
    return OutputError(f"another process is writing {target}", hint="wait for it, or stop it")


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of the operating system as OutputError, each with what helps against it."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the folder's permissions")
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
