"""What a request asks of the sampler, and when it ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .arguments import as_strings, as_token_ids, check_bool, check_int, check_number

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn, and what ends it. Names and ranges are vLLM's and OpenAI's.

    What changes the odds is applied in this order: allowed_token_ids, bad_words, min_tokens and logit_bias; the
    penalties; temperature; top_k, top_p and min_p. Reported log-probabilities are the model's own, before all that.

    Checked on construction: TypeError for a wrong type (a bool is not a number), ValueError for a value out
    of range; each names the field, what was expected and what came. Token ids are checked against the width of the
    model's logits when the request is added.

    >>> SamplingParams(temperature=0.0, max_tokens=64, stop="###").stop
    ('###',)
    """

    n: int = 1  # samples drawn of one prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # 0: off
    presence_penalty: float = 0.0  # taken from the logit of each token that was generated before
    frequency_penalty: float = 0.0  # taken as many times as the token was generated before
    repetition_penalty: float = 1.0  # divides the logit of tokens of prompt and answer, or multiplies a negative one
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # what a token's logit gets, within ±100
    bad_words: str | Sequence[str] = ()  # texts never generated; held as a tuple
    allowed_token_ids: Sequence[int] | None = None  # no other is drawn; held as a tuple
    seed: int | None = None  # None: the engine chooses
    stop: str | Sequence[str] = ()  # held as a tuple
    stop_token_ids: Sequence[int] = ()  # held as a tuple
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0  # none of so many first tokens is an EOS or stop token
    logprobs: int | None = None  # so many likeliest tokens are reported beside the sampled one
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    detokenize: bool = True  # False: no text, token ids only
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        check_int("n", self.n, 1)
        check_number("temperature", self.temperature, 0, 2)
        check_number("top_p", self.top_p, 0, 1, open_low=True)
        check_int("top_k", self.top_k, -1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 0, float("inf"), open_low=True)
        check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens, note=" (max_tokens)")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None:
                check_int(name, number, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "bad_words", as_strings("bad_words", self.bad_words))
        object.__setattr__(self, "stop", as_strings("stop", self.stop, at_most=MAX_STOP_STRINGS))
        object.__setattr__(self, "stop_token_ids", as_token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = as_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids: expected at least one token id, or None, got ()")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.stop and not self.detokenize:
            raise ValueError(f"stop: expected none without detokenize, got {self.stop!r}")

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes what is said next."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def _logit_bias(value: object) -> dict[int, float]:
    expected = "logit_bias: expected a mapping of token ids to numbers"
    if not isinstance(value, Mapping):
        raise TypeError(f"{expected}, got {value!r}")
    for token_id, bias in value.items():
        is_typed = isinstance(token_id, int) and isinstance(bias, int | float)
        if not is_typed or isinstance(token_id, bool) or isinstance(bias, bool):
            raise TypeError(f"{expected}, got {token_id!r}: {bias!r}")
        if token_id < 0 or bias != bias:
            raise ValueError(f"{expected}, ids from 0 on and no NaN, got {token_id!r}: {bias!r}")
    return {token_id: float(min(max(bias, -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)) for token_id, bias in value.items()}
