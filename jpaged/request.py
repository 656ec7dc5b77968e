"""A request on its way through the engine: what is gathered for it beside the tokens that its sequences hold."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .beam_search import BeamSearch, Continuation, Hypothesis
from .beam_search_params import BeamSearchParams
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .sampling_params import SamplingParams
from .sequence import FinishReason, Sequence, SequenceGroup
from .text_stream import TextStream

Logprobs = dict[int, float]


class Sampled(NamedTuple):
    """What a step brought for one sequence."""

    token_id: int
    logprob: float
    top_token_ids: np.ndarray  # int32 [n], best first; as many as the step could report, if anyone asked
    top_logprobs: np.ndarray  # float32 [n]


class Request(ABC):
    """What `SamplingRequest` and `BeamSearchRequest` have in common."""

    def __init__(self, group: SequenceGroup, prompt: str | None) -> None:
        self.group = group
        self.prompt = prompt
        self.prompt_token_ids = tuple(group.sequences[0].token_ids)
        self.arrival_time = time.monotonic()
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.prompt_logprobs: list[Logprobs | None] | None = None

    @abstractmethod
    def completions(self) -> tuple[CompletionOutput, ...]:
        """The answers, as far as they have come."""

    @property
    def has_finished(self) -> bool:
        """Whether nothing more will come."""
        return not self.group.unfinished()

    def output(self) -> RequestOutput:
        """The request as it stands."""
        finished = self.has_finished
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=self.completions(),
            finished=finished,
            error=self.group.error,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            num_cached_tokens=self.group.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                scheduled_time=self.scheduled_time,
                first_token_time=self.first_token_time,
                finished_time=time.monotonic() if finished else None,
            ),
        )


@dataclass
class _Sample:
    """One of a request's samples."""

    sequence: Sequence
    stream: TextStream
    ended_by_string: bool = False
    cumulative_logprob: float = 0.0
    logprobs: list[Logprobs] = field(default_factory=list)


class SamplingRequest(Request):
    """`params.n` samples of one prompt."""

    def __init__(
        self, group: SequenceGroup, prompt: str | None, params: SamplingParams, new_stream: Callable[[], TextStream]
    ) -> None:
        super().__init__(group, prompt)
        self._params = params
        self._samples = {sequence.seq_id: _Sample(sequence, new_stream()) for sequence in group.sequences}
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in self.prompt_token_ids]

    def take(self, seq_id: int, sampled: Sampled) -> bool:
        """The token that a sequence now ends with; True if it completed a stop string."""
        sample = self._samples[seq_id]
        sample.cumulative_logprob += sampled.logprob
        if self._params.logprobs is not None:
            sample.logprobs.append(_likeliest(sampled, self._params.logprobs))
        num_generated = len(sample.sequence.token_ids) - sample.sequence.prompt_len
        sample.ended_by_string = sample.stream.add(sampled.token_id, may_stop=num_generated > self._params.min_tokens)
        return sample.ended_by_string

    def take_prompt(self, position: int, sampled: Sampled) -> None:
        """What the model thought of the prompt's token at this position."""
        assert self.prompt_logprobs is not None
        assert self._params.prompt_logprobs is not None
        if position < len(self.prompt_logprobs):
            self.prompt_logprobs[position] = _likeliest(sampled, self._params.prompt_logprobs)

    def completions(self) -> tuple[CompletionOutput, ...]:
        return tuple(self._completion(sample) for sample in self._samples.values())

    def _completion(self, sample: _Sample) -> CompletionOutput:
        sequence = sample.sequence
        if sequence.finish_reason is not None:
            sample.stream.finish()
        return CompletionOutput(
            index=sequence.index,
            text=sample.stream.text,
            token_ids=tuple(sequence.token_ids[sequence.prompt_len :]),
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=None if self._params.logprobs is None else tuple(sample.logprobs),
            finish_reason="stop" if sample.ended_by_string else sequence.finish_reason,
        )


class BeamSearchRequest(Request):
    """The beams of one prompt; a running beam is a sequence of the group."""

    def __init__(
        self,
        group: SequenceGroup,
        prompt: str | None,
        params: BeamSearchParams,
        new_stream: Callable[[], TextStream],
    ) -> None:
        super().__init__(group, prompt)
        max_tokens = group.max_len - len(self.prompt_token_ids)
        self._search = BeamSearch(params, group.stop_token_ids, max_tokens)
        self._new_stream = new_stream
        self.beams = [group.sequences[0].seq_id]  # of the running, best first

    def advance(self, sampled: dict[int, Sampled]) -> list[Continuation]:
        """Takes each beam's likeliest next tokens; returns how the beams go on, and none when the search is over."""
        best = [sampled[seq_id] for seq_id in self.beams]
        return self._search.advance(np.array([s.top_token_ids for s in best]), np.array([s.top_logprobs for s in best]))

    def completions(self) -> tuple[CompletionOutput, ...]:
        """None until the search has ended."""
        if self.group.unfinished():
            return ()
        return tuple(self._completion(index, found) for index, found in enumerate(self._search.best()))

    def _completion(self, index: int, found: Hypothesis) -> CompletionOutput:
        stream = self._new_stream()
        for token_id in found.token_ids:
            stream.add(token_id)
        stream.finish()
        reason: FinishReason = "stop" if found.has_end_token else "length"
        if found in self._search.running:
            reason = "abort" if self.group.error is None else "error"
        return CompletionOutput(
            index=index,
            text=stream.text,
            token_ids=found.token_ids,
            cumulative_logprob=found.logprob,
            logprobs=None,
            finish_reason=reason,
        )


def _likeliest(sampled: Sampled, n: int) -> Logprobs:
    """The log-probabilities of the token itself and of the n likeliest."""
    top = zip(sampled.top_token_ids[:n].tolist(), sampled.top_logprobs[:n].tolist(), strict=True)
    return {sampled.token_id: sampled.logprob, **dict(top)}
