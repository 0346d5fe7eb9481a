"""The memory that a model needs, and what this machine has. Arithmetic only: nothing is loaded or allocated.

The terms of a plan:
  weights      every tensor at its stored width; a quantised matrix has packed codes plus a scale (and bias) per group
  kv           layers · K rows for each token of the cache's capacity, as mlx_codellama.cache stores them
  activations  the largest set of arrays alive at once while one chunk of the prompt passes one block
  logits       the logits of all tokens, if the caller requests them
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_codellama import env
from mlx_codellama.config import NATIVE_BITS, ModelArgs, QuantArgs, Quantization
from mlx_codellama.errors import ConfigError, MemoryBudgetError
from mlx_codellama.limits import control_groups, number, resource_limits
from mlx_codellama.storage import STEP, KVStorage

PREFILL_BYTES = 512 * 2**20  # limit for the activations of one prefill chunk
LAUNCH_FLOP = 3e11  # limit per kernel: a watchdog ends those that run for seconds; the slowest Macs do 1e12 FLOP/s
CHUNK_LIMITS = (None, 128, 64, 32, 16)  # chunk sizes to try until a plan fits; None is the default size
GPU_UNPACKS = 256 * 2**20  # limit for packed keys and values that a prefill on a GPU unpacks at once
WIRED_SHARE = 0.75  # share of a Mac's memory if iogpu.wired_limit_mb is not set


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model needs at one context length."""

    context: int
    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    logits_bytes: int = 0  # of the result; 0 if only the last token's are computed

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activations_bytes + self.logits_bytes


@dataclass(frozen=True)
class MachineMemory:
    """The memory of a machine, in bytes. limit_bytes is the budget if set, else a Mac's wired limit, else the total.

    name                the memory that total and available describe
    most_bytes          a limit that no budget raises: of a control group, whose processes are killed above it
    process_free_bytes  bytes that this process may still allocate (ulimit -v, -d)
    """

    total_bytes: int
    available_bytes: int
    wired_limit_bytes: int | None = None
    wired_limit_is_default: bool = False
    budget_bytes: int | None = None
    name: str = "machine memory"
    most_bytes: int | None = None
    process_free_bytes: int | None = None

    @property
    def limit_bytes(self) -> int:
        if self.budget_bytes is not None:
            return self.budget_bytes
        return self.total_bytes if self.wired_limit_bytes is None else self.wired_limit_bytes

    @property
    def limit_moves(self) -> bool:
        """Whether the limit is the free memory, which changes: there is no budget, and this is no Mac."""
        return self.budget_bytes is None and self.wired_limit_bytes is None

    def allowed_bytes(self, active_bytes: int) -> int:
        """Bytes that this process may hold in total, given the bytes that it holds now."""
        allowed = self.limit_bytes
        if self.limit_moves:
            allowed = min(self.total_bytes, self.available_bytes + active_bytes)
        if self.most_bytes is not None:
            allowed = min(allowed, self.most_bytes)
        if self.process_free_bytes is not None:
            allowed = min(allowed, self.process_free_bytes + active_bytes)
        return allowed

    def limit_text(self, allowed_bytes: int) -> str:
        """The reason for the limit allowed_bytes, as the end of a sentence."""
        where = (
            "" if self.name in ("machine memory", "GPU memory") else f" within its {self.name.removesuffix(' memory')}"
        )
        if self.limit_moves:
            return f"only {_size(allowed_bytes)} are free{where}"
        if allowed_bytes < self.limit_bytes:
            return f"only {_size(allowed_bytes)} may be held{where}"
        return f"{self.limit_name} allows {_size(allowed_bytes)}"

    @property
    def limit_name(self) -> str:
        if self.budget_bytes is not None:
            return env.MEMORY.name
        return self.name if self.wired_limit_bytes is None else "wired limit"


