"""`mlx-codellama inspect`: what a checkpoint is, from its config, its headers and its tokenizer alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from mlx_codellama.cli import options, output
from mlx_codellama.cli.write_checkpoint import note_left_aside

if TYPE_CHECKING:
    from mlx_codellama.config import ModelArgs
    from mlx_codellama.weights import TensorSpec


@click.command(name="inspect")
@click.argument("model", required=False, type=options.ModelName())
@click.option("--tensors", is_flag=True, help="List every tensor, not one line per kind.")
@options.json_option
def command(model: str | None, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint is, reading headers only.

    MODEL is a folder in any layout that `convert` reads, or a hub id; without it, the bundled demo. From a hub, only
    the headers of safetensors are fetched; .bin and .pth files have none, so they are fetched whole.
    """
    from mlx_codellama import convert
    from mlx_codellama.cli.checkpoint import name_of, outline_of
    from mlx_codellama.config import UNSTATED_THETA
    from mlx_codellama.errors import MissingThetaError
    from mlx_codellama.tokenizer import Tokenizer

    unstated: list[str] = []
    with outline_of(model) as folder:
        try:
            stream = convert.open(folder)
        except MissingThetaError as error:
            stream = convert.open(folder, rope_theta=UNSTATED_THETA)
            infers = (folder / "weights.npz").is_file() or not (folder / "config.json").is_file()
            unstated = ["rope_theta", "max_position_embeddings"] if infers else ["rope_theta"]
            output.note(f"{error}{', from which its context follows' if infers else ''}; {error.hint}")
        note_left_aside(stream)
        tokenizer = Tokenizer.load(stream.files.get("tokenizer.model", folder)).to_dict()
    args, specs = stream.args, stream.specs
    payload = sum(spec.nbytes for spec in specs)
    result: dict[str, Any] = {
        "model": name_of(model),
        "path": str(folder) if folder.exists() else None,
        "parameters": args.n_parameters,
        "bytes": payload,
        "bits_per_weight": round(8 * payload / args.n_parameters, 4),
        "config": args.to_dict() | dict.fromkeys(unstated),
        "tokenizer": tokenizer,
        "tensors": [
            {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype, "bytes": spec.nbytes} for spec in specs
        ],
        "can": _abilities(tokenizer),
    }
    if as_json:
        output.document(result)
    else:
        _show(result, args, specs, tensors)


def _abilities(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What the files allow. None of them says whether the model was tuned for dialogs."""
    return {
        "complete": True,
        "infill": bool(tokenizer["infill_ids"]),
        "chat_format": "source" if tokenizer["step_id"] is not None else "inst",
    }


def _show(result: dict[str, Any], args: ModelArgs, specs: list[TensorSpec], every: bool) -> None:
    size, name, path = output.bytes_text, result["model"], result["path"]
    rows = [
        ("model", name if path in (None, name) else f"{name} ({path})"),
        ("parameters", f"{args.n_parameters:,}"),
        ("size", f"{size(result['bytes'])}, {result['bits_per_weight']:.3f} bits per weight"),
        ("quantised", _quantisation(args)),
        ("layers", f"{args.num_hidden_layers}"),
        ("width", f"{args.hidden_size}, feed-forward {args.intermediate_size}"),
        ("heads", f"{args.num_attention_heads} query, {args.num_key_value_heads} key-value, {args.head_dim} wide"),
        ("vocabulary", f"{args.vocab_size:,}{', tied to the head' if args.tie_word_embeddings else ''}"),
        ("context", _context(result["config"], args)),
        ("KV cache", f"{size(args.kv_bytes_per_token)} per token at 16 bits"),
    ]
    tokenizer = result["tokenizer"]
    infill = tokenizer["infill_ids"]
    ids = ", ".join(f"{name.upper()} {id}" for name, id in infill.items()) if infill else "no infill pieces"
    step = f", step {tokenizer['step_id']}" if tokenizer["step_id"] is not None else ""
    space = "" if tokenizer["add_dummy_prefix"] else ", no dummy space"
    rows.append(("tokenizer", f"{tokenizer['vocab_size']:,} pieces, {ids}{step}{space}"))
    can = "complete, infill" if infill else "complete"
    rows.append(("can", f"{can}; dialogs in the {result['can']['chat_format']} form if it is an Instruct model"))
    output.data(output.pairs(rows))
    output.data("")
    listed = [(spec.name, " × ".join(map(str, spec.shape)), spec.dtype, size(spec.nbytes)) for spec in specs]
    if every:
        output.data(output.table(("tensor", "shape", "dtype", "size"), listed))
        return
    kinds: dict[tuple[str, str, str], tuple[int, int]] = {}
    for spec, (name, shape, dtype, _) in zip(specs, listed, strict=True):
        key = (re.sub(r"\.\d+\.", ".*.", name), shape, dtype)
        count, total = kinds.get(key, (0, 0))
        kinds[key] = (count + 1, total + spec.nbytes)
    lines = [(name, shape, dtype, n, size(total)) for (name, shape, dtype), (n, total) in kinds.items()]
    output.data(output.table(("tensor", "shape", "dtype", "n", "size"), lines))


def _context(config: dict[str, Any], args: ModelArgs) -> str:
    tokens = config["max_position_embeddings"]
    theta = "rope_theta is not stated" if config["rope_theta"] is None else f"rope_theta {args.rope_theta:g}"
    scaling = args.rope_scaling
    scaled = "" if scaling is None else f", positions scaled ({scaling.kind}, factor {scaling.factor:g})"
    return f"{'unknown' if tokens is None else f'{tokens:,} tokens'}, {theta}{scaled}"


def _quantisation(args: ModelArgs) -> str:
    if args.quantization is None:
        return f"no, {args.dtype}"
    default = args.quantization.default
    text = f"{default.bits} bits, groups of {default.group_size}, {default.mode}; the rest {args.dtype}"
    others = len(args.quantization.overrides)
    return text + (f"; {others} matrices otherwise" if others else "")
