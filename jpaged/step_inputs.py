"""A step as arrays: from the scheduler's output to what one compiled program takes."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from .sampling_params import MAX_LOGPROBS, SamplingParams
from .sampling_rows import SamplingInputs, SamplingRows, SamplingShape, pad, power_of_two
from .scheduler_output import ScheduledSequence, SchedulerOutput

MIN_PREFILL_TOKENS = 16
MIN_SEQS = 8


class StepShape(NamedTuple):
    """What the model's part of a step is compiled for; there are few of them."""

    tokens: int
    sequences: int
    is_decode: bool  # one token a sequence

    def __str__(self) -> str:
        return f"a step of {self.tokens} tokens"


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
    token_index: Int32[Any, " R"]  # which of the T tokens each sample follows


class Step(NamedTuple):
    """All that the device needs of a step: for the model, then for the sampler."""

    shape: StepShape
    inputs: StepInputs
    sampling_shape: SamplingShape
    sampling: SamplingInputs
    # The tokens that follow the T ones in their prompts; None where no prompt_logprobs are asked for.
    next_prompt_tokens: np.ndarray | None


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

    If `batch_invariant`, every step is padded to one shape, each of its tokens is laid out as a sequence of its own, a
    decode, and every sample is drawn as if all were asked for: what is computed for a token, and by which program, then
    depends on no other token of the step.
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

    def build(self, output: SchedulerOutput) -> Step:
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

        samples = output.samples
        sampling_shape, sampling = self.rows.lay_out(samples.rows, position[samples.token_indices] + 1, R)
        if self._batch_invariant:
            likeliest = max(sampling_shape.num_logprobs, MAX_LOGPROBS)
            sampling_shape = sampling_shape._replace(draws=True, cuts=True, num_logprobs=likeliest)
        inputs = StepInputs(
            token_ids=token_ids,
            positions=pad(position, T),
            block_tables=pad(self._tables[paged.rows], R),
            context_lens=pad(paged.context_lens, R),
            query_starts=pad(paged.query_starts, R + 1, n),
            slot_mapping=pad(slot, T, -1),
            num_decodes=np.array(paged.num_decodes, np.int32),
            token_index=pad(samples.token_indices, R),
        )
        following = self._next_prompt_tokens(output, ends, T)
        return Step(StepShape(T, R, is_decode), inputs, sampling_shape, sampling, following)

    def decode_shape(self, num_seqs: int) -> StepShape:
        """Of a step in which so many sequences, or as many as may run, decode."""
        num_seqs = min(num_seqs, self._max_num_seqs)
        return StepShape(*self._padded(num_seqs, num_seqs, is_decode=True), is_decode=True)

    def blank(self, shape: StepShape) -> StepInputs:
        """Inputs of a shape, of no meaning."""
        T, R = shape.tokens, shape.sequences
        of_tokens, of_sequences = np.zeros(T, np.int32), np.zeros(R, np.int32)
        return StepInputs(
            token_ids=of_tokens,
            positions=of_tokens,
            block_tables=np.zeros((R, self._tables.shape[1]), np.int32),
            context_lens=of_sequences,
            query_starts=np.zeros(R + 1, np.int32),
            slot_mapping=of_tokens,
            num_decodes=np.zeros((), np.int32),
            token_index=of_sequences,
        )

    def num_prompt_logprobs(self, sequence: ScheduledSequence) -> int:
        """Of how many of a sequence's tokens in a step the successor's log-probability is asked for."""
        prompt_len = len(self._prompts.get(sequence.row, ()))
        return max(0, min(sequence.num_tokens, prompt_len - 1 - sequence.start))

    def _next_prompt_tokens(self, output: SchedulerOutput, ends: np.ndarray, T: int) -> np.ndarray | None:
        if not self._prompts:
            return None
        following = np.zeros(T, np.int32)
        is_wanted = False
        for sequence, end in zip(output.sequences, ends.tolist(), strict=True):
            if num := self.num_prompt_logprobs(sequence):
                first = end - sequence.num_tokens
                start = sequence.start + 1
                following[first : first + num] = self._prompts[sequence.row][start : start + num]
                is_wanted = True
        return following if is_wanted else None

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
