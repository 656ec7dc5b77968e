"""What comes back for a request: its texts and tokens so far, and what it took."""

from dataclasses import dataclass

from .sequence import FinishReason


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One sample of a request, as far as it has come."""

    index: int
    """Of the sample within its request, or the hypothesis's rank."""
    text: str
    """Whole characters only, and nothing that may yet turn out to be a stop string."""
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    """Sum of the tokens' log-probabilities by the model's own distribution."""
    logprobs: tuple[dict[int, float], ...] | None
    """For each token the log-probabilities, by token id, of itself and of the likeliest `SamplingParams.logprobs`."""
    finish_reason: FinishReason | None
    """"stop" (EOS, a stop token or string), "length", "abort", "error", or None while it goes on."""


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds on `time.monotonic`'s clock."""

    arrival_time: float
    scheduled_time: float | None
    """When its first step was started."""
    first_token_time: float | None
    finished_time: float | None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request, as far as it has come."""

    request_id: str
    prompt: str | None
    """None where the prompt came as token ids."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    """`SamplingParams.n` of them; of a beam search, once it has ended, its hypotheses by score, the best first."""
    finished: bool
    error: str | None
    """Why it ended, where its finish_reason is "error"."""
    num_cached_tokens: int | None
    """Tokens of the prompt that were found in the prefix cache; None until it has been looked up."""
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None
    """For each token of the prompt the log-probabilities, by token id, of itself and of the likeliest
    `SamplingParams.prompt_logprobs`; None for the first, which follows nothing, and for those not computed yet."""
    metrics: RequestMetrics
