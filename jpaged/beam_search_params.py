"""What a request asks of beam search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .arguments import as_token_ids, check_bool, check_int, check_number

MAX_BEAM_WIDTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """The `beam_width` likeliest continuations found by keeping as many at every token, as Hugging Face defines it.

    A hypothesis's score is the sum of its tokens' log-probabilities over its length ** length_penalty.
    Checked on construction as `SamplingParams` are.

    >>> BeamSearchParams(beam_width=4, max_tokens=32).early_stopping
    False
    """

    beam_width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0  # above 0: the longer the better; below 0: the shorter
    # When a search that holds beam_width ended hypotheses is over. True: at once. False: when the best running beam,
    # ended now, would not be among them. "never": when no continuation of it could be.
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: Sequence[int] = ()  # end a hypothesis as an EOS does; held as a tuple
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        check_int("max_tokens", self.max_tokens, 1)
        check_number("length_penalty", self.length_penalty, float("-inf"), float("inf"))
        if self.early_stopping != "never" and not isinstance(self.early_stopping, bool):
            kind = ValueError if isinstance(self.early_stopping, str) else TypeError
            raise kind(f'early_stopping: expected True, False or "never", got {self.early_stopping!r}')
        for name in ("ignore_eos", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "stop_token_ids", as_token_ids("stop_token_ids", self.stop_token_ids))
