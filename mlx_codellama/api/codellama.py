"""A loaded model that completes, infills and chats."""

from __future__ import annotations

import copy
import gc
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_codellama.api.arguments import (
    Options,
    callback,
    cancel_check,
    check_length,
    dialog,
    scalar,
    stop_texts,
    switch,
    text,
    token_ids,
    whole_number,
    with_options,
)
from mlx_codellama.api.results import Completion
from mlx_codellama.api.stopping import Continuation
from mlx_codellama.api.stream import ManyStreams, TextStream
from mlx_codellama.cache import make_sequence
from mlx_codellama.config import DEMO, MAX_TOKENS, MOST_TOKENS, ModelArgs, parameters_text
from mlx_codellama.engine import Engine, Request, check_context, check_ids, check_logprobs, read_logits
from mlx_codellama.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    NotSupported,
    PromptError,
    shown,
    system_errors,
)
from mlx_codellama.kernels.dispatch import KernelWarning
from mlx_codellama.loader import load_model
from mlx_codellama.lookup import Lookup
from mlx_codellama.model import Model
from mlx_codellama.placement import Placement, place
from mlx_codellama.prompts import chat_ids, infill_ids, parse_literal_infill, prompt_ids, stop_ids
from mlx_codellama.rotary import RopeScaling
from mlx_codellama.sampling import SamplingParams
from mlx_codellama.snapshot import load_cache, save_cache
from mlx_codellama.storage import SINKS, KVBits, KVStorage
from mlx_codellama.tokenizer import Tokenizer
from mlx_codellama.weights import Checkpoint

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CodeLlama:
    """A model with its tokenizer. Safe to use from several threads: concurrent calls are computed together.

    A call takes over what its prompt shares with earlier calls. `forget` frees that memory.

    max_tokens, in every call: the most tokens to generate. Prompt and max_tokens must fit max_context, or
    ContextOverflowError says what they sum to. 0 only reads the prompt. Default: 128, of `chat` 512, or what is left of
    the context.

    `close`, or the end of a `with` block, frees the weights and the cache.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        path: Path | None = None,
        max_context: int | None = None,
        prefill_chunk: int | None = None,
        lookup: bool = False,
        storage: KVStorage | None = None,
        placement: Placement | None = None,
    ) -> None:
        """max_context in tokens: default what the model was trained to read, more on the caller's own account.

        lookup     for calls that do not say
        storage    of keys and values; default: the placement's, else all of them, in the activations' dtype
        placement  asked before each call for the memory it takes; None for no limit
        """
        if max_context is not None and not 1 <= max_context <= MOST_TOKENS:
            raise ConfigError(f"max_context is {shown(max_context)}; expected 1 to {MOST_TOKENS:,} tokens")
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self.max_context = max_context or model.args.max_position_embeddings
        self.lookup, self.placement = lookup, placement
        self.storage = storage or (placement.storage if placement else KVStorage())
        make_sequence(model.args, self.storage)  # says at once whether the model's heads can be stored so
        self._engine = Engine(model, self.storage, prefill_chunk=prefill_chunk, memory=placement)

    def __repr__(self) -> str:
        if "model" not in self.__dict__:
            return "<CodeLlama: closed>"
        name = "demo" if self.path == DEMO else str(self.path) if self.path is not None else "in memory"
        quant = self.args.quantization
        bits = f"{quant.default.bits} bits" if quant is not None else self.args.dtype
        size = parameters_text(self.args.n_parameters)
        return f"<CodeLlama {name!r}: {size} parameters, {bits}, {self.max_context} tokens of context>"

    def __enter__(self) -> CodeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the cache. Later calls raise NotSupported; closing again is harmless.

        A `fork` keeps the weights, which it shares, and an open stream keeps them until it ends.
        """
        if self.__dict__.pop("model", None) is not None:
            del self._engine
            gc.collect()
            mx.clear_cache()

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "_engine"):
            raise NotSupported("the model is closed", hint="load it again")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def args(self) -> ModelArgs:
        return self.model.args

    @property
    def prefill_chunk(self) -> int | None:
        """Prompt tokens per forward pass; None for what fits a memory budget."""
        return self._engine.prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, n_tokens: int | None) -> None:
        self._engine.prefill_chunk = n_tokens

    @property
    def can_infill(self) -> bool:
        return self.tokenizer.infill is not None

    @with_options
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        literal_infill: bool = False,
        infill_tags: bool = True,
        **options: Unpack[Options],
    ) -> Completion:
        """Continue a text, or ids that are the whole prompt. The text of the result keeps its leading spaces.

        literal_infill  a prompt written `<PRE> … <SUF>… <MID>` is an infill request; otherwise tags are plain text
        infill_tags     False leaves `<PRE>`, `<SUF>`, `<MID>` and `<EOT>` ids that the model writes by itself out of
                        the text, not out of the ids; otherwise they are text, as they are to Meta's decode
        Raises PromptError, ContextOverflowError, ConfigError; BackendError for logits that are not finite.
        """
        return self.stream_complete(
            prompt, max_tokens=max_tokens, literal_infill=literal_infill, infill_tags=infill_tags, **options
        ).drain()

    @with_options
    def stream_complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        literal_infill: bool = False,
        infill_tags: bool = True,
        **options: Unpack[Options],
    ) -> TextStream:
        """`complete`, piece by piece. Errors in the arguments are raised here, not at the first piece."""
        ids, kind = self._prompt_ids(prompt, literal_infill=literal_infill)
        hidden = () if infill_tags else self.tokenizer.infill or ()
        return self._stream(ids, kind, max_tokens, hidden=frozenset(hidden), **options)

    @with_options
    def complete_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        n: int = 1,
        max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> list[list[Completion]]:
        """Continue several prompts, n times each, side by side. → for each prompt its n Completions.

        A prompt is read once for all its samples, and what prompts begin with in common is read once, too. Sample i is
        what `complete` gives for its prompt with the seed + i.
        """
        return self.stream_many(prompts, n=n, max_tokens=max_tokens, **options).drain()

    @with_options
    def stream_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        n: int = 1,
        max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> ManyStreams:
        """`complete_many`, piece by piece: (number of the prompt, number of the sample, text)."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise TypeError("prompts is one text or no sequence; expected a list of texts, or of lists of token ids")
        if whole_number(n, "n") < 1:
            raise PromptError(f"n is {n}; expected at least 1 sample")
        streams = []
        for prompt in prompts:
            ids, _ = self._prompt_ids(prompt, literal_infill=False)
            streams.append(self._samples(ids, "complete", max_tokens, n, **options))
        return ManyStreams(self._engine, streams)

    @with_options
    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        order: str = "psm",
        max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """What belongs between prefix and suffix. order "psm" or "spm".

        Raises NotSupported on models without infilling; else as `complete`.
        """
        return self.stream_infill(prefix, suffix, order=order, max_tokens=max_tokens, **options).drain()

    @with_options
    def stream_infill(
        self,
        prefix: str,
        suffix: str,
        *,
        order: str = "psm",
        max_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """`infill`, piece by piece."""
        prefix, suffix = text(prefix, "prefix"), text(suffix, "suffix")
        check_length(self.tokenizer, self.max_context, prefix, suffix)
        ids = infill_ids(self.tokenizer, prefix, suffix, order=order)
        return self._stream(ids, "infill", max_tokens, **options)

    @with_options
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None, **options: Unpack[Options]
    ) -> Completion:
        """The assistant's next turn. messages: [{"role": "system" | "user" | "assistant", "content": text}, …].

        content may be a list of OpenAI's {"type": "text", "text": …} parts. Raises PromptError for any other; else as
        `complete`.
        """
        return self.stream_chat(messages, max_tokens=max_tokens, **options).drain()

    @with_options
    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None, **options: Unpack[Options]
    ) -> TextStream:
        """`chat`, piece by piece."""
        messages = dialog(messages)
        contents = (message.get("content") for message in messages)
        check_length(self.tokenizer, self.max_context, *(text for text in contents if isinstance(text, str)))
        ids = chat_ids(self.tokenizer, messages)
        return self._stream(ids, "chat", max_tokens, **options)

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Teacher-forced logits: float32 [len(ids), V], row i predicts what follows ids[i]. Uses a fresh cache.

        Raises PromptError, ContextOverflowError; MemoryBudgetError where the result, 4 · V bytes for each token, and
        what computing it takes are more than may be taken.
        """
        ids = token_ids(ids, "ids")
        check_ids(ids, self.args)
        check_context(len(ids), 0, self.max_context)
        with self._engine.owned():
            limit = None
            if self.placement is not None:
                limit = self.placement.check_call(len(ids), 0, self.prefill_chunk, every_logit=True)
            chunks = read_logits(
                self.model,
                ids,
                storage=self.storage,
                max_context=self.max_context,
                prefill_chunk=self.prefill_chunk,
                chunk_limit=limit,
            )
            result, done = np.empty((len(ids), self.args.vocab_size), np.float32), 0
            for chunk in chunks:
                result[done : done + chunk.shape[0]] = np.array(chunk, copy=False)
                done += chunk.shape[0]
                del chunk
            return result

    @property
    def cached_tokens(self) -> int:
        """Tokens of the sequence that the last call, or a loaded file, left; 0 without one."""
        idle = self._engine.idle_sequences
        return idle[-1].offset if idle else 0

    def save_cache(self, path: str | Path) -> int:
        """Write the keys and values that the last call left, so that another process need not read that prompt again.

        → tokens saved: all of the prompt, and of the answer what was read back. Raises CacheError where no call left
        any, OutputError where the file cannot be written; a file that was there is then kept.
        """
        with self._engine.owned():
            idle = self._engine.idle_sequences
            if not idle:
                raise CacheError("there is no cache to save", hint="read a prompt first; max_tokens=0 only reads")
            save_cache(Path(path), self.model, self.storage, idle[-1])
            return idle[-1].offset

    def load_cache(self, path: str | Path) -> int:
        """Go on from a saved cache: later calls take over what their prompts share with it. → tokens loaded.

        Raises CacheError for a damaged file and for one that another model, other bits, another window or another
        rotary setting made; MemoryBudgetError for one that is larger than what may be taken.
        """
        if self.placement is not None and Path(path).is_file():
            self.placement.check_file(Path(path))
        with self._engine.owned():
            sequence = load_cache(Path(path), self.model, self.storage)
        self._engine.keep(sequence)
        return sequence.offset

    def fork(self) -> CodeLlama:
        """A second conversation over the same model and engine: each finds what the other read.

        Nothing is copied: both share the keys and values they have in common.
        """
        with self._engine.owned():
            return copy.copy(self)

    def forget(self) -> None:
        """Free the keys and values that finished calls left, of forks too."""
        self._engine.forget()

    def _prompt_ids(self, prompt: str | Sequence[int], *, literal_infill: bool) -> tuple[list[int], str]:
        """The ids of a prompt, and whether it is one to "complete" or to "infill"."""
        if not isinstance(prompt, str):
            return token_ids(prompt, "prompt", or_text=True), "complete"
        check_length(self.tokenizer, self.max_context, prompt)
        ids = prompt_ids(self.tokenizer, prompt, literal_infill=literal_infill)
        literal = literal_infill and parse_literal_infill(prompt) is not None
        return ids, "infill" if literal else "complete"

    def _stop_ids(self, kind: str) -> frozenset[int]:
        """Meta's stop ids for this kind of prompt, and always the end of sequence: nothing sensible follows it."""
        stated = self.args.eos_token_id
        ends = {self.tokenizer.eos_id, *((stated,) if isinstance(stated, int) else stated)}
        return stop_ids(self.tokenizer, kind) | ends

    def _stream(self, ids: list[int], kind: str, max_tokens: int | None, **options: Any) -> TextStream:
        return self._samples(ids, kind, max_tokens, 1, **options)[0]

    def _samples(
        self,
        ids: list[int],
        kind: str,
        max_tokens: int | None,
        n: int,
        *,
        hidden: frozenset[int] = frozenset(),
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        lookup: bool | None = None,
        cancel: threading.Event | Callable[[], bool] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> list[TextStream]:
        """n samples of one prompt, with seeds that count up."""
        unknown = sampling.keys() - SamplingParams.__dataclass_fields__.keys()
        if unknown:
            raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
        check_ids(ids, self.args)
        if logprobs is not None:
            logprobs = whole_number(logprobs, "logprobs")
            check_logprobs(logprobs, self.args)
        stops, lookup = stop_texts(stop), switch(lookup, "lookup")
        params = SamplingParams(**{name: scalar(value) for name, value in sampling.items()})  # type: ignore[arg-type]
        if params.seed is None and not params.greedy:
            params = replace(params, seed=secrets.randbits(32))
        if max_tokens is None:
            check_context(len(ids), 0, self.max_context)
            max_tokens = min(MAX_TOKENS[kind], self.max_context - len(ids))
        else:
            max_tokens = whole_number(max_tokens, "max_tokens")
            check_context(len(ids), max_tokens, self.max_context)
        wants_lookup = self.lookup if lookup is None else lookup
        requests = [
            Request(
                prompt=ids,
                max_tokens=max_tokens,
                params=params if params.seed is None else replace(params, seed=(params.seed + sample) % 2**64),
                stop_ids=self._stop_ids(kind),
                logprobs=logprobs,
                lookup=Lookup(costs=self._engine.costs) if wants_lookup else None,
                should_stop=cancel_check(cancel),
                on_prefill=callback(on_prefill, "on_prefill") if sample == 0 else None,
            )
            for sample in range(n)
        ]
        drop_space = kind == "chat" and self.tokenizer.add_dummy_prefix  # as Meta's decode does with a whole answer
        return [
            TextStream(
                generation,
                request,
                Continuation(self.tokenizer, stops, drop_space=drop_space, hidden=hidden),
            )
            for generation, request in zip(self._engine.submit(*requests), requests, strict=True)
        ]


def load(
    path: str | Path | None = None,
    *,
    dtype: str | None = None,
    exact: bool = False,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    kv_bits: KVBits = None,
    window: int | None = None,
    sinks: int = SINKS,
    rope_scaling: str | RopeScaling | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CodeLlama:
    """Load a model.

    path           a checkpoint folder, a hub id such as "org/name", or None for the bundled demo model
    dtype          "float32", "bfloat16" or "float16"; default: the checkpoint's own, float32 on a CPU
    exact          keep activations in float32. Else the CPU kernels round them to 15 bits in quantised products,
                   for up to twice the speed; KL and agreement with exact: benchmarks/results/exactness.json
    max_context    tokens, prompt and answer together; default: what the model was trained to read. More is allowed
    prefill_chunk  prompt tokens per forward pass; default: what fits a memory budget
    kv_bits        width of stored keys and values: 16, 8 or 4, or a pair (keys, values); default: as the activations
    window         keep only the first `sinks` tokens and the last `window` of them. Memory stays bounded, and what is
                   dropped is forgotten: stats.dropped_tokens says how much. Default: keep everything
    rope_scaling   "linear:4", "ntk:4", "dynamic:4" or "yarn:4" stretches the positions of a model without long-context
                   training by a factor, and its context with them (mlx_codellama.rotary)
    revision       of the hub id
    progress       called with (name, bytes done, bytes in all) for each file while it is fetched from the hub, then for
                   each tensor
    Raises CheckpointError, ConfigError, TokenizerError, DownloadError; NotSupported for adapters, which do not exist
    yet; MemoryBudgetError, before anything is loaded, where weights and max_context tokens (a short context, if that
    is not given) need more memory than MLX_CODELLAMA_MEMORY allows or than there is. Calls raise it for theirs.
    Warns (KernelWarning) where a Linux CPU will multiply by packed weights far slower than it could.
    """
    storage = KVStorage.of(kv_bits, window=window, sinks=sinks)
    if adapter is not None:
        raise NotSupported("adapters are not available yet", hint="leave adapter out")
    if max_context is not None and not 1 <= max_context <= MOST_TOKENS:
        raise ConfigError(f"max_context is {shown(max_context)}; expected 1 to {MOST_TOKENS:,} tokens")
    scaling = RopeScaling.parse(rope_scaling) if isinstance(rope_scaling, str) else rope_scaling
    callback(progress, "progress")
    folder = _folder(path, revision, progress)
    args = Checkpoint.open(folder).args
    if scaling is not None:
        args = args.with_scaling(scaling)
    placement = place(args, dtype=dtype, exact=exact, storage=storage).for_loading(max_context)
    if why := placement.why_slow():
        warnings.warn(why, KernelWarning, stacklevel=2)
    with system_errors():
        loaded = load_model(folder, placement=placement, progress=progress)
    return CodeLlama(
        loaded.model,
        loaded.tokenizer,
        path=loaded.path,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        lookup=_drafts_by_default(loaded.model, storage),
        placement=placement,
    )


def _drafts_by_default(model: Model, storage: KVStorage) -> bool:
    """Whether lookup changes no answer, or in float32 so rarely that its speed is worth it: a last bit that differs
    tips a choice only at a near tie, but over keys or values of 4 bits it flips codes."""
    few_bits = storage.bits is not None and min(storage.bits) < 8
    return model.rows_are_independent or (model.dtype == mx.float32 and not few_bits)


def _folder(path: str | Path | None, revision: str | None, progress: Callable[[str, int, int], None] | None) -> Path:
    """Where the checkpoint lies on this machine, fetched first if need be."""
    if path is None:
        if not (DEMO / "config.json").is_file():
            raise CheckpointError("this installation has no bundled demo model", hint="pass a checkpoint folder")
        return DEMO
    if isinstance(path, str) and not Path(path).exists():
        from mlx_codellama import hub  # here, so that local folders need no hub library

        if hub.looks_like_hub_id(path):
            return hub.fetch(path, revision=revision, progress=progress)
    return Path(path)
