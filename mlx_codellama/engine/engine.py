"""The owner of a model: it reads prompts and generates for all running requests, a chunk and a step at a time.

One turn (`_turn`) is: end what was abandoned, admit what fits, read one chunk of one prompt, and take one step of every
running request in one ragged forward pass. There is no thread of its own: whoever waits for a token takes turns until
the token is there, for everybody else too. A lock makes sure that one thread at a time computes.

Decoding looks one step ahead: the forward pass of the next token is queued before the present token is read, so the
device does not wait for Python. A step queued in vain (after a stop id) costs one row of device time and changes
nothing that anyone reads. With prompt lookup, a request that is alone may also check a draft of several tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import mlx.core as mx

from mlx_codellama.cache import Sequence, make_sequence
from mlx_codellama.engine.admission import Admission, Memory
from mlx_codellama.engine.choices import Choices
from mlx_codellama.engine.exclusive import Exclusive
from mlx_codellama.engine.generation import Generation
from mlx_codellama.engine.prefix import LEAST_SHARED, PrefixCache, common_prefix, worth_sharing
from mlx_codellama.engine.request import FinishReason, Request, Step
from mlx_codellama.engine.run import Prompt, Run
from mlx_codellama.errors import BackendError, MemoryBudgetError, PromptError, refused_by_system, system_errors
from mlx_codellama.lookup import Costs
from mlx_codellama.model import Model
from mlx_codellama.placement import place
from mlx_codellama.sampling import Sampler
from mlx_codellama.storage import KVStorage

MAX_RUNNING = 8  # requests at a time: so many rows make one step whose results do not depend on company
MAX_UNREAD = 32  # steps that a request may be ahead of whoever fetches them, while nobody waits for its place
IDLE_BYTES = 2**30  # of keys and values kept for later calls; those of the last call are kept in any case
_TIDY_EVERY = 256  # steps between releases of MLX's buffer pool: attention's buffers change size at each step


class Engine:
    """Serves requests for one model.

    Results do not depend on company: each request gets the ids that it gets alone, given kernels whose rows do not
    depend on their number (native CPU kernels; on a GPU, MLX's own products may round differently).
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage | None = None,
        *,
        prefill_chunk: int | None = None,
        chunk_limit: int | None = None,
        memory: Memory | None = None,
        max_running: int = MAX_RUNNING,
        idle_bytes: int = IDLE_BYTES,
    ) -> None:
        """
        storage        of keys and values; default: all of them, in the activations' dtype
        prefill_chunk  tokens of a prompt per forward pass; default: what a memory budget allows, at most chunk_limit
        memory         asked before a request is admitted; None for no limit
        max_running    requests that hold keys and values at a time; others wait their turn
        idle_bytes     of keys and values kept for later calls; those of the last call are kept in any case
        """
        if max_running < 1:
            raise PromptError(f"max_running is {max_running}; expected at least 1 request")
        self.model, self.storage, self.prefill_chunk = model, storage or KVStorage(), prefill_chunk
        self.max_running, self._chunk_limit = max_running, chunk_limit
        self.costs = Costs()  # of this model's passes, as far as requests with lookup have measured them
        self._owner = Exclusive(
            "a call on this model began inside a callback (on_prefill, cancel) of another call on it",
            "",
            "let the first call end, for example by cancel; then begin the next",
        )
        self._abandoned: deque[Run] = deque()  # and not ended yet
        self._waiting: deque[Run] = deque()
        self._runs: list[Run] = []  # admitted and not ended
        self._reading: deque[Prompt] = deque()
        self._prefixes = PrefixCache(idle_bytes, lambda n_tokens: model.args.scaling_over(n_tokens)[1])
        self._admission = Admission(memory, self._prefixes, shares=self.storage.window is None)
        self._placement: Memory = memory or place(model.args)
        self._n_steps = 0

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens of a prompt per forward pass; None for what a memory budget allows. Raises PromptError if set to less
        than 1."""
        return self._prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, n_tokens: int | None) -> None:
        if n_tokens is not None and n_tokens < 1:
            raise PromptError(f"prefill_chunk is {n_tokens}; expected at least 1 token")
        self._prefill_chunk = n_tokens

    # ── for callers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, *samples: Request, sequence: Sequence | None = None) -> list[Generation]:
        """Queue a request, and further samples of the same prompt, which is then read once for all of them.

        sequence  to go on with, in place of one that an earlier call left: it holds a beginning of the prompt, and
                  after each Step the prompt and every token yielded so far, except that the very last token may not
                  have been read back. It stays the caller's
        → one Generation for each. Raises MemoryBudgetError for a request that does not fit even alone.
        """
        requests = [request, *samples]
        if any(one.prompt != request.prompt for one in samples):
            raise ValueError("samples have one prompt")
        if sequence is not None and sequence.offset >= len(request.prompt):
            raise ValueError(
                f"{sequence.offset} of {len(request.prompt)} prompt tokens are cached; at least one must be left"
            )
        self._admission.check(max(one.n_tokens for one in requests), self._runs, self.prefill_chunk)
        prompt = Prompt(requests, sequence)
        runs = [Run(one, prompt) for one in requests]
        self._waiting.extend(runs)
        return [Generation(self, run) for run in runs]

    def take_turn(self) -> bool:
        """Do some work for everybody. → whether there is more to do."""
        with self.owned():
            self._turn()
            return bool(self._runs or self._waiting)

    @property
    def idle_sequences(self) -> list[Sequence]:
        """What finished requests left for later ones, the latest last."""
        return self._prefixes.idle

    @property
    def storages(self) -> dict[object, int]:
        """The bytes of each piece of storage for keys and values that the engine holds, in use or idle."""
        return self._admission.storages(self._runs)

    def keep(self, sequence: Sequence) -> None:
        """Keep a sequence for later requests, as if one had left it."""
        with self.owned():
            self._leave(sequence)

    def forget(self) -> None:
        """Free what finished requests left."""
        with self.owned():
            for sequence in self._prefixes.idle:
                self._prefixes.drop(sequence)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the model, to compute with it or to look at what finished requests left.

        Raises NotSupported where this thread holds it already: in a callback. Memory and threads that the system
        refuses are errors of ours.
        """
        with self._owner, system_errors():
            try:
                yield
            finally:
                self._end_abandoned()
        self._sweep()  # what was abandoned since

    def fetch(self, run: Run) -> Step | None:
        """The next step of a run, after as many turns as that takes; None once it has ended."""
        if run.left_at and not run.steps:
            run.away_s += time.perf_counter() - run.left_at
        while True:
            if not run.is_ready:
                with self.owned():
                    if not run.is_ready:
                        self._turn(run)
                continue
            if run.steps:
                step = run.steps.popleft()
                run.n_fetched += step.id is not None
                run.left_at = time.perf_counter()
                return step
            if run.error is not None:
                error, run.error = run.error, None
                run.ended = True
                raise error
            return None

    def close(self, run: Run, reason: FinishReason | None = None) -> None:
        """End a run where its caller is: what was generated beyond that is forgotten."""
        with self.owned():
            del run.ids[run.n_fetched :]
            run.steps.clear()
            self._end(run)
            run.error = None
            if reason is not None:
                run.end(reason)

    def abandon(self, run: Run) -> None:
        """Its caller is gone. The garbage collector calls this, at any moment and in any thread."""
        run.abandoned = True
        self._abandoned.append(run)
        self._sweep()

    def _sweep(self) -> None:
        """End what is abandoned. If another thread holds the model, or an outer frame of this one, that does it."""
        while self._abandoned and self._owner.acquire(wait=False):
            try:
                self._end_abandoned()
            finally:
                self._owner.__exit__()

    # ── one turn ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _turn(self, wanted: Run | None = None) -> None:
        self._admit()
        if self._reading:
            self._read_chunk()
        self._step([run for run in self._runs if run.choices is not None and self._goes_on(run, wanted)])

    def _goes_on(self, run: Run, wanted: Run | None) -> bool:
        """Whether a run takes part in this step: not if it is far ahead of its caller and stands in nobody's way."""
        return run is wanted or bool(self._waiting) or len(run.steps) < MAX_UNREAD

    def _admit(self) -> None:
        """Let waiting runs in, in their order, as long as what they may grow to can be reserved."""
        while self._waiting and len(self._runs) < self.max_running:
            run = self._waiting[0]
            if not run.abandoned:
                try:
                    if not self._admission.reserve(run, self._runs, self.prefill_chunk):
                        return
                except MemoryBudgetError as error:
                    self._fail(run, error)
                    continue
            if run.abandoned:
                self._end(run)
                continue
            try:
                self._waiting.popleft()
                self._runs.append(run)
                if run.prompt.is_read:
                    self._start(run)
                elif run.prompt not in self._reading:
                    self._reading.append(run.prompt)
            except BaseException as error:  # Ctrl-C: no run may be in neither list, with a caller who waits for it
                self._fail(run, error)
                raise

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_chunk(self) -> None:
        """One chunk of the next prompt in turn that somebody admitted wants, and that need not wait for another one to
        read the same beginning."""
        wanted = {id(run.prompt) for run in self._runs}
        for _ in range(len(self._reading)):
            prompt = self._reading[0]
            self._reading.rotate(-1)
            if id(prompt) in wanted and (prompt.sequence is not None or not self._waits_for_another(prompt)):
                break
        else:
            return
        try:
            self._read(prompt)
        except BaseException as error:  # also KeyboardInterrupt: whoever waits for this prompt must learn of it
            self._give_up(prompt, error)
            if not isinstance(error, Exception):
                raise

    def _read(self, prompt: Prompt) -> None:
        runs = [run for run in self._runs if run.prompt is prompt]
        total = len(prompt.ids)
        if prompt.sequence is None:
            self._begin(prompt, runs)
        elif prompt.given and not prompt.is_begun:
            self._expect(prompt.sequence, prompt)
            prompt.cached, prompt.is_begun = prompt.sequence.offset, True
        sequence = prompt.sequence
        assert sequence is not None
        if not (runs := [run for run in runs if not self._cancelled(run)]):
            return
        start = sequence.offset
        end = min(total, start + self._chunk(prompt, start))
        x = self.model.hidden(mx.array([prompt.ids[start:end]], mx.int32), [(sequence, end - start)], prompt=True)
        if end < total:
            mx.eval(sequence.arrays)  # the last layer's feed-forward part is dropped unevaluated
            mx.clear_cache()
        else:
            logits = self.model.head(x[:, -1:])[0, 0]
            mx.eval(logits, sequence.arrays)
        sequence.ids.extend(prompt.ids[len(sequence.ids) : end])
        if end == total:
            prompt.logits = logits
            self._reading.remove(prompt)
        for run in runs:
            if run.request.on_prefill is not None:
                try:
                    run.request.on_prefill(end, total)
                except Exception as error:
                    self._fail(run, error)
        if end == total:
            for run in runs:
                if not run.ended:
                    self._start(run)

    def _chunk(self, prompt: Prompt, start: int) -> int:
        if self.prefill_chunk is not None:
            return self.prefill_chunk
        most = min(prompt.chunk_limit or 1024, self._chunk_limit or 1024)
        return min(most, self._placement.chunk_tokens(start))

    def _waits_for_another(self, prompt: Prompt) -> bool:
        """Whether a prompt that is being read shares more with this one than any sequence holds yet."""
        _, held = self._prefixes.match(prompt.ids, prompt.n_tokens)
        for other in self._reading:
            if other is prompt or other.sequence is None or not self._may_share(other.sequence, prompt):
                continue
            shared = min(common_prefix(other.ids, prompt.ids), len(prompt.ids) - 1)
            if other.n_read < shared and shared >= held + LEAST_SHARED:
                return True
        return False

    def _begin(self, prompt: Prompt, runs: list[Run]) -> None:
        """Give the prompt a sequence: one that holds the longest usable beginning of it, or an empty one."""
        found, n = self._longest(prompt)
        sequence = self._prefixes.begin(found, n) if found is not None and n else None
        if sequence is None:
            sequence = make_sequence(self.model.args, self.storage)
        elif found is not None and sequence is not found:  # if taken over, its storage counts among what is promised
            prompt.foreign = frozenset(sequence.storages.keys() & found.storages.keys())
            prompt.n_foreign = sum(one.n_tokens for one in sequence.segments if one.storage in prompt.foreign)
        prompt.sequence, prompt.cached = sequence, sequence.offset
        for run in runs:
            self._admission.promise(run)
        self._expect(sequence, prompt)

    def _expect(self, sequence: Sequence, prompt: Prompt) -> None:
        """Tell a sequence how long its text will be."""
        sequence.reserve(len(prompt.ids) + 1)
        sequence.horizon = sequence.horizon or prompt.n_tokens

    def _longest(self, prompt: Prompt) -> tuple[Sequence | None, int]:
        """The sequence that holds the longest usable beginning of a prompt, at least one token of which is left."""
        usable = len(prompt.ids) - 1
        found, n = self._prefixes.match(prompt.ids, prompt.n_tokens)
        best: tuple[Sequence | None, int] = (None, 0)
        if found is not None:
            best = found, min(n, usable, found.offset)
        for other in self._reading:
            if other is not prompt and other.sequence is not None and self._may_share(other.sequence, prompt):
                shared = min(common_prefix(other.ids, prompt.ids), usable, other.n_read)
                if shared > best[1] and worth_sharing(shared, len(prompt.ids)):
                    best = other.sequence, shared
        return best

    def _may_share(self, sequence: Sequence, prompt: Prompt) -> bool:
        return sequence.can_share(1) and self._same_angles(sequence, prompt)

    def _same_angles(self, sequence: Sequence, prompt: Prompt) -> bool:
        """Whether dynamic rotary scaling gives the text of a prompt the angles of those keys."""
        angles = self._prefixes.angles
        return angles(sequence.horizon) == angles(prompt.n_tokens)

    def _give_up(self, prompt: Prompt, error: BaseException) -> None:
        """Reading failed: its runs learn of it. Samples that still wait read the prompt again."""
        if prompt in self._reading:
            self._reading.remove(prompt)
        try:
            if prompt.sequence is not None:
                mx.eval(prompt.sequence.arrays)  # what the pass left lazy another thread could not compute
        except Exception:
            prompt.sequence = None
        for run in [run for run in self._runs if run.prompt is prompt]:
            self._fail(run, error)
        if prompt.pending and not prompt.is_read and not prompt.given and prompt.sequence is not None:
            sequence, prompt.sequence = prompt.sequence, None
            prompt.foreign, prompt.n_foreign = frozenset(), 0
            if sequence.is_sound:
                self._leave(sequence)

    def _fail(self, run: Run, error: BaseException, *, sound: bool = True) -> None:
        """A run ends with an error. One that is for whoever takes the turn, as Ctrl-C, makes it "cancelled".

        sound  whether what its sequence holds can be relied on
        """
        if run.ended:
            return
        if sound:
            self._end(run)
        else:
            self._leave_out(run)
        if isinstance(error, Exception):
            run.error = refused_by_system(error) or error
        else:
            run.end("cancelled")

    # ── generating ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, run: Run) -> None:
        """The prompt is read: choose the first token. Whatever fails here fails for this run alone."""
        try:
            self._choose_first(run)
        except BaseException as error:
            self._fail(run, error)
            if not isinstance(error, Exception):
                raise

    def _choose_first(self, run: Run) -> None:
        prompt, request, logits = run.prompt, run.request, run.prompt.logits
        assert prompt.sequence is not None
        assert logits is not None
        if prompt.pending - {id(run)}:
            run.sequence = prompt.sequence.share()
            shared = prompt.sequence
        else:
            run.sequence = shared = prompt.sequence
            prompt.sequence = prompt.logits = None
        prompt.pending.discard(id(run))
        if not (run.sequence is shared and run.reads):  # alone, it has all that it read itself
            run.foreign = frozenset(key for key, n_bytes in shared.storages.items() if n_bytes)
            run.reads = False
            self._admission.promise(run)
        if not prompt.given:
            self._prefixes.enter(run.sequence, prompt.ids)
        if request.max_tokens == 0:
            self._end(run)
            run.end("length")
            return
        if request.lookup is not None:
            request.lookup.begin(prompt.ids)
        run.sampler = Sampler(request.params, prompt.ids)
        run.choices = Choices(logits[None], run.sampler, request, [])
        mx.async_eval(run.choices.arrays)  # type: ignore[no-untyped-call]

    def _step(self, runs: list[Run]) -> None:
        """One more token of each run, and with lookup perhaps several."""
        try:
            runs = [run for run in runs if run.steps or not self._cancelled(run)]
            before = {id(run): run.choices for run in runs}
            self._look_ahead(runs)
            behind = []
            for run in runs:
                choices = before[id(run)]
                assert choices is not None
                if self._deliver(run, choices) and run.choices is choices:
                    behind.append(run)
            if behind:
                self._check_drafts(behind)
        except BaseException as error:
            for run in runs:
                self._fail(run, error, sound=False)
            if not isinstance(error, Exception):
                raise
        self._n_steps += 1
        if self._n_steps % _TIDY_EVERY == 0:
            mx.clear_cache()

    def _look_ahead(self, runs: list[Run]) -> None:
        """Queue the next forward pass for those whose next token the host need not know first."""
        alone = len(self._runs) == 1
        ahead = [run for run in runs if not run.choices.draft and run.n_left > 1]  # type: ignore[union-attr]
        if alone and ahead and (lookup := ahead[0].request.lookup) is not None and lookup.rows() > 1:
            return
        if ahead:
            tokens = [run.choices.next_token for run in ahead]  # type: ignore[union-attr]
            self._forward(ahead, mx.stack(tokens), [[] for _ in ahead])

    def _check_drafts(self, runs: list[Run]) -> None:
        """The forward pass of those whose last token the host knows, each with a draft where it is alone."""
        drafts = []
        for run in runs:
            lookup = run.request.lookup
            run.away_s = 0.0
            drafts.append(lookup.draft(run.n_left - 1) if lookup is not None and len(self._runs) == 1 else [])
        ids = [id for run, draft in zip(runs, drafts, strict=True) for id in (run.ids[-1], *draft)]
        self._forward(runs, mx.array(ids, mx.int32), drafts)

    def _forward(self, runs: list[Run], ids: mx.array, drafts: list[list[int]]) -> None:
        """One ragged pass: a known token of each run, and its draft. ids int32 [rows]. Computing starts here."""
        spans = [(run.sequence, 1 + len(draft)) for run, draft in zip(runs, drafts, strict=True)]
        logits = self.model.head(self.model.hidden(ids[None], spans, prompt=False)).squeeze(0)
        at, arrays = 0, []
        for run, draft in zip(runs, drafts, strict=True):
            assert run.sampler is not None
            assert run.sequence is not None
            rows = logits[at : (at := at + 1 + len(draft))]
            run.choices = Choices(rows, run.sampler, run.request, draft)
            arrays += [*run.choices.arrays, *run.sequence.arrays]
        # Nothing is left lazy: MLX evaluates a graph only in the thread that built it, and runs change threads.
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]

    def _deliver(self, run: Run, choices: Choices) -> bool:
        """Read what a run chose in its last pass. → whether it goes on."""
        request, lookup = run.request, run.request.lookup
        try:
            steps = choices.read(len(run.ids))
        except BackendError as error:
            run.error = error
            self._leave_out(run)
            return False
        now = time.perf_counter()
        if lookup is not None:
            if run.ids and len(self._runs) == 1:
                lookup.timed(choices.n_rows, now - max(choices.begun, run.read_at) - run.away_s)
            lookup.settle(len(choices.draft), [step.id for step in steps if step.id is not None])
        run.read_at, run.away_s = now, 0.0
        n_wrong = choices.n_rows - len(steps)
        if n_wrong:
            assert run.sequence is not None
            choices.rewind(n_wrong)
            run.sequence.trim(n_wrong)
        run.ids += [step.id for step in steps if step.id is not None]
        run.steps.extend(steps)
        if run.sequence is not None:
            run.dropped = run.sequence.dropped
        if steps[-1].finish_reason is not None:
            self._end(run)
            return False
        return request.max_tokens > len(run.ids)

    # ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, run: Run) -> None:
        """Take a run out and keep its sequence, cut to what its ids say, for later requests."""
        if run.ended:
            return
        prompt, sequence = run.prompt, run.sequence
        self._leave_out(run)
        if sequence is None:  # in the middle of the prompt, or before it
            if prompt.pending:
                return  # other samples go on with it
            sequence, prompt.sequence, prompt.logits = prompt.sequence, None, None
            if prompt in self._reading:
                self._reading.remove(prompt)
        if sequence is None or not sequence.is_sound:
            return
        known = [*prompt.ids, *run.ids]
        extra = max(0, sequence.offset - len(known))
        if extra > sequence.trimmable:
            return
        sequence.trim(extra)
        sequence.ids[:] = known[: sequence.offset]
        if not prompt.given:
            self._leave(sequence)

    def _cancelled(self, run: Run) -> bool:
        """Ask a run whether to stop; it is over if so, or if asking fails."""
        try:
            if not run.asks_to_stop():
                return False
        except Exception as error:
            self._end(run)
            run.error = error
            return True
        self._end(run)
        run.end("cancelled")
        return True

    def _leave_out(self, run: Run) -> None:
        """A run takes part no more."""
        if run in self._runs:
            self._runs.remove(run)
        elif run in self._waiting:
            self._waiting.remove(run)
        run.prompt.pending.discard(id(run))
        if run.sequence is not None:
            self._prefixes.drop(run.sequence)
        elif run.reads and not run.prompt.is_read:  # another sample that was admitted reads the prompt from here on
            run.reads = False
            for heir in self._runs:
                if heir.prompt is run.prompt:
                    heir.reads = True
                    self._admission.promise(heir)
                    break
        run.ended, run.choices, run.sequence = True, None, None

    def _leave(self, sequence: Sequence) -> None:
        """Keep a sequence for later requests."""
        self._prefixes.leave(sequence, [s for run in self._runs if (s := run.held) is not None])

    def _end_abandoned(self) -> None:
        while self._abandoned:
            run = self._abandoned[0]
            del run.ids[run.n_fetched :]
            run.steps.clear()
            self._end(run)
            self._abandoned.popleft()  # after its end, which may be interrupted
