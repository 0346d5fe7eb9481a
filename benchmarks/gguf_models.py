"""GGUF files with random Q4_0 weights at a known geometry, for llama.cpp as a peer. Needs the `gguf` package.

python benchmarks/gguf_models.py 1.1b out.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlx_codellama.config import GEOMETRIES, ModelArgs

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 step, then 32 codes of 4 bits


def write(path: Path, args: ModelArgs, *, layers: int | None = None, context: int = 131072) -> Path:
    """Write a model without a vocabulary; `layers` keeps that many blocks only. Existing files are left alone."""
    if path.exists():
        return path
    import gguf

    n_layers = layers or args.num_hidden_layers
    rng = np.random.default_rng(0)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    kv = args.num_key_value_heads * args.head_dim
    wide, inner = args.hidden_size, args.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (args.vocab_size, wide)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}.weight": (wide,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_q": (args.num_attention_heads * args.head_dim, wide),
                "attn_k": (kv, wide),
                "attn_v": (kv, wide),
                "attn_output": (wide, args.num_attention_heads * args.head_dim),
                "ffn_gate": (inner, wide),
                "ffn_up": (inner, wide),
                "ffn_down": (wide, inner),
            }.items()
        }
    shapes |= {"output_norm.weight": (wide,), "output.weight": (args.vocab_size, wide)}
    q4 = gguf.GGMLQuantizationType.Q4_0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else _blocks(rng, *shape))
    writer.close()
    unfinished.rename(path)
    return path


def _blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random codes with a step that gives weights of standard deviation 0.02, as our random models have."""
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    step = np.array([0.02 * 12**0.5 / 16], np.float16).view(np.uint8)
    blocks[:, :, :2] = step
    return blocks.reshape(rows, columns // BLOCK * BLOCK_BYTES)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: gguf_models.py GEOMETRY FILE")
    write(Path(sys.argv[2]), GEOMETRIES[sys.argv[1]])
