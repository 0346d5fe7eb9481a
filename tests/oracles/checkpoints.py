"""Tiny random models in every layout that convert reads, from the same bits (numpy only, but for `write_mlx`).

Names of Meta's tensors, merge axes and the rotary order are written down here a second time, on purpose: a slip in
convert/ is not copied.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from oracles.torch_files import Stored, write_torch

from mlx_codellama.config import ModelArgs, Quantization

Weights = dict[str, Stored]

ST_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def tiny_args(*, gqa: bool = True, n_layers: int = 3, vocab_size: int = 0, dtype: str = "bfloat16") -> ModelArgs:
    """A model whose dimensions are pairwise different and divide over 1, 2, 4 and 8 shards."""
    h, k, e, f, v = (16, 8, 96, 288, 272) if gqa else (8, 8, 160, 448, 296)
    return ModelArgs(
        hidden_size=e,
        num_hidden_layers=n_layers,
        num_attention_heads=h,
        num_key_value_heads=k,
        intermediate_size=f,
        vocab_size=vocab_size or v,
        rope_theta=1e6,
        max_position_embeddings=16384,
        dtype=dtype,
    )


def random_weights(args: ModelArgs, *, seed: int = 0) -> Weights:
    """Every tensor under its Hugging Face name, as bits of args.dtype."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in args.tensor_shapes().items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05) + np.float32(len(shape) == 1)
        weights[name] = Stored(args.dtype, to_bits(values, args.dtype))
    return weights


def to_bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """float32 → the storage form of Stored: uint16 for bfloat16 (round half up in the last bit), else numpy's dtype."""
    if dtype == "bfloat16":
        return ((values.astype(np.float32).view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def to_float32(tensor: Stored) -> NDArray[np.float32]:
    if tensor.dtype == "bfloat16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return tensor.data.astype(np.float32)


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer_bytes(vocab_size: int) -> bytes:
    """A SentencePiece BPE model of exactly vocab_size (at least 260) pieces: specials, bytes, then letters.

    The last pieces are the 16 of infilling where there is room for them after one letter.
    """

    def field(number: int, wire: int, body: bytes) -> bytes:
        return varint(number << 3 | wire) + (varint(len(body)) if wire == 2 else b"") + body

    def varint(n: int) -> bytes:
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(
            1, 2, field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))
        )

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    n_letters = vocab_size - len(pieces)
    assert n_letters >= 1
    pieces += [("▁", 1), *((chr(0x61 + i) if i < 26 else chr(0x4E00 + i), 1) for i in range(n_letters - 1))]
    model = b"".join(piece(text, float(-i) if kind == 1 else 0.0, kind) for i, (text, kind) in enumerate(pieces))
    trainer = field(3, 0, varint(2)) + field(4, 0, varint(vocab_size)) + field(35, 0, varint(1))
    normalizer = field(1, 2, b"identity") + field(3, 0, varint(1)) + field(4, 0, varint(0)) + field(5, 0, varint(1))
    return model + field(2, 2, trainer) + field(3, 2, normalizer)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes(vocab_size))


# ── Hugging Face ────────────────────────────────────────────────────────────────────────────────────────────────────


