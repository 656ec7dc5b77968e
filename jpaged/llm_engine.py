"""Requests in, outputs out, a step at a time: the engine under `LLM` and under a server."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

import jax

from . import interrupts
from .beam_search_params import BeamSearchParams
from .block_manager import BlockManager
from .config import EngineConfig
from .memory import num_blocks_that_fit
from .outputs import RequestOutput
from .request import BeamSearchRequest, Request, Sampled, SamplingRequest
from .request_builder import RequestBuilder, Tokenizer
from .runner import Model, PromptLogprobs, Runner, StepInFlight, StepResult
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .scheduler_output import SchedulerOutput
from .sequence import Sequence as TokenSequence


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made."""

    num_running: int
    """Requests that hold blocks of the device."""
    num_waiting: int
    num_swapped: int
    """Those of the waiting whose blocks are on the host."""
    num_preemptions: int
    num_blocks: int
    num_free_blocks: int
    """Cached blocks that nobody holds count as free."""
    num_host_blocks: int
    num_free_host_blocks: int
    peak_blocks: int
    """Most blocks held at once."""
    held_slot_steps: int
    """KV slots in held blocks, summed over steps."""
    used_slot_steps: int
    """Those of them that carried a token."""
    prompt_tokens: int
    """Of all requests that were added."""
    generation_tokens: int
    prefix_cache_queries: int
    """Prompt tokens that were looked up in the prefix cache: of requests that were admitted, each counted once."""
    prefix_cache_hits: int
    """Those of them that were found."""
    steps: int
    compiled_shapes: int
    """Programs compiled: one for each shape of a step, and for each set of things asked of the sampler."""
    compile_seconds: float


class _Flight(NamedTuple):
    """A step that is scheduled and not yet in the books; `step` is None where the device had nothing to do."""

    output: SchedulerOutput
    step: StepInFlight | None


