"""The recipe of the bundled demo checkpoint: Code Llama's architecture and conventions, with 6.5 million parameters.

Data: the Python sources of a standard library. Held out: one file in fifty, whole. Tokenizer: SentencePiece BPE of
4096 pieces made from the training files, with Code Llama's infilling pieces. `mlx-codellama train` runs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from mlx_codellama.config import ModelArgs
from mlx_codellama.errors import CheckpointError, OutputExistsError
from mlx_codellama.staging import alone_in, is_staged, open_own, ordinary, write_file, writing
from mlx_codellama.tokenizer import Tokenizer, train_tokenizer
from mlx_codellama.train.corpus import Corpus, Document, read_corpus, windows
from mlx_codellama.train.export import ModelStream
from mlx_codellama.train.infilling import document_ids
from mlx_codellama.train.packing import Batch, pack
from mlx_codellama.train.trainer import Report, TrainArgs, Trainer, initialise, run
from mlx_codellama.weights import read_run, refuse_existing, run_text, save

MARK = "train.json"  # marks the folder of a run
TOOL = "mlx-codellama train"
MODEL = ModelArgs(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=704,
    vocab_size=4096,
    rope_theta=10000.0,
    max_position_embeddings=512,
    head_dim=32,
    dtype="float32",
)
EXCLUDE = ("site-packages", "encodings", "pydoc_data", "__pycache__", "data", "bad_coding", "tests_data")
LIGHTER = ("test", "tests", "idle_test")


# Tokens per step. Documents are cut into pieces of at most LONGEST.
TOKENS, LONGEST = 4096, 512


class Stage(NamedTuple):
    """From this step on, documents have shortest to longest characters."""

    begins: int
    shortest: int
    longest: int


# Long documents teach the language. Shorter ones contain twice as many beginnings and ends of middles.
STAGES = (Stage(0, 32, 1400), Stage(3421, 24, 700))
_HELD_OUT = 1 << 32  # step numbers from here on give the held-out batches


@dataclass(frozen=True)
class DemoRun:
    """Everything a run needs, made from a folder of sources and the training arguments."""

    corpus: Corpus
    tokenizer: Tokenizer
    args: TrainArgs

    def batch(self, documents: tuple[Document, ...], step: int) -> Batch:
        """The batch of one step. It depends only on the seed and the step."""
        rng = np.random.default_rng([self.args.seed, step])
        stage = next(s for s in reversed(STAGES) if s.begins <= step)
        pieces = windows(documents, rng, shortest=stage.shortest, longest=stage.longest)
        ids = (document_ids(self.tokenizer, text, rng, ends=ends) for text, ends in pieces)
        return pack(ids, n_tokens=TOKENS, longest=LONGEST)

    def held_out(self, n: int = 8) -> list[Batch]:
        return [self.batch(self.corpus.held_out, _HELD_OUT + i) for i in range(n)]


def corpus_of(sources: Path) -> Corpus:
    """The recipe's corpus from a folder such as `sysconfig.get_path("stdlib")`."""
    return read_corpus(sources, exclude=EXCLUDE, lighter=LIGHTER)


def prepare(sources: Path, out: Path, args: TrainArgs) -> DemoRun:
    """Read the corpus. Train the tokenizer, or load it if an earlier start of this run left it in `out`.

    `out` must be new, empty, or marked by this function as the folder of a run (train.json). Any other folder raises
    OutputExistsError. Also raises OutputError.
    """
    about = _about(out)
    corpus = corpus_of(sources)
    if not about:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        about = _about(out) or {"tool": TOOL, "recipe": "demo"}
        write_file(out / MARK, run_text(about).encode())
    _check_model(out / "model", corpus.digest, args)
    path = out / "tokenizer.model"
    if not os.path.lexists(path):
        heavy = [d.text for d in corpus.train if d.weight == 1.0]
        tokenizer = train_tokenizer(heavy, None, vocab_size=MODEL.vocab_size)
        about["tokenizer_sha256"] = hashlib.sha256(tokenizer.model_bytes).hexdigest()
        write_file(out / MARK, run_text(about).encode())  # first: it makes the tokenizer the run's own
        write_file(path, tokenizer.model_bytes, new=True)
    tokenizer = Tokenizer.load(ordinary(path))
    if hashlib.sha256(tokenizer.model_bytes).hexdigest() != about.get("tokenizer_sha256"):
        raise CheckpointError(f"{path} is not the tokenizer that this run made", hint="name a new folder")
    if tokenizer.vocab_size != MODEL.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} pieces, the model has {MODEL.vocab_size}", hint="name a new folder"
        )
    return DemoRun(corpus, tokenizer, args)