def safetensors_bytes(tensors: Mapping[str, Stored]) -> bytes:
    """A safetensors file, tensors in the given order."""
    header, end, data = {}, 0, []
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor.data).tobytes()
        header[name] = {
            "dtype": ST_DTYPE[tensor.dtype],
            "shape": list(tensor.data.shape),
            "data_offsets": [end, end + len(raw)],
        }
        end += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def write_hf(
    folder: Path,
    args: ModelArgs,
    weights: Weights,
    *,
    shards: int = 1,
    kind: str = "safetensors",
    buffers: bool = False,
) -> Path:
    """config.json, tokenizer.model and the weights.

    kind     "safetensors" or "bin"
    buffers  add inv_freq, as old files do
    """
    folder.mkdir(parents=True)
    config = {**args.to_dict(), "transformers_version": "4.33.0", "use_cache": True, "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, args.vocab_size)
    if buffers:
        inverse = (1e6 ** (-np.arange(0, args.head_dim, 2) / args.head_dim)).astype(np.float32)
        weights = weights | {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": Stored("float32", inverse)
            for i in range(args.num_hidden_layers)
        }
    # Alphabetical, as transformers writes them: another order than ours.
    names = sorted(weights)
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    groups = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    listed = {}
    for i, group in enumerate(groups, 1):
        name = f"{stem}.{end}" if shards == 1 else f"{stem}-{i:05d}-of-{shards:05d}.{end}"
        part = {n: weights[n] for n in group}
        if kind == "safetensors":
            (folder / name).write_bytes(safetensors_bytes(part))
        else:
            write_torch(folder / name, part, root=Path(name).stem, zip64=i % 2 == 1, parameters=i % 2 == 0)
        listed |= dict.fromkeys(group, name)
    if shards > 1:
        index = {"metadata": {"total_size": sum(w.data.nbytes for w in weights.values())}, "weight_map": listed}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


# ── Meta ────────────────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = ("wo", "w2", "tok_embeddings")  # joined along axis 1; norms are whole in every shard; the rest along axis 0
META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "layers.",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def meta_name(name: str) -> str:
    for ours, meta in META_NAMES.items():
        name = name.replace(ours, meta)
    return name


def to_pairs(data: NDArray[np.generic], head_dim: int) -> NDArray[np.generic]:
    """Rows of every head from rotary halves to Meta's pairs, one row at a time: row j·D/2 + i goes to 2i + j."""
    out = np.empty_like(data)
    half = head_dim // 2
    for row in range(len(data)):
        head, inside = divmod(row, head_dim)
        j, i = divmod(inside, half)
        out[head * head_dim + 2 * i + j] = data[row]
    return out


def meta_shards(args: ModelArgs, weights: Weights, shards: int) -> list[Weights]:
    """Each rank's tensors under Meta's names, with the rope buffer that is to be ignored."""
    ranks: list[Weights] = [{} for _ in range(shards)]
    for name, tensor in weights.items():
        data, meta = tensor.data, meta_name(name)
        if ".wq." in meta or ".wk." in meta:
            data = to_pairs(data, args.head_dim)
        if data.ndim == 1:
            parts = [data.copy() for _ in range(shards)]
        else:
            parts = np.split(data, shards, axis=1 if any(f"{c}.weight" in meta for c in COLUMNS) else 0)
        for rank, part in zip(ranks, parts, strict=True):
            rank[meta] = Stored(tensor.dtype, np.ascontiguousarray(part))
    for rank in ranks:
        rank["rope.freqs"] = Stored("float32", np.ones(args.head_dim // 2, np.float32))
    return ranks


def meta_params(args: ModelArgs) -> dict[str, object]:
    params: dict[str, object] = {
        "dim": args.hidden_size,
        "n_layers": args.num_hidden_layers,
        "n_heads": args.num_attention_heads,
        "multiple_of": {288: 96, 448: 64}[args.intermediate_size],  # by Meta's rule, see tiny_args
        "ffn_dim_multiplier": 1.0,
        "norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
    }
    if args.num_key_value_heads != args.num_attention_heads:
        params["n_kv_heads"] = args.num_key_value_heads
    return params


def write_meta(folder: Path, args: ModelArgs, weights: Weights, *, shards: int = 1) -> Path:
    """consolidated.NN.pth, params.json and tokenizer.model."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(meta_params(args)))
    write_tokenizer(folder, args.vocab_size)
    for i, rank in enumerate(meta_shards(args, weights, shards)):
        # Meta's own files are plain dicts, from a torch that wrote no byte order.
        write_torch(folder / f"consolidated.{i:02d}.pth", rank, root="consolidated", byteorder=None, ordered=False)
    return folder


def write_npz(folder: Path, args: ModelArgs, weights: Weights, quantization: Quantization | None = None) -> Path:
    """weights.npz and config.json as mlx-examples' converter wrote them: float16 or float32."""
    folder.mkdir(parents=True)
    config = {**meta_params(args), "model_type": "llama"}
    arrays = {name: tensor.data for name, tensor in meta_shards(args, weights, 1)[0].items() if name != "rope.freqs"}
    if quantization is None:
        np.savez(folder / "weights.npz", **arrays)
    else:
        import mlx.core as mx

        config["quantization"] = {"group_size": quantization.default.group_size, "bits": quantization.default.bits}
        packed: dict[str, mx.array] = {}
        for name, data in arrays.items():
            if data.ndim == 1 or "tok_embeddings" in name:  # its quantised modules were the linear ones
                packed[name] = mx.array(data)
                continue
            parts = mx.quantize(mx.array(data), quantization.default.group_size, quantization.default.bits)
            path = name.removesuffix(".weight")
            packed |= dict(zip((f"{path}.{part}" for part in ("weight", "scales", "biases")), parts, strict=True))
        mx.savez(str(folder / "weights.npz"), **packed)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, args.vocab_size)
    return folder


# ── MLX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_mlx(folder: Path, args: ModelArgs, weights: Weights, quantization: Quantization) -> Path:
    """What mlx-lm's convert writes: MLX's own quantisation of whole tensors, saved by MLX."""
    import mlx.core as mx

    folder.mkdir(parents=True)
    arrays = {}
    for name, tensor in weights.items():
        array = mx.array(tensor.data)
        array = array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array
        path = name.removesuffix(".weight")
        quant = quantization.of(path) if array.ndim == 2 else None
        if quant is None:
            arrays[name] = array
        else:
            packed = mx.quantize(array, group_size=quant.group_size, bits=quant.bits, mode=quant.mode)
            arrays |= dict(zip((f"{path}.{part}" for part in ("weight", "scales", "biases")), packed, strict=False))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    config = replace(args, quantization=quantization).to_dict()
    config["quantization_config"] = config["quantization"]  # mlx-lm writes both
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, args.vocab_size)
    return folder