class LLMEngine:
    """Continuous batching over one model: requests join and leave between steps.

    While the device computes a step, the host schedules and starts the next one: a sampled token goes from step to
    step without leaving the device. What ends a request and is seen only then, a stop token or a stop string, costs
    one surplus token, which is discarded. Only beam searches wait for the host between their steps.

    A step that fails, for want of memory, say, ends the requests that had a part in it with an error; all others are
    computed anew. A request whose logits are not numbers ends with an error too.

    Args:
      model: a pytree with `config`, `step` and `logits` (see `models.Llama`).
      tokenizer: None for a model without one; prompts are then token ids, and outputs have no text.
      config: sizes and limits.
      on_compile: told what is to be compiled, "a step of 64 tokens", before it is.

    Raises ValueError where the cache does not fit the device's memory, or `max_model_len` is beyond the model's.

    >>> engine = LLMEngine(model, tokenizer, EngineConfig(num_blocks=64))      # doctest: +SKIP
    >>> engine.add_request("a", "The capital of France is", SamplingParams())  # doctest: +SKIP
    >>> while engine.has_unfinished():                                         # doctest: +SKIP
    ...     for output in engine.step():
    ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        on_compile: Callable[[str], None] = lambda what: None,
    ) -> None:
        limits = model.config
        self.config = config
        self.max_model_len = config.max_model_len or limits.max_len
        if self.max_model_len > limits.max_len:
            raise ValueError(
                f"max_model_len: expected at most the model's {limits.max_len}, got {config.max_model_len}"
            )
        self._builder = RequestBuilder(
            config,
            tokenizer,
            vocab_size=limits.vocab_size,
            eos_token_ids=frozenset((*limits.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ()))),
            max_model_len=self.max_model_len,
        )
        weight: jax.Array = jax.tree.leaves(model)[0]
        token_bytes = 2 * limits.num_layers * limits.num_kv_heads * limits.head_dim * weight.dtype.itemsize
        num_blocks = num_blocks_that_fit(
            block_bytes=token_bytes * config.block_size,
            wanted=config.num_blocks,
            most_useful=config.max_num_seqs * -(-self.max_model_len // config.block_size),
            memory_utilization=config.memory_utilization,
            beside=weight,
        )
        self._blocks = BlockManager(
            num_blocks,
            config.block_size,
            num_host_blocks=config.num_host_blocks,
            prefix_caching=config.enable_prefix_caching,
        )
        max_num_batched_tokens = config.max_num_batched_tokens
        if config.batch_invariant:
            max_num_batched_tokens = min(max_num_batched_tokens, config.max_num_seqs)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            preemption=config.preemption,
        )
        self._runner = Runner(
            model,
            num_blocks=num_blocks,
            num_host_blocks=config.num_host_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            batch_invariant=config.batch_invariant,
            on_compile=on_compile,
        )
        self._flights: deque[_Flight] = deque()  # in the order in which they run; at most two
        self._requests: dict[str, Request] = {}
        self._sequences: dict[int, tuple[Request, TokenSequence]] = {}  # of these requests, by seq_id
        self._to_report: dict[str, None] = {}  # requests that ended, or got a token, since the last report
        self._num_prompt_tokens = self._num_generated = self._num_steps = 0
        self._peak_blocks = self._held_slots = self._used_slots = 0

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request.

        Args:
          priority: lower is served first and preempted last; among equals, who came first.
          cache_salt: prefixes are shared only among requests of the same salt.

        Raises ValueError or TypeError for what cannot be served, and has then done nothing.
        """
        self._add(request_id, prompt, params, priority, cache_salt, keeps_prefix=False)

    def add_prefix(self, request_id: str, prompt: str | Sequence[int], *, cache_salt: str | None = None) -> None:
        """Queues a prompt to be computed, whose full blocks stay held for others to find until `release_prefix`.

        Raises what `add_request` raises, and ValueError where prefix caching is off.
        """
        if not self.config.enable_prefix_caching:
            raise ValueError("add_prefix: expected enable_prefix_caching=True, got False")
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        self._add(request_id, prompt, params, 0, cache_salt, keeps_prefix=True)

    def release_prefix(self, request_id: str) -> None:
        """Lets go of the blocks of a prefix: they stay cached until they are needed. KeyError where none are kept."""
        self._scheduler.release_prefix(request_id)

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Takes in one step, while the next one runs; returns the requests that got a token or ended in it.

        With `only_finished`, those that ended: to write down how far all the others have come is much of what the host
        does between two steps, so whoever does not stream should not ask for it.

        Ctrl-C may end it at any moment, and loses nothing: the steps that follow go on from there.
        """
        self._start_steps()
        self._finish_step()
        while self._flights and self._flights[0].step is None:
            self._finish_step()
        self._finish_surplus()
        request_ids, self._to_report = self._to_report, {}
        requests = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [self._output(request) for request in requests if not only_finished or request.has_finished]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and returns it as far as it came; None for one that is not (or no longer) known."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        with interrupts.held_back():
            self._scheduler.abort(request_id)
            output = self._output(request)
        self._finish_surplus()
        return output

    def has_unfinished(self) -> bool:
        """Whether a further `step` has something to do."""
        return self._scheduler.has_unfinished() or any(name in self._requests for name in self._to_report)

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done so far."""
        scheduler, blocks = self._scheduler, self._blocks
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_swapped=scheduler.num_swapped,
            num_preemptions=scheduler.num_preemptions,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_host_blocks=blocks.num_host_blocks,
            num_free_host_blocks=blocks.num_free_host_blocks,
            peak_blocks=self._peak_blocks,
            held_slot_steps=self._held_slots,
            used_slot_steps=self._used_slots,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generated,
            prefix_cache_queries=scheduler.num_prompt_tokens if self.config.enable_prefix_caching else 0,
            prefix_cache_hits=scheduler.num_cached_tokens,
            steps=self._num_steps,
            compiled_shapes=self._runner.num_programs,
            compile_seconds=self._runner.compile_seconds,
        )

    def _add(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | BeamSearchParams,
        priority: int,
        cache_salt: str | None,
        *,
        keeps_prefix: bool,
    ) -> None:
        request = self._builder.build(
            request_id, prompt, params, priority=priority, cache_salt=cache_salt, keeps_prefix=keeps_prefix
        )
        if request_id in self._requests:
            raise ValueError(f"request_id: expected one not in use, got {request_id!r}")
        self._scheduler.add(request.group)
        self._num_prompt_tokens += len(request.prompt_token_ids)
        self._requests[request_id] = request
        for sequence in request.group.sequences:
            self._sequences[sequence.seq_id] = request, sequence

    # Steps.

    def _start_steps(self) -> None:
        """Gives the device its next steps, until two are under way."""
        while len(self._flights) < 2:
            with interrupts.held_back():
                output = self._scheduler.schedule()
                self._report(*output.ended)
                step = None
                if not output.is_empty:
                    self._note_start(output)
                    try:
                        step = self._runner.start(output, len(self._sequences))
                    except Exception as error:
                        self._fail(error)
                        return
                    except BaseException:  # no fault of the step's: nobody's request is to end for it
                        self._lose_the_cache()
                        raise
                self._flights.append(_Flight(output, step))
            if output.is_empty:
                return

    def _finish_step(self) -> None:
        """Waits for the first of the steps under way, and takes in what it brings."""
        if not self._flights:
            return
        output, step = self._flights[0]
        result = None
        if step is not None:
            try:
                result = self._runner.finish(step)
            except Exception as error:
                self._fail(error)
                return
        with interrupts.held_back():
            self._flights.popleft()
            if result is None:
                self._scheduler.update(output, ())
            else:
                self._take(output, result)

    def _finish_surplus(self) -> None:
        """Steps that are under way when no request is left: what they bring is discarded, and their blocks are free."""
        while self._flights and not self._scheduler.has_unfinished():
            self._finish_step()

    def _fail(self, error: Exception) -> None:
        """A step failed: the requests in those under way end, and for all others the cache is as good as lost."""
        with interrupts.held_back():
            failed = self._scheduler.fail(f"a step failed: {type(error).__name__}: {error}")
            self._report(*[group.request_id for group in failed])
            self._lose_the_cache()

    def _lose_the_cache(self) -> None:
        """Forgets the steps under way; all requests are to be computed anew."""
        self._flights.clear()
        self._runner.reset()
        self._scheduler.preempt_all()

    def _take(self, output: SchedulerOutput, result: StepResult) -> None:
        """A step into the books."""
        self._runner.record(output, result)
        self._take_prompt_logprobs(result.prompt_logprobs)
        # A sequence that has ended since the step was started has no use for what it brings.
        samples = enumerate(output.samples.seq_ids)
        live = [(i, *self._sequences[seq_id]) for i, seq_id in samples if self._is_unfinished(seq_id)]
        has_nan = self._end_the_undrawable(live, result)
        self._scheduler.update(output, result.token_ids)
        beams: dict[BeamSearchRequest, dict[int, Sampled]] = {}
        now = monotonic()
        for i, request, sequence in live:
            if request.group.error is not None:
                continue
            self._num_generated += 1
            if request.first_token_time is None:
                request.first_token_time = now
            sampled = Sampled(result.token_ids[i], result.logprobs[i], result.top_token_ids[i], result.top_logprobs[i])
            if isinstance(request, BeamSearchRequest):
                beams.setdefault(request, {})[sequence.seq_id] = sampled
            elif isinstance(request, SamplingRequest):
                self._report(request.group.request_id)
                if request.take(sequence.seq_id, sampled) and sequence.finish_reason is None:
                    self._scheduler.finish(sequence.seq_id, "stop")
        for request, of_beams in beams.items():
            self._advance(request, of_beams)
        if has_nan:  # it may stand in blocks that others find
            self._flights.clear()
            self._scheduler.preempt_all()

    def _end_the_undrawable(self, live: list[tuple[int, Request, TokenSequence]], result: StepResult) -> bool:
        """Ends the requests for which there was no token to draw; whether the model is to blame for one of them."""
        has_nan = False
        for i, request, _ in live:
            if result.token_ids[i] < 0 and request.group.error is None:
                is_nan = math.isnan(result.logprobs[i])
                has_nan |= is_nan
                request.group.error = (
                    "the model's logits are not numbers"
                    if is_nan
                    else "no token may be drawn: the request's parameters rule out all of them"
                )
                for sequence in request.group.unfinished():
                    self._scheduler.finish(sequence.seq_id, "error")
                self._report(request.group.request_id)
        return has_nan

    def _advance(self, request: BeamSearchRequest, sampled: dict[int, Sampled]) -> None:
        """Chooses a beam search's next beams: forks those that go on more than once, and ends those that do not."""
        continuations = request.advance(sampled)
        parents = request.beams
        continued = {parents[parent] for parent, _ in continuations}
        for seq_id in parents:
            if seq_id not in continued:
                self._scheduler.finish(seq_id, "stop")
        beams: list[int] = []
        for parent, _ in continuations:
            seq_id = parents[parent]
            if seq_id in beams:
                index = len(request.group.sequences)
                child = self._scheduler.fork(seq_id, self._builder.new_seq_id(), index)
                self._sequences[child.seq_id] = request, child
                seq_id = child.seq_id
            beams.append(seq_id)
        for seq_id, (_, token_id) in zip(beams, continuations, strict=True):
            self._scheduler.append_token(seq_id, token_id)
        request.beams = beams
        if not beams:
            self._report(request.group.request_id)

    def _take_prompt_logprobs(self, found: list[PromptLogprobs]) -> None:
        for seq_id, start, logprobs, top_token_ids, top_logprobs in found:
            if self._is_unfinished(seq_id):
                request, sequence = self._sequences[seq_id]
                assert isinstance(request, SamplingRequest)
                for i, logprob in enumerate(logprobs.tolist()):
                    token_id = sequence.token_ids[start + i]
                    request.take_prompt(start + i, Sampled(token_id, logprob, top_token_ids[i], top_logprobs[i]))

    def _is_unfinished(self, seq_id: int) -> bool:
        found = self._sequences.get(seq_id)
        return found is not None and found[1].finish_reason is None

    def _note_start(self, output: SchedulerOutput) -> None:
        """For the statistics: a step that has been scheduled is about to start."""
        for new in output.new_rows:
            request, _ = self._sequences[new.seq_id]
            if request.scheduled_time is None:
                request.scheduled_time = monotonic()
        held = self._blocks.num_blocks - self._blocks.num_free_blocks
        self._num_steps += 1
        self._held_slots += held * self._blocks.block_size
        self._used_slots += held * self._blocks.block_size - self._scheduler.num_unused_slots
        self._peak_blocks = max(self._peak_blocks, held)

    def _report(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self._to_report[request_id] = None

    def _output(self, request: Request) -> RequestOutput:
        """The request as it stands; forgets it once it has ended."""
        output = request.output()
        if output.finished:
            del self._requests[request.group.request_id]
            for sequence in request.group.sequences:
                del self._sequences[sequence.seq_id]
        return output
