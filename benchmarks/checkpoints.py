"""Random checkpoints of released geometries, in Hugging Face's and in Meta's layout, written at disk speed.

    python benchmarks/checkpoints.py hf   OUT 7b
    python benchmarks/checkpoints.py meta OUT 34b --shards 4 --sparse

Weights are seeded normal noise of standard deviation 0.02 in bfloat16, drawn once and reused at shifting offsets; norms
are one. `--sparse` leaves every matrix a hole in the file, which reads as zeros and takes no disk. Meta's files come
from torch.save itself (the `peers` extra), which reserves room for storages that are filled in afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_codellama.config import GEOMETRIES, ModelArgs
from mlx_codellama.tokenizer import with_infill_pieces

NOISE_ITEMS = 1 << 25  # bfloat16 numbers in the noise buffer
SHARD_BYTES = 5 << 30
ONE = 0x3F80  # 1.0 in bfloat16


class Noise:
    """An endless supply of seeded bfloat16 noise."""

    def __init__(self, seed: int = 0) -> None:
        normal = np.random.default_rng(seed).standard_normal(NOISE_ITEMS, np.float32) * np.float32(0.02)
        self._items = (normal.view(np.uint32) >> 16).astype(np.uint16)
        self._at = 0

    def write(self, file: BinaryIO, count: int) -> None:
        """Write the next `count` numbers."""
        while count:
            part = self._items[self._at : self._at + count]
            file.write(part.data)
            count -= len(part)
            # Start the next round elsewhere, so that rows of different tensors do not repeat in step.
            self._at = (self._at + len(part) + 12_345) % NOISE_ITEMS


def tokenizer_of(args: ModelArgs, llama: Path) -> bytes:
    """Llama 2's tokenizer, with the infill pieces where the model has rows for them."""
    data = llama.read_bytes()
    return with_infill_pieces(data) if args.vocab_size >= 32016 else data


def write_hf(out: Path, args: ModelArgs, tokenizer: Path, *, sparse: bool = False) -> None:
    """config.json, sharded safetensors with an index, and the tokenizer."""
    out.mkdir(parents=True)
    config = args.to_dict()
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "tokenizer.model").write_bytes(tokenizer_of(args, tokenizer))
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}), encoding="utf-8")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in args.tensor_shapes().items():
        size = 2 * math.prod(shape)
        if held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    noise = Noise()
    index = {}
    for i, tensors in enumerate(shards, 1):
        path = out / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in tensors.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            index[name] = path.name
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for shape in tensors.values():
                _fill(file, file.tell(), shape, noise, sparse)
            file.truncate(8 + len(text) + at)
            os.fsync(file.fileno())
    text = json.dumps({"metadata": {}, "weight_map": index})
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def meta_shapes(args: ModelArgs, shards: int) -> dict[str, tuple[int, ...]]:
    """Meta's tensors as one of `shards` model-parallel ranks holds them, name → shape."""
    e, f, n = args.hidden_size, args.intermediate_size, shards
    q, kv = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, e // n), "norm.weight": (e,)}
    shapes["output.weight"] = (args.vocab_size // n, e)
    for i in range(args.num_hidden_layers):
        p = f"layers.{i}."
        shapes |= {
            p + "attention.wq.weight": (q // n, e),
            p + "attention.wk.weight": (kv // n, e),
            p + "attention.wv.weight": (kv // n, e),
            p + "attention.wo.weight": (e, q // n),
            p + "feed_forward.w1.weight": (f // n, e),
            p + "feed_forward.w2.weight": (e, f // n),
            p + "feed_forward.w3.weight": (f // n, e),
            p + "attention_norm.weight": (e,),
            p + "ffn_norm.weight": (e,),
        }
    return shapes


def write_meta(out: Path, args: ModelArgs, tokenizer: Path, *, shards: int, sparse: bool = False) -> None:
    """params.json, consolidated.NN.pth and tokenizer.model."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    out.mkdir(parents=True)
    params = {
        "dim": args.hidden_size,
        "n_layers": args.num_hidden_layers,
        "n_heads": args.num_attention_heads,
        "multiple_of": 4096 if args.intermediate_size == 28672 else 256,  # 70B follows Llama 2's 70B
        "ffn_dim_multiplier": 1.3 if args.intermediate_size == 28672 else 1.0,
        "norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
    }
    if args.num_key_value_heads != args.num_attention_heads:
        params["n_kv_heads"] = args.num_key_value_heads
    (out / "params.json").write_text(json.dumps(params), encoding="utf-8")
    (out / "tokenizer.model").write_bytes(tokenizer_of(args, tokenizer))
    noise, shapes = Noise(), meta_shapes(args, shards)
    for rank in range(shards):
        path = out / f"consolidated.{rank:02d}.pth"
        with FakeTensorMode():
            tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tensors, path)
        starts = _storage_offsets(path)
        with path.open("r+b") as file:
            for key, shape in enumerate(shapes.values()):
                _fill(file, starts[str(key)], shape, noise, sparse)
            os.fsync(file.fileno())


def _storage_offsets(path: Path) -> dict[str, int]:
    """Where the bytes of each storage of a torch file begin, by its number."""
    starts = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            folder, _, key = entry.filename.rpartition("/")
            if folder.endswith("/data"):
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                starts[key] = entry.header_offset + 30 + name + extra
    return starts


def _fill(file: BinaryIO, start: int, shape: tuple[int, ...], noise: Noise, sparse: bool) -> None:
    file.seek(start)
    if len(shape) == 1:
        file.write(np.full(shape, ONE, np.uint16).data)
    elif sparse:
        file.seek(start + 2 * math.prod(shape))
    else:
        noise.write(file, math.prod(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=["hf", "meta"])
    parser.add_argument("out", type=Path)
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama 2's tokenizer.model (32,000 pieces)")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--sparse", action="store_true")
    options = parser.parse_args()
    args = GEOMETRIES[options.geometry]
    if options.layout == "hf":
        write_hf(options.out, args, options.tokenizer, sparse=options.sparse)
    else:
        write_meta(options.out, args, options.tokenizer, shards=options.shards, sparse=options.sparse)


if __name__ == "__main__":
    sys.exit(main())
