"""Small models and a small tokenizer for tests of generation: one truly computes, one says what it is told to say."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
from oracles.meta_reference import Geometry, hf_config, random_weights
from oracles.mlx_models import our_model

from mlx_codellama.api import CodeLlama
from mlx_codellama.cache import Span
from mlx_codellama.config import ModelArgs
from mlx_codellama.model import Model
from mlx_codellama.tokenizer import Tokenizer, train_tokenizer

# Two layers, so that a wrong cache of one is not repaired by the other; pairwise different dimensions.
GEOMETRY = Geometry(dim=48, n_layers=2, n_heads=6, n_kv_heads=3, ffn_dim=80, vocab_size=416)  # the tokenizer's
CONTEXT = 512  # tokens, of every stand-in


@functools.lru_cache
def tiny_model(seed: int = 5) -> Model:
    """Random float32 weights with activations of order one: its answer depends on every token of the prompt."""
    return our_model(random_weights(GEOMETRY, seed=seed), GEOMETRY)


@functools.lru_cache
def tiny_tokenizer(infill: bool = True, step: bool = False) -> Tokenizer:
    """400 pieces learned from this file, 416 with those for infilling. Rare characters come as byte pieces."""
    from mlx_codellama.tokenizer import with_infill_pieces

    text = Path(__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        plain = train_tokenizer([text], Path(folder) / "tokenizer.model", vocab_size=400, infill=False)
    return Tokenizer(with_infill_pieces(plain.model_bytes, step=step)) if infill else plain


def tiny_codellama(**options: int) -> CodeLlama:
    """A fresh CodeLlama around the shared random model."""
    return CodeLlama(tiny_model(), tiny_tokenizer(), **options)


class ScriptedModel:
    """Stands in for Model: after the token at position p - 1 it predicts script[p], with all its weight.

    script  position → id; positions not in it predict id 0. `on_call(offset, length)` sees every forward pass.
    """

    def __init__(self, script: Mapping[int, int], *, vocab_size: int = 416, context: int = CONTEXT) -> None:
        config = hf_config(GEOMETRY, max_position_embeddings=context)
        self.args = ModelArgs.from_dict(config | {"vocab_size": vocab_size, "num_hidden_layers": 1})
        self.script = dict(script)
        self.on_call: Callable[[int, int], None] = lambda offset, length: None
        self.read: list[int] = []  # ids as they were fed, cache position by cache position

    def hidden(self, ids: mx.array, spans: Sequence[Span], *, prompt: bool = True) -> mx.array:
        """Of one sequence. → the logits themselves, which `head` gives back."""
        ((sequence, length),) = spans
        assert sequence is not None
        assert ids.shape == (1, length)
        offset = sequence.offset
        self.on_call(offset, length)
        self.read[offset:] = ids[0].tolist()
        tail = sequence.layer(0).tail
        tail.write(tail.encoding.encode(mx.zeros((1, 1, length, 2)), mx.zeros((1, 1, length, 2))))
        sequence.advance(length)
        positions = range(offset + 1, offset + length + 1)
        rows = [mx.arange(self.args.vocab_size) == self.script.get(p, 0) for p in positions]
        return mx.stack(rows)[None].astype(mx.float32) * 20

    def head(self, x: mx.array, *, prompt: bool = False) -> mx.array:
        return x

    def __call__(self, ids: mx.array, spans: Sequence[Span], *, prompt: bool = True) -> mx.array:
        return self.head(self.hidden(ids, spans, prompt=prompt), prompt=prompt)


def saying(tokenizer: Tokenizer, ids: Sequence[int], *, after: int) -> ScriptedModel:
    """A model that answers any prompt of `after` tokens with these ids, then repeats the end of sequence."""
    script = {after + n: id for n, id in enumerate(ids)}
    script |= dict.fromkeys(range(after + len(ids), CONTEXT + 1), tokenizer.eos_id)
    return ScriptedModel(script)
