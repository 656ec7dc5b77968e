"""What a request asks of the sampler, and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn, and what ends it. Names and ranges are vLLM's and OpenAI's.

    Checked on construction: TypeError for a wrong type (a bool is not a number), ValueError for a value out
    of range; each names the field, what was expected and what came.

    >>> SamplingParams(temperature=0.0, max_tokens=64, stop="###").stop
    ('###',)
    """

    n: int = 1  # samples drawn of one prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0  # 0: off
    seed: int | None = None  # None: the engine chooses
    stop: str | Sequence[str] = ()  # held as a tuple
    stop_token_ids: Sequence[int] = ()  # held as a tuple
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0  # none of so many first tokens is an EOS or stop token
    logprobs: int | None = None  # so many likeliest tokens are reported beside the sampled one
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1)
        _check_number("temperature", self.temperature, 0, 2)
        _check_number("top_p", self.top_p, 0, 1, open_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens, note=" (max_tokens)")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {value!r}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))


def _check_int(name: str, value: object, low: int, high: int | None = None, note: str = "") -> None:
    expected = f"an int >= {low}" if high is None else f"an int in [{low}, {high}{note}]"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_number(name: str, value: object, low: int, high: int, *, open_low: bool = False) -> None:
    expected = f"a number in {'(' if open_low else '['}{low}, {high}]"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    # Stated positively: no comparison holds for NaN.
    if not (low <= value <= high) or (open_low and value == low):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _stop_strings(value: object) -> tuple[str, ...]:
    expected = f"stop: expected a str or a sequence of at most {MAX_STOP_STRINGS} of them, none empty"
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{expected}, got {value!r}")
    if len(strings) > MAX_STOP_STRINGS or "" in strings:
        raise ValueError(f"{expected}, got {value!r}")
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    expected = "stop_token_ids: expected a sequence of ints >= 0"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{expected}, got {value!r}")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        raise TypeError(f"{expected}, got {value!r}")
    if any(token < 0 for token in value):
        raise ValueError(f"{expected}, got {value!r}")
    return tuple(value)
