"""Which beams go on, and which hypotheses have ended: beam search as Hugging Face's `generate` defines it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .beam_search_params import BeamSearchParams


def num_candidates(params: BeamSearchParams, num_end_tokens: int) -> int:
    """How many of the likeliest continuations are looked at: so many that beam_width of them do not end."""
    return params.beam_width * max(2, 1 + num_end_tokens)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One continuation of the prompt, running or ended."""

    token_ids: tuple[int, ...]
    logprob: float  # the sum of its tokens' log-probabilities
    has_end_token: bool = False  # else it goes on, or ended at max_tokens

    def score(self, length_penalty: float, length: int | None = None) -> float:
        """The log-probability over length ** length_penalty; its own length, unless another is given."""
        return self.logprob / (length or len(self.token_ids)) ** length_penalty


class Continuation(NamedTuple):
    """A running beam from now on: which of the beams before it continues, and with what token."""

    parent: int
    token_id: int


class BeamSearch:
    """The search of one request. No model, no blocks: log-probabilities in, decisions out.

    Args:
      params: width, length penalty and early stopping.
      end_token_ids: those that end a hypothesis.
      max_tokens: at which all end; `params.max_tokens`, or less where the model's length allows no more.

    >>> search = BeamSearch(BeamSearchParams(beam_width=2), frozenset({0}), max_tokens=2)
    >>> search.advance(np.array([[5, 7, 6, 0]]), np.array([[-0.1, -2.5, -3.0, -9.0]]))
    [Continuation(parent=0, token_id=5), Continuation(parent=0, token_id=7)]
    >>> search.advance(np.array([[6, 0], [4, 0]]), np.array([[-1.0, -0.5], [-0.2, -3.0]]))
    []
    >>> [hypothesis.token_ids for hypothesis in search.best()]
    [(5, 0), (5, 6)]
    """

    def __init__(self, params: BeamSearchParams, end_token_ids: frozenset[int], max_tokens: int) -> None:
        self._params = params
        self._end_token_ids = end_token_ids
        self._max_tokens = max_tokens
        self.running: list[Hypothesis] = [Hypothesis((), 0.0)]  # best first, in the order of their continuations
        self._ended: list[Hypothesis] = []  # best first, at most beam_width

    def advance(self, token_ids: np.ndarray, logprobs: np.ndarray) -> list[Continuation]:
        """Takes each running beam's likeliest next tokens [beams, n], at least `num_candidates` unless there are fewer.

        Returns the beams that run on, best first; none if the search is over.
        """
        width = self._params.beam_width
        candidates = self._candidates(token_ids, logprobs)
        hypotheses = [self._extended(*continuation) for continuation in candidates]
        is_last = len(hypotheses[0].token_ids) >= self._max_tokens
        self._end([h for h in hypotheses[:width] if is_last or h.has_end_token])
        going = [i for i, hypothesis in enumerate(hypotheses) if not hypothesis.has_end_token][:width]
        self.running = [] if is_last else [hypotheses[i] for i in going]
        if not self.running or self._is_over():
            self.running = []
            return []
        return [candidates[i][0] for i in going]

    def best(self) -> list[Hypothesis]:
        """At most `beam_width` hypotheses by their score, those that ended before those that run."""
        return [*self._ended, *self.running][: self._params.beam_width]

    def _candidates(self, token_ids: np.ndarray, logprobs: np.ndarray) -> list[tuple[Continuation, float]]:
        """The likeliest continuations of all beams together, best first, with their log-probability."""
        sums = logprobs.astype(np.float64) + np.array([[beam.logprob] for beam in self.running])
        order = np.argsort(-sums, axis=None, kind="stable")[: num_candidates(self._params, len(self._end_token_ids))]
        parents, places = np.unravel_index(order, sums.shape)
        return [
            (Continuation(int(parent), int(token_ids[parent, place])), float(sums[parent, place]))
            for parent, place in zip(parents, places, strict=True)
        ]

    def _extended(self, continuation: Continuation, logprob: float) -> Hypothesis:
        parent, token_id = continuation
        token_ids = (*self.running[parent].token_ids, token_id)
        return Hypothesis(token_ids, logprob, token_id in self._end_token_ids)

    def _end(self, hypotheses: list[Hypothesis]) -> None:
        penalty = self._params.length_penalty
        ended = sorted([*self._ended, *hypotheses], key=lambda h: h.score(penalty), reverse=True)
        self._ended = ended[: self._params.beam_width]

    def _is_over(self) -> bool:
        """Whether no running beam is taken to improve on beam_width ended hypotheses any more."""
        params = self._params
        if len(self._ended) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        best = self.running[0]
        longest = params.early_stopping == "never" and params.length_penalty > 0
        possible = best.score(params.length_penalty, self._max_tokens if longest else len(best.token_ids))
        return possible <= self._ended[-1].score(params.length_penalty)