@dataclass(frozen=True)
class Runtime:
    """The properties of a backend that determine memory.

    name           metal, cuda or cpu
    compute_bytes  width of every value that is not packed codes: 4 on a CPU, where 16-bit maths is emulated
    native         whether there are native CPU kernels
    widens_codes   whether codes of 2, 3, 5 and 6 bits become 4 or 8 bits for these kernels; else MLX multiplies, far
                   slower
    """

    name: str
    compute_bytes: int = 2
    native: bool = False
    widens_codes: bool = True

    @property
    def on_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def fused(self) -> bool:
        """Whether attention is fused. Otherwise (MLX on a CPU) it writes its scores to memory, float32 [H, L, T]."""
        return self.native or not self.on_cpu

    @property
    def unpacked_kv_bytes(self) -> int:
        """Upper bound on the bytes of one layer's keys and values that are unpacked for attention, if the cache stores
        another dtype."""
        if self.native:
            return 0
        return 1 << 62 if self.on_cpu else GPU_UNPACKS

    def held(self, quant: QuantArgs) -> QuantArgs:
        """The quantisation in memory of a matrix with these codes. For the native kernels 2 and 3 bits become 4, and 5
        and 6 become 8, with the same values."""
        if not (self.native and self.widens_codes):
            return quant
        return replace(quant, bits=min(bits for bits in NATIVE_BITS if bits >= quant.bits))

    def multiplies(self, quant: QuantArgs) -> bool:
        """Whether the native kernels support products with such a matrix, widened if needed."""
        return self.native and self.held(quant).bits in NATIVE_BITS

    def keeps_scales(self, path: str, quant: QuantArgs) -> bool:
        """Whether scales and biases keep their stored dtype, which only the native kernels can read. Not in the
        embedding, whose rows MLX unpacks."""
        return self.multiplies(quant) and path != "model.embed_tokens"


GPU = Runtime("gpu")
CPU = Runtime("cpu", compute_bytes=4)


def quantised_bytes(shape: tuple[int, ...], quant: QuantArgs, *, scale_bytes: int = 2) -> int:
    """Bytes of one quantised matrix (out, in), with scales and biases of scale_bytes each."""
    widths = {"uint32": 4, "uint8": 1, "float": scale_bytes}
    return sum(math.prod(part.shape) * widths[part.dtype] for part in quant.parts(shape).values())


def weights_bytes(args: ModelArgs, runtime: Runtime = GPU) -> int:
    """Bytes of all weights once loaded."""
    total = 0
    for name, shape in args.tensor_shapes().items():
        path = name.removesuffix(".weight")
        quant = args.quant_of(path) if len(shape) == 2 else None
        if quant is None:
            total += math.prod(shape) * runtime.compute_bytes
        else:
            stored = 4 if args.dtype == "float32" else 2
            width = stored if runtime.keeps_scales(path, quant) else runtime.compute_bytes
            total += quantised_bytes(shape, runtime.held(quant), scale_bytes=width)
    return total


def has_other_codes(args: ModelArgs) -> bool:
    """Whether some matrix has codes that the native CPU kernels do not support as stored."""
    quantization = args.quantization
    kinds = [quantization.default, *quantization.overrides.values()] if quantization else []
    return any(kind is not None and kind.bits not in NATIVE_BITS for kind in kinds)


def kv_bytes(args: ModelArgs, context: int, *, storage: KVStorage | None = None, compute_bytes: int = 2) -> int:
    """Bytes allocated by the caches of all layers (their `nbytes`) after `context` tokens are read."""
    storage = storage or KVStorage()
    rows = args.num_hidden_layers * args.num_key_value_heads * storage.tokens(context)
    return rows * storage.row_bytes(args.head_dim, compute_bytes)


def block_values(args: ModelArgs) -> int:
    """Number of values of one token inside one block: residual and projections."""
    heads = args.num_attention_heads + 2 * args.num_key_value_heads
    return 4 * args.hidden_size + 3 * args.intermediate_size + 3 * heads * args.head_dim


