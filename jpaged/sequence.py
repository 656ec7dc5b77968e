"""One sample's tokens (`Sequence`) and the request it belongs to (`SequenceGroup`)."""

from array import array
from dataclasses import dataclass, field
from typing import Literal

from .beam_search_params import BeamSearchParams
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(slots=True, eq=False)
class Sequence:
    """The prompt and the tokens generated after it, of one of a request's `n` samples, or of one beam.

    >>> sequence = Sequence(seq_id=7, index=0, token_ids=[11, 12, 13])
    >>> sequence.prompt_len, sequence.num_computed
    (3, 0)
    """

    # Set once, by the engine.
    seq_id: int  # never used twice in an engine's life
    index: int  # of the sample within its request
    prompt_len: int = field(init=False)

    # Written by the Scheduler alone.
    token_ids: list[int]  # prompt + generated
    num_computed: int = field(default=0, init=False)  # tokens in the cache; not kept up while in the DecodeBatch
    num_slots: int = field(default=0, init=False)  # tokens that its blocks have room for; 0: it holds none
    num_committed: int = field(default=0, init=False)  # tokens committed to the BlockManager
    packed_ids: array[int] | None = field(default=None, init=False)  # token_ids, while they are being computed
    is_decoding: bool = field(default=False, init=False)  # a member of the DecodeBatch
    row: int | None = field(default=None, init=False)  # in the runner's state, as long as the sequence runs
    finish_reason: FinishReason | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("token_ids: expected at least one token, got none")
        self.prompt_len = len(self.token_ids)

    def fork(self, seq_id: int, index: int) -> "Sequence":
        """Another sequence with the same prompt and the same tokens generated so far."""
        child = Sequence(seq_id, index, list(self.token_ids))
        child.prompt_len = self.prompt_len
        return child


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """One request: its sequences are scheduled, preempted and ended by error together.

    Of a request with n samples, `sequences` are all n from the start: the first one's prompt is computed, and the
    others fork from it. Of a beam search it is one, and `Scheduler.fork` makes the others.
    """

    # Set once, by the engine.
    request_id: str
    sequences: list[Sequence]  # to which Scheduler.fork adds
    params: SamplingParams | BeamSearchParams
    stop_token_ids: frozenset[int]  # params.stop_token_ids and, unless params.ignore_eos, the EOS tokens
    seed: int  # params.seed, or the engine's choice
    max_len: int  # tokens a sequence may reach: prompt + max_tokens, at most the model's length
    bad_words: tuple[tuple[int, ...], ...] = ()  # params.bad_words, each way of spelling them in tokens
    priority: int = 0  # lower is served first; among equals, who came first
    cache_salt: str | None = None  # blocks are shared only with requests of the same salt
    beam_width: int | None = None  # not None: the host chooses every token, for up to so many unfinished sequences
    needs_prompt_logits: bool = False  # every prompt token is computed: none is taken from the prefix cache
    keeps_prefix: bool = False  # the blocks that its prompt fills stay held until Scheduler.release_prefix

    # Written by the Scheduler alone.
    order: tuple[int, int] = field(default=(0, 0), init=False)  # priority, arrival: the lower is served first
    spare_rows: list[int] = field(default_factory=list, init=False)  # for sequences that are still to be forked
    is_forked: bool = field(default=True, init=False)  # else the first sequence computes the prompt of all
    is_swapped: bool = field(default=False, init=False)  # its blocks are on the host
    error: str | None = field(default=None, init=False)  # why the sequences ended with "error"
    num_cached_tokens: int | None = field(default=None, init=False)  # of the prompt, found when first admitted

    @property
    def min_tokens(self) -> int:
        """None of so many first tokens ends a sequence."""
        return self.params.min_tokens if isinstance(self.params, SamplingParams) else 0

    def unfinished(self) -> list[Sequence]:
        """The sequences that still want tokens, in order of their index."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]
