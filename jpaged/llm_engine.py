"""Requests in, outputs out, a step at a time: the engine under `LLM` and under a server."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import jax
import numpy as np

from . import interrupts
from .block_manager import BlockManager
from .config import EngineConfig
from .memory import num_blocks_that_fit
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .runner import Model, Runner, StepResult
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .scheduler_output import Samples
from .sequence import Sequence as TokenSequence
from .sequence import SequenceGroup
from .step_inputs import StepShape
from .text_stream import Detokenizer, TextStream


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer (see `models.Tokenizer`)."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...
    def stream(self, skip_special_tokens: bool, /) -> Detokenizer: ...


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made."""

    num_running: int
    """Requests that hold blocks."""
    num_waiting: int
    num_preemptions: int
    num_blocks: int
    num_free_blocks: int
    peak_blocks: int
    """Most blocks held at once."""
    held_slot_steps: int
    """KV slots in held blocks, summed over steps."""
    used_slot_steps: int
    """Those of them that carried a token."""
    prompt_tokens: int
    generation_tokens: int
    steps: int
    compiled_shapes: int
    compile_seconds: float


@dataclass
class _Request:
    group: SequenceGroup
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    arrival_time: float
    samples: list["_Sample"] = field(default_factory=list)
    first_token_time: float | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None


@dataclass
class _Sample:
    """What is gathered of one sequence beside its tokens."""

    request: _Request
    sequence: TokenSequence
    stream: TextStream
    ended_by_string: bool = False
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, float]] = field(default_factory=list)

    def output(self) -> CompletionOutput:
        sequence = self.sequence
        if sequence.finish_reason is not None:
            self.stream.finish()
        return CompletionOutput(
            index=sequence.index,
            text=self.stream.text,
            token_ids=tuple(sequence.token_ids[sequence.prompt_len :]),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.request.group.params.logprobs is None else tuple(self.logprobs),
            finish_reason="stop" if self.ended_by_string else sequence.finish_reason,
        )


