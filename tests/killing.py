"""kill -9 at random points of everything that writes: nothing of anybody is lost, and the same can be run again.

    python tests/killing.py --kills 2000 [--seed 1] [--only train] [--fault written_in_place] [--folder /tmp]

One process has everything imported and forks a child for every run. The child kills itself before, within or after a
random call that changes a file system, or its parent kills it after a random time. Around the outputs lie other
people's things: links, a pipe, folders and files under the names that staging names might have, hard links. After every
kill those are as they were, and each output is the old one or the new one; after one to three kills the same run, left
alone, ends with the new one and nothing else. tests/test_killed.py does a few of these.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STAGED = re.compile(r"\..*\.[0-9a-f]{16}-[0-9a-f]{16}\.(partial|old)", re.DOTALL)
FOREIGN = ".{}.0123456789abcdef-0123456789abcdef.{}"  # the form of a staging name, and not its mark
RAM_DISK = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
Entry = tuple[str, int, str]  # kind, mode, content
Tree = dict[str, Entry]


# ── what lies on the disk ───────────────────────────────────────────────────────────────────────────────────────────


def entry_of(path: Path) -> Entry:
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return "link", 0, os.readlink(path)
    if stat.S_ISDIR(found.st_mode):
        return "folder", mode, ""
    if not stat.S_ISREG(found.st_mode):
        return "special", mode, ""
    if path.name.endswith(".lock"):  # filelock's: made, then given its mode
        mode = 0
    return "file", mode, hashlib.sha256(timeless(path.name, path.read_bytes())).hexdigest()


def timeless(name: str, data: bytes) -> bytes:
    """Content without what differs from run to run: times, and the verdict that --verify adds later."""
    if name == "run.json":
        told = json.loads(data)
        return json.dumps({k: v for k, v in told.items() if k not in ("finished", "elapsed_s", "verify")}).encode()
    if name == "log.jsonl":
        return b"".join(b"%d\n" % json.loads(line)["step"] for line in data.splitlines() if line.endswith(b"}"))
    return data


def tree_of(root: Path) -> Tree:
    """Every entry below root by its path, without what has a staging name of the right mark."""
    tree: Tree = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_staged(name)]
        for name in (*folders, *files):
            if not is_staged(name):
                path = Path(folder) / name
                tree[str(path.relative_to(root))] = entry_of(path)
    return tree


def is_staged(name: str) -> bool:
    return bool(STAGED.fullmatch(name)) and "0123456789abcdef-0123456789abcdef" not in name


def staged(root: Path) -> list[str]:
    return [str(Path(folder) / name) for folder, a, b in os.walk(root) for name in (*a, *b) if is_staged(name)]


def part(tree: Tree, name: str) -> Tree:
    return {path: entry for path, entry in tree.items() if path == name or path.startswith(name + "/")}


# ── what is run ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """Something that writes.

    prepare  lays out the sandbox it runs in; gets the folder of `materials`
    run      runs in a child, inside the sandbox
    outputs  paths, each of which is the old or the new one as a whole
    between  whether a tree of one output is right too though it is neither
    once     whether it cannot be done a second time: it refuses what is there
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[], None]
    outputs: tuple[str, ...]
    between: Callable[[Tree], bool] = lambda tree: False
    once: bool = False


