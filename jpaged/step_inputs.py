"""A step as arrays: from the scheduler's output to what one compiled program takes."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from .sampling_params import MAX_LOGPROBS, SamplingParams
from .sampling_rows import SamplingInputs, SamplingRows, pad, power_of_two
from .scheduler_output import ScheduledSequence, SchedulerOutput

MIN_PREFILL_TOKENS = 16
MIN_SEQS = 8


class StepShape(NamedTuple):
    """What a step is compiled for; there are few of them."""

    tokens: int
    sequences: int
    is_decode: bool  # one token a sequence
    edits: int  # of logits
    is_restricted: bool  # some sample may draw but some tokens
    is_penalized: bool
    num_logprobs: int  # likeliest tokens of a sample that can be reported
    prompt_logprobs: bool


class StepInputs(NamedTuple):
    """One step of T tokens and R sequences, padding included; at most R samples.

    NumPy arrays as built here, JAX's within the step.
    """

    token_ids: Int32[Any, " T"]  # -1 - row stands for the row's last sample
    positions: Int32[Any, " T"]
    # See `PagedBatch`.
    block_tables: Int32[Any, "R max_blocks"]
    context_lens: Int32[Any, " R"]
    query_starts: Int32[Any, " R+1"]
    slot_mapping: Int32[Any, " T"]
    num_decodes: Int32[Any, ""]
    # Of each sample.
    token_index: Int32[Any, " R"]  # which of the T tokens it follows
    rows: Int32[Any, " R"]  # whose last sample it becomes; max_num_seqs for padding
    sample_positions: Int32[Any, " R"]  # where it will stand in its sequence
    sampling: SamplingInputs
    wants_logprobs: Any  # bool []
    # The tokens that follow the T ones in their prompts; none at all where no prompt_logprobs are asked for.
    next_prompt_tokens: Int32[Any, " T"]


class _Paged(NamedTuple):
    """What the sequences of a `PagedBatch` are, without padding."""

    rows: np.ndarray  # whose block tables they have
    context_lens: np.ndarray
    query_starts: np.ndarray
    num_decodes: int


class StepBuilder:
    """Remembers each row's block table and sampling parameters, and lays out steps padded to few shapes.

    Decodes are padded to 1 sequence, or to a power of two of at least `MIN_SEQS`. A step with prefills is padded to a
    power of two of tokens, or three quarters of one, and to `MIN_SEQS` or else `max_num_seqs` sequences.

    If `batch_invariant`, every step is padded to one shape, and each of its tokens is laid out as a sequence of its
    own, a decode: what is computed for a token, and by which program, then depends on no other token of the step.
    """

    def __init__(
        self,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        batch_invariant: bool = False,
    ) -> None:
        self._batch_invariant = batch_invariant
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max(max_num_batched_tokens, max_num_seqs)
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._prompts: dict[int, tuple[int, ...]] = {}  # by row, of those that want prompt_logprobs
        self.rows = SamplingRows(max_num_seqs, vocab_size)

    def update_rows(self, output: SchedulerOutput) -> None:
        """Takes in what a step changes of rows and tables."""
        for new in output.new_rows:
            self.rows.occupy(new)
            self._prompts.pop(new.row, None)
            if isinstance(new.params, SamplingParams) and new.params.prompt_logprobs is not None:
                self._prompts[new.row] = tuple(new.token_ids[: new.prompt_len])
        for row, first, block_ids in output.table_updates:
            self._tables[row, first : first + len(block_ids)] = block_ids

    def build(self, output: SchedulerOutput) -> tuple[StepShape, StepInputs]:
        """The step, which must have tokens; `update_rows` comes first."""
        sequences, n = output.sequences, output.num_tokens
        row, start, lens = sequences.rows, sequences.starts, sequences.lengths
        ends = np.cumsum(lens, dtype=np.int32)
        of_token = np.repeat(np.arange(len(sequences)), lens)  # each token's sequence
        position = np.arange(n, dtype=np.int32) + (start + lens - ends)[of_token]
        paged = _Paged(row, start + lens, np.append(np.int32(0), ends), sequences.num_decodes)
        if self._batch_invariant:
            paged = _Paged(row[of_token], position + 1, np.arange(n + 1, dtype=np.int32), n)
        is_decode = paged.num_decodes == n
        T, R = self._padded(n, max(len(paged.rows), len(output.samples)), is_decode)

        token_ids = np.zeros(T, np.int32)
        token_ids[: sequences.num_sampled] = -1 - row[: sequences.num_sampled]
        token_ids[sequences.num_sampled : n] = sequences.token_ids
        block, offset = np.divmod(position, self._block_size)
        slot = self._tables[row[of_token], block] * self._block_size + offset

        sample_row, token_index = output.samples.rows, output.samples.token_indices
        sample_position = position[token_index] + 1
        num_logprobs = self.rows.num_logprobs(sample_row)
        inputs = StepInputs(
            token_ids=token_ids,
            positions=pad(position, T),
            block_tables=pad(self._tables[paged.rows], R),
            context_lens=pad(paged.context_lens, R),
            query_starts=pad(paged.query_starts, R + 1, n),
            slot_mapping=pad(slot, T, -1),
            num_decodes=np.array(paged.num_decodes, np.int32),
            token_index=pad(token_index, R),
            rows=pad(sample_row, R, self._max_num_seqs),
            sample_positions=pad(sample_position, R),
            sampling=self.rows.lay_out(sample_row, sample_position, R),
            wants_logprobs=np.array(num_logprobs > 0),
            next_prompt_tokens=self._next_prompt_tokens(output, ends, T),
        )
        shape = StepShape(
            tokens=T,
            sequences=R,
            is_decode=is_decode,
            edits=len(inputs.sampling.edit_sample),
            is_restricted=inputs.sampling.allowed.shape[1] > 0,
            is_penalized=self.rows.is_penalized(sample_row),
            num_logprobs=max(MAX_LOGPROBS, power_of_two(num_logprobs)),
            prompt_logprobs=len(inputs.next_prompt_tokens) > 0,
        )
        return shape, inputs

    def num_prompt_logprobs(self, sequence: ScheduledSequence) -> int:
        """Of how many of a sequence's tokens in a step the successor's log-probability is asked for."""
        prompt_len = len(self._prompts.get(sequence.row, ()))
        return max(0, min(sequence.num_tokens, prompt_len - 1 - sequence.start))

    def _next_prompt_tokens(self, output: SchedulerOutput, ends: np.ndarray, T: int) -> np.ndarray:
        if not self._prompts:
            return np.zeros(0, np.int32)
        following = np.zeros(T, np.int32)
        is_wanted = False
        for sequence, end in zip(output.sequences, ends.tolist(), strict=True):
            if num := self.num_prompt_logprobs(sequence):
                first = end - sequence.num_tokens
                start = sequence.start + 1
                following[first : first + num] = self._prompts[sequence.row][start : start + num]
                is_wanted = True
        return following if is_wanted else following[:0]

    def _padded(self, num_tokens: int, num_seqs: int, is_decode: bool) -> tuple[int, int]:
        if self._batch_invariant:
            R = max(MIN_SEQS, self._max_num_seqs)
            return R, R
        if is_decode:
            R = 1 if num_seqs == 1 else min(max(MIN_SEQS, power_of_two(num_seqs)), self._max_num_seqs)
            return R, R
        R = min(MIN_SEQS, self._max_num_seqs)
        if num_seqs > R:
            R = self._max_num_seqs
        T = max(MIN_PREFILL_TOKENS, power_of_two(num_tokens))
        if num_tokens <= 3 * T // 4:
            T = 3 * T // 4
        return max(R, min(T, self._max_tokens)), R