def _about(out: Path) -> dict[str, Any]:
    """The contents of a run's train.json; {} for a folder that is absent or empty.

    Raises OutputExistsError for any other.
    """
    about = read_run(out, MARK) if out.is_dir() else {}
    if about.get("tool") == TOOL:
        return about
    there = sorted(path.name for path in out.iterdir() if not is_staged(path)) if out.is_dir() else []
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise OutputExistsError(
            f"{out} was not made by train; it holds {', '.join(map(repr, there[:3]))}{more}",
            hint="name a new or an empty folder",
        )
    return {}


def _check_model(model: Path, data: str, args: TrainArgs) -> None:
    """Raise OutputExistsError if `export` would replace a model of another run."""
    if not os.path.lexists(model):
        return
    refuse_existing(model, overwrite=True)
    trained = read_run(model).get("source", {}).get("trained", {})
    if (trained.get("data"), trained.get("seed")) != (data, args.seed):
        raise OutputExistsError(f"{model} is a model that this run did not make", hint="name a new folder")


def train_demo(
    sources: Path,
    out: Path,
    args: TrainArgs,
    *,
    on_report: Callable[[Report], None],
    cancel: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Start or resume training in the folder `out`: tokenizer.model, state.safetensors, log.jsonl (Reports).

    Raises like `prepare`, and OutputError if another process is training there.
    """
    demo = prepare(sources, out, args)
    with alone_in(out):
        return _train(demo, out, on_report=on_report, cancel=cancel)


def _train(demo: DemoRun, out: Path, *, on_report: Callable[[Report], None], cancel: Callable[[], bool]) -> Trainer:
    args, data = demo.args, demo.corpus.digest
    trainer = Trainer(
        initialise(MODEL, seed=args.seed), args, lambda step: demo.batch(demo.corpus.train, step), data=data
    )
    state = out / "state.safetensors"
    if ordinary(state).exists():
        trainer.resume(state)
    with _log(out / "log.jsonl", trainer.step) as log:

        def report(line: Report) -> None:
            log.write(json.dumps({k: v for k, v in asdict(line).items() if v is not None}) + "\n")
            log.flush()
            on_report(line)

        run(trainer, held_out=demo.held_out(), state_path=state, on_report=report, cancel=cancel)
    return trainer


def _log(path: Path, step: int) -> TextIO:
    """Open the run's log for appending. Entries after this step, which a killed run left, are dropped: they repeat.

    Raises OutputError.
    """
    log = os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "a+", encoding="utf-8", errors="surrogateescape")
    log.seek(0)
    lines = log.readlines()
    kept = "".join(line for line in lines if _step_of(line) <= step)
    if kept and not kept.endswith("\n"):
        kept += "\n"
    if kept != "".join(lines):
        log.close()
        write_file(path, kept.encode("utf-8", "surrogateescape"))
        return _log(path, step)
    return log


def _step_of(line: str) -> float:
    """The step that a line of the log reports; infinite if the line is cut off, negative if it is no report."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf if line.startswith("{") and not line.endswith("\n") else -math.inf


def export(trainer: Trainer, out: Path, *, overwrite: bool = False) -> Path:
    """Write the trained model as a float16 checkpoint to `out`/model, with the run's arguments in run.json."""
    if overwrite:
        _check_model(out / "model", trainer.data, trainer.args)
    record = {"trained": {"step": trainer.step, "tokens": trainer.tokens, "data": trainer.data, **asdict(trainer.args)}}
    files = {"tokenizer.model": out / "tokenizer.model"}
    stream = ModelStream(trainer.model, dtype="float16", files=files, record=record)
    return save(out / "model", stream, overwrite=overwrite)