class LLMEngine:
    """Continuous batching over one model: requests join and leave between steps.

    Args:
      model: a pytree with `config`, `step` and `logits` (see `models.Llama`).
      tokenizer: None for a model without one; prompts are then token ids, and outputs have no text.
      config: sizes and limits.
      on_compile: told a step's shape before it is compiled.

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
        on_compile: Callable[[StepShape], None] = lambda shape: None,
    ) -> None:
        limits = model.config
        self.config = config
        self.max_model_len = config.max_model_len or limits.max_len
        if self.max_model_len > limits.max_len:
            raise ValueError(
                f"max_model_len: expected at most the model's {limits.max_len}, got {config.max_model_len}"
            )
        self._vocab_size = limits.vocab_size
        self._tokenizer = tokenizer
        self._eos_token_ids = {*limits.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        weight: jax.Array = jax.tree.leaves(model)[0]
        token_bytes = 2 * limits.num_layers * limits.num_kv_heads * limits.head_dim * weight.dtype.itemsize
        num_blocks = num_blocks_that_fit(
            block_bytes=token_bytes * config.block_size,
            wanted=config.num_blocks,
            most_useful=config.max_num_seqs * -(-self.max_model_len // config.block_size),
            memory_utilization=config.memory_utilization,
            beside=weight,
        )
        self._blocks = BlockManager(num_blocks, config.block_size)
        self._scheduler = Scheduler(
            self._blocks, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )
        self._runner = Runner(
            model,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            on_compile=on_compile,
        )
        self._requests: dict[str, _Request] = {}
        self._samples: dict[int, _Sample] = {}  # by seq_id
        self._seq_ids = count()
        self._num_requests = 0
        self._num_prompt_tokens = self._num_generated = self._num_steps = 0
        self._peak_blocks = self._held_slots = self._used_slots = 0
        self._to_report: list[SequenceGroup] = []  # that ended in `schedule`, or got a token

    def add_request(self, request_id: str, prompt: str | Sequence[int], params: SamplingParams) -> None:
        """Queues a request. Raises ValueError or TypeError for what cannot be served, and has then done nothing."""
        token_ids = self._check(prompt, params)
        if request_id in self._requests:
            raise ValueError(f"request_id: expected one not in use, got {request_id!r}")
        eos = () if params.ignore_eos else self._eos_token_ids
        group = SequenceGroup(
            request_id,
            [TokenSequence(next(self._seq_ids), index, list(token_ids)) for index in range(params.n)],
            params,
            frozenset((*eos, *params.stop_token_ids)),
            seed=(self.config.seed << 32) + self._num_requests if params.seed is None else params.seed,
            max_len=min(len(token_ids) + params.max_tokens, self.max_model_len),
            bad_words=self._bad_words(params),
        )
        self._scheduler.add(group)
        self._num_requests += 1
        self._num_prompt_tokens += len(token_ids)
        request = _Request(group, prompt if isinstance(prompt, str) else None, tuple(token_ids), time.monotonic())
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None for _ in token_ids]
        for sequence in group.sequences:
            sample = _Sample(request, sequence, TextStream(self._detokenizer(params), params))
            request.samples.append(sample)
            self._samples[sequence.seq_id] = sample
        self._requests[request_id] = request

    def step(self) -> list[RequestOutput]:
        """Computes one step; returns the requests that got a token or ended in it.

        If it raises, nothing is lost: what ran is computed anew by the steps that follow, unless it is aborted.
        """
        try:
            with interrupts.held_back():
                scheduled = self._scheduler.schedule()
                self._to_report += [self._requests[request_id].group for request_id in scheduled.ended]
            if scheduled.num_tokens:
                result = self._runner.finish(self._runner.start(scheduled))
                with interrupts.held_back():
                    self._count_slots(scheduled.num_tokens)
                    self._end_the_undrawable(scheduled.samples, result)
                    self._to_report += self._scheduler.update(scheduled, result.token_ids)
                    self._take(scheduled.samples, result)
        except BaseException:
            with interrupts.held_back():
                self._runner.reset()
                self._scheduler.preempt_all()
            raise
        groups, self._to_report = self._to_report, []
        return [
            self._output(self._requests[group.request_id]) for group in groups if group.request_id in self._requests
        ]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and returns it as far as it came; None for one that is not (or no longer) known."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        with interrupts.held_back():
            self._scheduler.abort(request_id)
            return self._output(request)

    def has_unfinished(self) -> bool:
        """Whether a further `step` has something to do."""
        return self._scheduler.has_unfinished()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preemptions=self._scheduler.num_preemptions,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free_blocks,
            peak_blocks=self._peak_blocks,
            held_slot_steps=self._held_slots,
            used_slot_steps=self._used_slots,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generated,
            steps=self._num_steps,
            compiled_shapes=len(self._runner.compile_seconds),
            compile_seconds=sum(self._runner.compile_seconds.values()),
        )

    def _check(self, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt's token ids, where all is well."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
        if params.n > self.config.max_num_seqs:
            raise ValueError(f"n: expected at most max_num_seqs ({self.config.max_num_seqs}), got {params.n}")
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(
                    f"{name}: expected none for a model without a tokenizer, got {getattr(params, name)!r}"
                )
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise TypeError("prompt: expected token ids for a model without a tokenizer, got a str")
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = _token_ids(prompt)
        self._check_token_ids("prompt", token_ids)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_token_ids("logit_bias", tuple(params.logit_bias or ()))
        if not token_ids:
            raise ValueError(f"prompt: expected at least one token, got none in {prompt!r}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt: expected fewer than {self.max_model_len} tokens, the model's length with at least one "
                f"to generate, got {len(token_ids)}"
            )
        return token_ids

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"{name}: expected token ids in [0, {self._vocab_size}), got {token_id}")

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The bad words in tokens: as a text begins with them and, where those are others, after a space."""
        if self._tokenizer is None:
            return ()
        spelled: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                spelled[tuple(self._tokenizer.encode(text, add_special_tokens=False))] = None
        return tuple(token_ids for token_ids in spelled if token_ids)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        return self._tokenizer.stream(params.skip_special_tokens)

    def _end_the_undrawable(self, sampled: Samples, result: StepResult) -> None:
        """Ends the requests for which there was no token to draw, before the step goes into the books."""
        for sample, token_id, logprob in zip(sampled, result.token_ids, result.logprobs, strict=True):
            if token_id < 0 and (group := self._samples[sample.seq_id].request.group).error is None:
                if math.isnan(logprob):
                    group.error = "the model's logits are not numbers"
                else:
                    group.error = "no token may be drawn: the request's parameters rule out all of them"
                for sequence in group.unfinished():
                    self._scheduler.finish(sequence.seq_id, "error")
                self._to_report.append(group)

    def _take(self, sampled: Samples, result: StepResult) -> None:
        """What the step sampled, into the requests: logprobs, text, and ends by stop strings."""
        now = time.monotonic()
        self._take_prompt_logprobs(result)
        for i, (seq_id, _, _) in enumerate(sampled):
            sample = self._samples[seq_id]
            request, token_id = sample.request, result.token_ids[i]
            if request.group.error is not None:
                continue
            self._num_generated += 1
            if request.first_token_time is None:
                request.first_token_time = now
            sample.cumulative_logprob += result.logprobs[i]
            if (n := request.group.params.logprobs) is not None:
                top = zip(result.top_token_ids[i, :n].tolist(), result.top_logprobs[i, :n].tolist(), strict=True)
                sample.logprobs.append({token_id: result.logprobs[i], **dict(top)})
            sequence = sample.sequence
            may_stop = len(sequence.token_ids) - sequence.prompt_len > request.group.params.min_tokens
            if sample.stream.add(token_id, may_stop=may_stop):
                sample.ended_by_string = True
                if sequence.finish_reason is None:
                    self._scheduler.finish(seq_id, "stop")

    def _take_prompt_logprobs(self, result: StepResult) -> None:
        for seq_id, start, logprobs, top_token_ids, top_logprobs in result.prompt_logprobs:
            request = self._samples[seq_id].request
            n = request.group.params.prompt_logprobs
            assert request.prompt_logprobs is not None
            for i, logprob in enumerate(logprobs.tolist()):
                top = zip(top_token_ids[i, :n].tolist(), top_logprobs[i, :n].tolist(), strict=True)
                token_id = request.prompt_token_ids[start + i]
                request.prompt_logprobs[start + i] = {token_id: logprob, **dict(top)}

    def _count_slots(self, num_tokens: int) -> None:
        """Counts the step's blocks: before the update, which commits its tokens and frees what has ended."""
        self._num_steps += 1
        self._held_slots += self._blocks.num_held_slots
        self._used_slots += self._blocks.num_used_slots + num_tokens
        self._peak_blocks = max(self._peak_blocks, self._blocks.num_blocks - self._blocks.num_free_blocks)

    def _output(self, request: _Request) -> RequestOutput:
        """The request as it stands; forgets it once it has ended."""
        group = request.group
        finished = not group.unfinished()
        if finished:
            del self._requests[group.request_id]
            for sample in request.samples:
                del self._samples[sample.sequence.seq_id]
        return RequestOutput(
            request_id=group.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(sample.output() for sample in request.samples),
            finished=finished,
            error=group.error,
            prompt_logprobs=None if request.prompt_logprobs is None else tuple(request.prompt_logprobs),
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_token_time=request.first_token_time,
                finished_time=time.monotonic() if finished else None,
            ),
        )


def _token_ids(prompt: Sequence[int]) -> list[int]:
    expected = "prompt: expected a str or a sequence of token ids"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(f"{expected}, got {type(prompt).__name__}")
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise TypeError(f"{expected}, got an element {token_id!r}")
    return [int(token_id) for token_id in prompt]