def chunk_tokens(
    args: ModelArgs, offset: int, runtime: Runtime, *, budget_bytes: int = PREFILL_BYTES, every_logit: bool = False
) -> int:
    """The number of prompt tokens to read at once after `offset` cached ones, so that activations fit budget_bytes.

    Counts float32 values of one block and, if attention writes them to memory, its [H, L, T] scores. The result is a
    multiple of 16 from 16 to 1024; at most 256 on a CPU, where a chunk takes seconds and delays a cancellation. On a
    GPU no single kernel gets more than LAUNCH_FLOP; attention's share of a chunk grows with the cached tokens.
    every_logit  also count logits [L, V]
    """
    heads, width = args.num_attention_heads, args.head_dim
    per_token = 4 * block_values(args) + (4 * args.vocab_size if every_logit else 0)
    per_pair = 0 if runtime.fused else 2 * 4 * heads  # scores and their softmax
    # n · per_token + n · (offset + n) · per_pair ≤ budget
    linear = per_token + offset * per_pair
    if per_pair:
        n = int((math.sqrt(linear**2 + 4 * per_pair * budget_bytes) - linear) / (2 * per_pair))
    else:
        n = budget_bytes // linear
    if not runtime.on_cpu:  # attention has two products with offset + n keys, a projection one with E · F weights
        projection = 2 * args.hidden_size * max(args.intermediate_size, args.vocab_size if every_logit else 0)
        n = min(n, int(LAUNCH_FLOP / max(4 * heads * width * (offset + n), projection)))
    return max(16, min(n, 256 if runtime.on_cpu else 1024) // 16 * 16)


# Blocks of values alive at once with the native kernels. Measured at the 1.1B geometry: 2.5, at 2,000 and at 100,000
# tokens; 2 and 1 % of the total then stay uncounted. Small models have fewer.
AHEAD = 2


def activations_bytes(
    args: ModelArgs,
    context: int,
    runtime: Runtime = GPU,
    storage: KVStorage | None = None,
    *,
    most: int | None = None,
    every_logit: bool = False,
) -> int:
    """The peak bytes of temporary arrays during a prefill of `context` tokens.

    most         upper bound on the tokens of a chunk; default: `chunk_tokens`
    every_logit  the head multiplies all tokens of a chunk, not only the last

    MLX allocates ahead of computation, so all values of a block count together (of AHEAD blocks if nothing waits
    between them), and its weights if they are unpacked. We add the scores of the last chunk, the keys and values that
    attention must unpack, and the logits.
    The factors were fitted to MLX's peak counter on a CPU; tests/test_memory.py compares them with it.
    """
    d = args.head_dim
    length = min(_last_chunk(args, context, runtime, most, every_logit), context)
    values = length * block_values(args) * runtime.compute_bytes * (AHEAD if runtime.native else 1)
    if runtime.on_cpu and runtime.compute_bytes == 4:  # 16-bit values need no copy for products with codes
        values += _unpacked_bytes(args, runtime, every_logit)
    scores = 0 if runtime.fused else args.num_attention_heads * length * context * 4
    storage = storage or KVStorage()
    computed = runtime.compute_bytes if runtime.fused else 4  # MLX on a CPU attends in float32
    both = 2 * args.num_key_value_heads * storage.tokens(context) * d * computed
    wide = 0
    if storage.packed:
        wide = min(runtime.unpacked_kv_bytes, 2 * both)  # including temporaries of unpacking
    elif not runtime.fused and storage.row_bytes(d, runtime.compute_bytes) < storage.row_bytes(d, 4):
        wide = min(runtime.unpacked_kv_bytes, both)
    if storage.window is not None and context > storage.sinks + storage.window:  # reordered with the chunk, and back
        kept = storage.tokens(context) + length
        wide += 2 * args.num_key_value_heads * kept * storage.row_bytes(d, runtime.compute_bytes)
    logits = 4 * args.vocab_size * 4  # float32: the logits, and sampling's copies of them
    if every_logit:  # in float32, and before that in the model's dtype, which the native kernels make from float32
        packed = args.quant_of(_head(args)) is not None
        own = 0 if runtime.compute_bytes == 4 else runtime.compute_bytes + (4 if runtime.native and packed else 0)
        logits = length * args.vocab_size * (4 + own)
    return values + scores + wide + logits


def _last_chunk(args: ModelArgs, context: int, runtime: Runtime, most: int | None, every_logit: bool) -> int:
    """Tokens of the last chunk of a prefill of `context` tokens."""

    def chunk(offset: int) -> int:
        n = chunk_tokens(args, offset, runtime, every_logit=every_logit)
        return n if most is None else min(most, n)

    return chunk(max(0, context - chunk(0)))


def _head(args: ModelArgs) -> str:
    """The module whose matrix computes the logits."""
    return "model.embed_tokens" if args.tie_word_embeddings else "lm_head"


def _unpacked_bytes(args: ModelArgs, runtime: Runtime, head: bool = False) -> int:
    """Bytes of the layer (or the head) whose weights are largest when MLX unpacks them to float32. Only one layer
    counts, because `model` waits for a layer before the next.

    Codes of 3, 5 and 6 bits cross the borders of words, and MLX assembles them from arrays of single bits.
    """
    layers: dict[str, float] = {}
    last = f"{_head(args)}.weight" if head else ""
    for name, shape in args.tensor_shapes().items():
        multiplied = len(shape) == 2 and (".layers." in name or name == last)
        quant = args.quant_of(name.removesuffix(".weight")) if multiplied else None
        if quant is not None and not runtime.multiplies(quant):
            copies = 0.8 * (quant.bits + 1) if quant.bits in (3, 5, 6) else 1.2
            layer = last if name == last else name.split(".")[2]
            layers[layer] = layers.get(layer, 0.0) + 4 * copies * math.prod(shape)
    return int(max(layers.values(), default=0))


def plan(
    args: ModelArgs,
    context: int,
    *,
    storage: KVStorage | None = None,
    runtime: Runtime = GPU,
    most: int | None = None,
    every_logit: bool = False,
) -> MemoryPlan:
    """The memory that `args` (with its quantization) needs for `context` tokens of prompt and answer together.

    most         upper bound on the tokens of a prefill chunk
    every_logit  the caller gets the logits of all tokens, float32 [context, V]
    """
    return MemoryPlan(
        context,
        weights_bytes(args, runtime),
        kv_bytes(args, context, storage=storage, compute_bytes=runtime.compute_bytes),
        activations_bytes(args, context, runtime, storage, most=most, every_logit=every_logit),
        4 * context * args.vocab_size if every_logit else 0,
    )


def chunk_limit(planned: Callable[[int | None], MemoryPlan], room_bytes: int) -> int | None:
    """The first of CHUNK_LIMITS whose plan needs at most room_bytes; the smallest if none does."""
    return next((most for most in CHUNK_LIMITS if planned(most).total_bytes <= room_bytes), CHUNK_LIMITS[-1])


def largest_context(planned: Callable[[int], MemoryPlan], limit_bytes: int, most: int) -> int:
    """The largest context in 1 … most, in whole cache steps if below `most`, that fits; 0 if none does."""
    if planned(most).total_bytes <= limit_bytes:
        return most
    low, high = 0, math.ceil(most / STEP)  # steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if planned(middle * STEP).total_bytes <= limit_bytes:
            low = middle
        else:
            high = middle
    return low * STEP


def require(
    planned: Callable[[int, KVStorage], MemoryPlan],
    storage: KVStorage,
    context: int,
    machine: MachineMemory,
    *,
    active_bytes: int,
    held_bytes: int,
) -> None:
    """Raise MemoryBudgetError, with the sum and with what would fit, if `context` tokens are too many.

    active_bytes  bytes that this process holds now; held_bytes: the part of them that the plan counts too
    """
    allowed, wanted = machine.allowed_bytes(active_bytes), planned(context, storage)
    others = active_bytes - held_bytes
    if others + wanted.total_bytes <= allowed:
        return
    terms = {
        "weights": wanted.weights_bytes,
        "keys and values": wanted.kv_bytes,
        "activations": wanted.activations_bytes,
        "logits": wanted.logits_bytes,
        "held by others": others,
    }
    parts = [f"{name} {_size(n)}" for name, n in terms.items() if n]
    limit = machine.limit_text(allowed)
    room = allowed - others
    fits = largest_context(lambda n: planned(n, storage), room, context)
    offers = [f"{fits:,} tokens of context would fit"] if fits else []
    for bits in (8, 4):
        narrower = replace(storage, k_bits=bits, v_bits=bits)
        if planned(context, narrower).kv_bytes < wanted.kv_bytes and planned(context, narrower).total_bytes <= room:
            offers.append(f"{bits}-bit keys and values (--kv-bits {bits}) would fit at {context:,} tokens")
            break
    if not wanted.logits_bytes:
        offers.append("`mlx-codellama plan` shows what fits")
    raise MemoryBudgetError(
        f"{context:,} tokens need {_size(others + wanted.total_bytes)} ({' + '.join(parts)}); {limit}",
        hint="; ".join(offers)
        + (f"; {env.MEMORY.name}=12GB sets another budget" if machine.budget_bytes is None else ""),
    )


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10**9 else f"{n / 1e6:.1f} MB"


def with_bits(args: ModelArgs, bits: int, group_size: int = 64) -> ModelArgs:
    """The same model with every matrix at `bits`; 16 means unquantised."""
    if bits == 16:
        return replace(args, quantization=None)
    return replace(args, quantization=Quantization(QuantArgs(bits, group_size)))


def parse_bytes(text: str) -> int:
    """`12GB` is 12·10⁹, `12GiB` is 12·2³⁰; a plain number is bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not match or (match[3] and not match[2]):
        raise ConfigError(f"{text!r} is not an amount of memory", hint="write it like 12GB, 12GiB or 12000000000")
    scale = (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")
    nbytes = float(match[1]) * scale
    if nbytes >= 1 << 62:
        raise ConfigError(f"{text[:40]!r} is more memory than there is", hint="write it like 12GB")
    return int(nbytes)


@dataclass(frozen=True)
class Readings:
    """The sources of facts about a machine; tests pass their own."""

    system: str
    command: Callable[[list[str]], str | None]  # its stdout; None if it cannot be run
    file: Callable[[str], str | None]  # its text; None if it does not exist
    limit: Callable[[str], int | None] = lambda name: None  # a resource limit such as RLIMIT_AS; None if not set


def _command(argv: list[str]) -> str | None:
    import subprocess

    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _file(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def this_machine() -> Readings:
    return Readings(platform.system(), _command, _file, _limit)


def machine_memory(readings: Readings | None = None, *, budget: str | None = None) -> MachineMemory:
    """Total and available memory, a Mac's wired limit, and the budget of MLX_CODELLAMA_MEMORY.

    budget  replaces the environment variable. Raises ConfigError if it cannot be parsed.
    """
    readings = readings or this_machine()
    memory = _mac(readings) if readings.system == "Darwin" else _linux(readings)
    wanted = env.get(env.MEMORY) if budget is None else budget
    return replace(memory, budget_bytes=parse_bytes(wanted)) if wanted else memory


def _mac(readings: Readings) -> MachineMemory:
    total = number(readings.command(["sysctl", "-n", "hw.memsize"])) or 0
    stated = number(readings.command(["sysctl", "-n", "iogpu.wired_limit_mb"])) or 0  # 0: macOS decides
    pages = readings.command(["vm_stat"]) or ""
    size = re.search(r"page size of (\d+) bytes", pages)
    free = sum(int(n) for n in re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", pages))
    available = free * int(size[1]) if size else total
    wired = stated * 2**20 if stated else int(total * WIRED_SHARE)
    return MachineMemory(total, min(available, total), wired, wired_limit_is_default=not stated)


def _linux(readings: Readings) -> MachineMemory:
    text = readings.file("/proc/meminfo") or ""
    fields = {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total = fields.get("MemTotal", 0)
    available = fields.get("MemAvailable", total)
    memory = MachineMemory(total, available)
    groups = [limit for limit in control_groups(readings.file) if limit.total_bytes < total]
    process = resource_limits(readings.file, readings.limit)
    for limit in (*groups, *process):
        memory = replace(memory, total_bytes=min(memory.total_bytes, limit.total_bytes))
        if limit.free_bytes < memory.available_bytes:
            memory = replace(memory, available_bytes=limit.free_bytes, name=f"{limit.name} memory")
    return replace(
        memory,
        most_bytes=min((limit.total_bytes for limit in groups), default=None),
        process_free_bytes=min((limit.free_bytes for limit in process), default=None),
    )
