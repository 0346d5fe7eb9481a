"""The recipe of the bundled demo checkpoint: Code Llama's shape and conventions, at six million parameters.

Data: the Python sources of a standard library. Held out: one file in fifty, whole. Tokenizer: SentencePiece BPE of
4096 pieces made from the training files, with Code Llama's infilling pieces. `mlx-codellama train` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_codellama.config import ModelArgs
from mlx_codellama.tokenizer import Tokenizer, train_tokenizer
from mlx_codellama.train.corpus import Corpus, Document, read_corpus, windows
from mlx_codellama.train.export import ModelStream
from mlx_codellama.train.infilling import document_ids
from mlx_codellama.train.packing import Batch, pack
from mlx_codellama.train.trainer import Report, TrainArgs, Trainer, initialise, run
from mlx_codellama.weights import save

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


# A step reads ROWS rows of LENGTH tokens, packed with documents.
ROWS, LENGTH = 8, 512


class Stage(NamedTuple):
    """From this step on, documents have shortest to longest characters."""

    begins: int
    shortest: int
    longest: int


# Long documents teach the language; shorter ones show twice as often how a middle begins and where it ends.
STAGES = (Stage(0, 32, 1400), Stage(3421, 24, 700))
_HELD_OUT = 1 << 32  # step numbers from here on draw the held-out batches


@dataclass(frozen=True)
class DemoRun:
    """Everything a run needs, made from a folder of sources and the training arguments."""

    corpus: Corpus
    tokenizer: Tokenizer
    args: TrainArgs

    def batch(self, documents: tuple[Document, ...], step: int) -> Batch:
        """The batch of one step: a function of the seed and the step alone."""
        rng = np.random.default_rng([self.args.seed, step])
        stage = next(s for s in reversed(STAGES) if s.begins <= step)
        pieces = windows(documents, rng, shortest=stage.shortest, longest=stage.longest)
        ids = (document_ids(self.tokenizer, text, rng, ends=ends) for text, ends in pieces)
        return pack(ids, rows=ROWS, length=LENGTH)

    def held_out(self, n: int = 8) -> list[Batch]:
        return [self.batch(self.corpus.held_out, _HELD_OUT + i) for i in range(n)]


def corpus_of(sources: Path) -> Corpus:
    """The recipe's corpus from a folder such as `sysconfig.get_path("stdlib")`."""
    return read_corpus(sources, exclude=EXCLUDE, lighter=LIGHTER)


def prepare(sources: Path, out: Path, args: TrainArgs) -> DemoRun:
    """Read the corpus; train the tokenizer, or take the one that an earlier start of this run left in `out`."""
    corpus = corpus_of(sources)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.model"
    if not path.exists():
        heavy = [d.text for d in corpus.train if d.weight == 1.0]
        train_tokenizer(heavy, path, vocab_size=MODEL.vocab_size)
    return DemoRun(corpus, Tokenizer.load(path), args)


def train_demo(
    sources: Path,
    out: Path,
    args: TrainArgs,
    *,
    on_report: Callable[[Report], None],
    cancel: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Train, or go on training, in the folder `out`: tokenizer.model, state.safetensors, log.jsonl (Reports)."""
    demo = prepare(sources, out, args)
    data = demo.corpus.digest
    trainer = Trainer(
        initialise(MODEL, seed=args.seed), args, lambda step: demo.batch(demo.corpus.train, step), data=data
    )
    state = out / "state.safetensors"
    if state.exists():
        trainer.resume(state)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:

        def report(line: Report) -> None:
            log.write(json.dumps({k: v for k, v in asdict(line).items() if v is not None}) + "\n")
            log.flush()
            on_report(line)

        run(trainer, held_out=demo.held_out(), state_path=state, on_report=report, cancel=cancel)
    return trainer


def export(trainer: Trainer, out: Path, *, overwrite: bool = False) -> Path:
    """Write the trained model as a float16 checkpoint to `out`/model, with the run's arguments in its run.json."""
    record = {"trained": {"step": trainer.step, "tokens": trainer.tokens, "data": trainer.data, **asdict(trainer.args)}}
    files = {"tokenizer.model": out / "tokenizer.model"}
    stream = ModelStream(trainer.model, dtype="float16", files=files, record=record)
    return save(out / "model", stream, overwrite=overwrite)