def command(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        from mlx_codellama.__main__ import main

        sys.argv = ["mlx-codellama", *arguments]
        main()

    return run


def surrounded(*names: str) -> None:
    """Other people's things beside outputs of these names, in the current folder."""
    Path("precious").mkdir()
    Path("precious/thesis.tex").write_text("years of work")
    Path("precious/config.json").write_text('{"port": 1}')
    for name in names:
        at, base = Path(name).parent, Path(name).name
        (at / f".{base}.partial").symlink_to(Path("precious").resolve())
        (at / f".{base}.old").mkdir()
        (at / f".{base}.old" / "notes.md").write_text("mine")
        os.link("precious/thesis.tex", at / f".{base}.partial.safetensors")
        os.mkfifo(at / f".{base}.pipe.partial")
        (at / FOREIGN.format(base, "partial")).mkdir()
        (at / FOREIGN.format(base, "partial") / "model.safetensors").write_text("mine too")
        (at / FOREIGN.format(base, "old")).symlink_to(Path("precious").resolve())


def materials(folder: Path) -> None:
    """A small model, models that were made of it, and a cache that it left. Runs in a child: this brings MLX."""
    import inspect
    import textwrap

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_codellama import load
    from mlx_codellama.config import ModelArgs
    from mlx_codellama.loader import random_model
    from mlx_codellama.tokenizer import train_tokenizer

    model = folder / "model"
    model.mkdir()
    tokenizer = train_tokenizer([inspect.getsource(textwrap)], model / "tokenizer.model", vocab_size=480)
    args = ModelArgs(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=tokenizer.vocab_size,
        rope_theta=1e6,
        max_position_embeddings=128,
        dtype="float32",
    )
    weights = dict(tree_flatten(random_model(args, seed=5, dtype="float32").parameters()))
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    (model / "config.json").write_text(json.dumps(args.to_dict()))
    sources = folder / "sources"
    sources.mkdir()
    for i in range(80):
        (sources / f"m{i}.py").write_text("".join(f"def f{i}{j}(x):\n    return x + {i * j}\n\n\n" for j in range(9)))
    m = load(model, kv_bits=8)
    m.complete(PROMPT, max_tokens=2)
    m.save_cache(folder / "cache")


PROMPT = "def f(a, b):\n    return a + b\n\n" * 3


def bare(where: Path) -> None:
    os.symlink(where / "model", "model")
    surrounded("out")


def with_out(where: Path) -> None:
    bare(where)
    shutil.copytree(where / "made", "out")
    os.chmod("out", 0o750)


def linked_source(where: Path) -> None:
    surrounded("out")
    shutil.copytree(where / "made", "out")
    os.mkdir("source")
    for path in (where / "model").iterdir():
        os.symlink(path, f"source/{path.name}")


def without_exchange(run: Callable[[], None]) -> Callable[[], None]:
    """As on a file system that cannot swap two names."""

    def slower() -> None:
        from mlx_codellama import staging

        staging.exchange = lambda one, other: False
        run()

    return slower


def old_cache(where: Path) -> None:
    os.symlink(where / "model", "model")
    os.mkdir("elsewhere")
    shutil.copy(where / "cache", "elsewhere/real")
    os.chmod("elsewhere/real", 0o600)
    os.symlink("elsewhere/real", "cache")
    surrounded("cache", "elsewhere/real")


def hole(where: Path) -> None:
    os.symlink(where / "model", "model")
    Path("app.py").write_text(PROMPT + "x = <FILL_ME>\n")
    os.chmod("app.py", 0o751)
    os.symlink("app.py", "link.py")
    surrounded("app.py")


def training(where: Path) -> None:
    os.symlink(where / "sources", "sources")
    surrounded("run")


def small_training() -> None:
    from mlx_codellama.train import demo

    demo.MODEL = replace(
        demo.MODEL, hidden_size=24, num_hidden_layers=1, intermediate_size=40, vocab_size=330, head_dim=6
    )
    demo.ROWS, demo.LENGTH = 2, 48
    demo.STAGES = (demo.Stage(0, 20, 120), demo.Stage(2, 20, 80))
    command("train", "run", "--sources", "sources", "--steps", "2")()


def part_of_training(tree: Tree) -> bool:
    """A run's folder on its way: the model is there as a whole or not at all."""
    names = {path.split("/")[1] for path in tree if "/" in path}
    model = {path for path in tree if path.startswith("run/model/")}
    return names <= {"train.json", "tokenizer.model", "state.safetensors", "log.jsonl", "model"} and (
        len(model) == 4 or "model" not in names
    )


def talk() -> None:
    from mlx_codellama.conversation import Conversation

    dialog = Conversation(system="be brief")
    dialog.ask("why?")
    dialog.answered("because\n" * 999)
    dialog.save(Path("talk.md"))


def verdicts() -> None:
    from mlx_codellama.kernels.gpu import trust

    trust._keep("a key", trust.Verdict("rope", "device", "1", True, 0.5, ""))


def old_verdicts(where: Path) -> None:
    folder = Path("caches")
    folder.mkdir()
    (folder / "kernels.json").write_text("{}")
    surrounded("caches/kernels.json")


def record(where: Path) -> None:
    shutil.copytree(where / "made", "made")


def recorded() -> None:
    from mlx_codellama.weights import update_run

    update_run("made", {"note": "x" * 9999})


BLOB = bytes(range(256)) * 4000
BLOB_NAME = hashlib.sha256(BLOB).hexdigest()


def downloads(where: Path) -> None:
    os.makedirs("hub/blobs")
    surrounded(f"hub/blobs/{BLOB_NAME}")


def fetched() -> None:
    """A large file of the hub, in pieces, from where an earlier run stopped."""
    import huggingface_hub.file_download
    import huggingface_hub.utils

    from mlx_codellama import hub

    def http_get(url: str, file: Any, *, resume_size: int, **how: Any) -> None:
        for at in range(resume_size, len(BLOB), 65536):
            file.write(BLOB[at : at + 65536])
            file.flush()
            os.fsync(file.fileno())

    huggingface_hub.file_download.http_get = http_get
    url = "http://127.0.0.1/model.safetensors"
    meta = argparse.Namespace(etag=BLOB_NAME, size=len(BLOB), location=url)
    hub._resume(huggingface_hub, url, meta, Path("hub/blobs") / BLOB_NAME, "model.safetensors", None)


WORKS = (
    Work("convert", bare, command("convert", "model", "out"), ("out",), once=True),
    Work("convert --overwrite", with_out, command("convert", "model", "out", "--bits", "4", "--overwrite"), ("out",)),
    Work(
        "convert --overwrite, two renames",
        with_out,
        without_exchange(command("convert", "model", "out", "--overwrite")),
        ("out",),
        between=lambda tree: not tree,  # between the two renames: the old one is put back by the next run
    ),
    Work("convert --verify", with_out, command("convert", "model", "out", "--verify", "--overwrite"), ("out",)),
    Work("quantize", linked_source, command("quantize", "source", "out", "--bits", "8", "--overwrite"), ("out",)),
    Work("train", training, small_training, ("run",), between=part_of_training),
    Work(
        "complete --cache",
        bare,
        command("complete", PROMPT, "-m", "model", "-n", "2", "--cache", "new.cache"),
        ("new.cache",),
    ),
    Work(
        "complete --rewrite-cache",
        old_cache,
        command("complete", PROMPT, "-m", "model", "-n", "2", "--cache", "cache", "--rewrite-cache"),
        ("elsewhere/real",),
    ),
    Work(
        "infill -i",
        hole,
        command("infill", "link.py", "-m", "model", "-n", "3", "-i", "--accept-cut"),
        ("app.py",),
        once=True,
    ),
    Work("chat /save", lambda where: surrounded("talk.md"), talk, ("talk.md",), once=True),
    Work("verdicts on kernels", old_verdicts, verdicts, ("caches/kernels.json",)),
    Work("run.json", record, recorded, ("made/run.json",)),
    Work(
        "download",
        downloads,
        fetched,
        tuple(f"hub/blobs/{BLOB_NAME}{end}" for end in ("", ".part", ".lock")),
        between=lambda tree: all(path.endswith((".part", ".lock")) for path in tree),
    ),
)


# ── faults to be found: without these a check that sees nothing would pass ──────────────────────────────────────────


def written_in_place() -> None:
    from mlx_codellama import staging

    @contextlib.contextmanager
    def replacing(path: Path, **how: Any) -> Iterator[int]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        yield fd
        os.fsync(fd)
        os.close(fd)

    staging.replacing = replacing


def leftovers_stay() -> None:
    from mlx_codellama import staging

    staging.clear_files = staging._recover = lambda *what: None


def marks_unread() -> None:
    from mlx_codellama import staging

    staging._kind_of = lambda name, target=None: "partial" if name.endswith(".partial") else None


def no_folder_undone() -> None:
    from mlx_codellama import staging

    recover = staging._recover
    staging._recover = lambda target, owned: recover(target, owned) if os.path.lexists(target) else None


FAULTS = {fault.__name__: fault for fault in (written_in_place, leftovers_stay, marks_unread, no_folder_undone)}


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def count_points(die_at: int | None) -> list[int]:
    """Count, from now on, the points at which the file system changes; → the counter. At point die_at: kill -9."""
    seen = [0]

    def point() -> None:
        seen[0] += 1
        if seen[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, *, counts: Callable[..., bool] = lambda *a: True) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args):
                return real(*args, **kwargs)
            point()
            if name == "pwrite" and seen[0] + 1 == die_at:
                real(args[0], args[1][: len(args[1]) // 2], args[2])  # dies with half of it written
            point()
            result = real(*args, **kwargs)
            point()
            return result

        setattr(owner, name, call)

    from mlx_codellama import staging

    wrap(os, "open", counts=lambda path, flags, *a: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
    for name in ("pwrite", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod", "fchmod"):
        wrap(os, name)
    wrap(staging, "_rename_with")
    return seen


def start(work: Work, die_at: int | None, told: Path, fault: str | None = None) -> int:
    """Fork a child that runs the work in the current folder; → its process id. Writes the number of points to told."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(told.with_suffix(".output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["MLX_CODELLAMA_CACHE"] = "caches"
        os.environ["HF_HUB_OFFLINE"] = "1"
        if fault:
            FAULTS[fault]()
        seen = count_points(die_at)
        try:
            work.run()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        with told.open("w") as file:
            file.write(str(seen[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    """→ its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Lost(AssertionError):
    """Something is not as it was, or cannot be run again."""


class Ground:
    """A folder to run works in, again and again, and what each leaves if nobody disturbs it."""

    def __init__(self, folder: Path, fault: str | None = None) -> None:
        self.fault: str | None = None
        self.sandbox, self.materials, self.told = folder / "sandbox", folder / "materials", folder / "told"
        self._known: dict[str, tuple[Tree, int, float]] = {}
        self.materials.mkdir()
        made = Work("", lambda where: None, lambda: materials(self.materials), ())
        again = Work("", lambda where: None, command("convert", "model", "made", "-q", "q8", "--group-size", "32"), ())
        for work in (made, again):
            with inside(self.materials):
                self._undisturbed(work)
        self.fault = fault

    def _undisturbed(self, work: Work) -> tuple[int, str]:
        """Run to the end; → exit code, what it said."""
        code = finish(start(work, None, self.told, self.fault))
        said = self.told.with_suffix(".output").read_text(errors="replace")
        if code and not work.once:
            raise Lost(f"{work.name}: exit {code}\n{said}")
        return code, said

    @contextlib.contextmanager
    def _fresh(self, work: Work) -> Iterator[Tree]:
        shutil.rmtree(self.sandbox, ignore_errors=True)
        self.sandbox.mkdir()
        with inside(self.sandbox):
            work.prepare(self.materials)
            yield tree_of(self.sandbox)

    def ends(self, work: Work) -> tuple[Tree, int, float]:
        """(what it leaves, the points at which it changes the file system, seconds)."""
        if work.name not in self._known:
            with self._fresh(work):
                begun = time.monotonic()
                code, said = self._undisturbed(work)
                if code:
                    raise Lost(f"{work.name}: exit {code}\n{said}")
                taken = time.monotonic() - begun
                points = int(self.told.read_text())
                self._known[work.name] = tree_of(self.sandbox), points, taken
                if staged(self.sandbox):
                    raise Lost(f"{work.name} leaves {staged(self.sandbox)}")
        return self._known[work.name]

    def round(self, work: Work, rng: random.Random) -> int:
        """One to three kills and an undisturbed run; → the kills that came in time. Raises Lost."""
        end, points, taken = self.ends(work)
        kills = 0
        with self._fresh(work) as begin:
            for _ in range(rng.randint(1, 3)):
                kills += self._killed(work, rng, points, taken)
                self._compare(work, begin, end, tree_of(self.sandbox))
            done = all(part(tree_of(self.sandbox), out) == part(end, out) for out in work.outputs)
            code, said = self._undisturbed(work)
            if code and not (work.once and done):
                raise Lost(f"{work.name} cannot be run again: exit {code}\n{said}")
            after = tree_of(self.sandbox)
            if after != end:
                raise Lost(f"{work.name}, run again: {_difference(end, after)}\n{said}")
            if left := staged(self.sandbox):
                raise Lost(f"{work.name}, run again, leaves {left}")
        return kills

    def _killed(self, work: Work, rng: random.Random, points: int, taken: float) -> bool:
        if rng.random() < 0.25:
            pid = start(work, None, self.told, self.fault)
            time.sleep(rng.uniform(0, taken))
            os.kill(pid, signal.SIGKILL)
        else:
            pid = start(work, rng.randint(1, points), self.told, self.fault)
        return finish(pid) == -signal.SIGKILL

    def _compare(self, work: Work, begin: Tree, end: Tree, now: Tree) -> None:
        for out in work.outputs:
            was, becomes, is_ = part(begin, out), part(end, out), part(now, out)
            if is_ not in (was, becomes) and not work.between(is_):
                raise Lost(f"{work.name}: {out} is neither old nor new: {_difference(becomes, is_)}")
            for tree in (was, becomes, is_):
                for path in tree:
                    begin, end, now = ({k: v for k, v in t.items() if k != path} for t in (begin, end, now))
        if begin != now:
            raise Lost(f"{work.name}: others' files: {_difference(begin, now)}")


def _difference(one: Tree, other: Tree) -> str:
    paths = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    return "; ".join(f"{path}: {one.get(path)} → {other.get(path)}" for path in paths[:5])


@contextlib.contextmanager
def ground(folder: Path | None = None, fault: str | None = None) -> Iterator[Ground]:
    """A ground in a folder of its own. Everything is imported before the first fork; MLX computes in children only."""
    import huggingface_hub  # noqa: F401
    import rich.progress  # noqa: F401

    import mlx_codellama.api
    import mlx_codellama.cli.complete
    import mlx_codellama.cli.convert
    import mlx_codellama.cli.group
    import mlx_codellama.cli.infill
    import mlx_codellama.cli.quantize
    import mlx_codellama.cli.train
    import mlx_codellama.convert.verify
    import mlx_codellama.quant.pipeline
    import mlx_codellama.train.demo  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="killing-", dir=folder) as made:
        yield Ground(Path(os.path.realpath(made)), fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", help="a part of the name of what is run")
    parser.add_argument("--fault", choices=FAULTS, help="put this fault in first; it must be found")
    parser.add_argument("--folder", type=Path, default=RAM_DISK, help="where; a disk is slower  [default: a RAM disk]")
    options = parser.parse_args()
    works = [work for work in WORKS if not options.only or options.only in work.name]
    kills: Counter[str] = Counter()
    lost = rounds = 0
    with ground(options.folder, options.fault) as at:
        while kills.total() < options.kills:
            work = works[rounds % len(works)]
            seed = f"{options.seed} {rounds}"
            rounds += 1
            try:
                kills[work.name] += at.round(work, random.Random(seed))
            except Lost as error:
                lost += 1
                print(f"LOST in round {seed!r}: {error}", flush=True)
                if lost == 20 or options.fault:
                    break
            if rounds % 100 == 0:
                print(f"{kills.total()} kills in {rounds} rounds, {lost} faults", flush=True)
    for name, count in kills.items():
        print(f"{count:6} {name}")
    print(f"{kills.total()} kills in {rounds} rounds: {lost} faults")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
