"""A step as arrays: from the scheduler's output to what one compiled program takes."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from .scheduler_output import SchedulerOutput

MIN_PREFILL_TOKENS = 16
MIN_SEQS = 8
MIN_SUPPRESSED = 16


class StepShape(NamedTuple):
    """What a step is compiled for; there are few of them."""

    tokens: int
    sequences: int
    suppressed: int
    is_decode: bool  # one token a sequence


class StepInputs(NamedTuple):
    """One step of T tokens and R sequences, padding included; at most one sample a sequence.

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
    sample_index: Int32[Any, " R"]  # within its request
    seed: UInt32[Any, "R 2"]
    temperature: Float32[Any, " R"]
    top_k: Int32[Any, " R"]
    top_p: Float32[Any, " R"]
    min_p: Float32[Any, " R"]
    suppressed: Int32[Any, "E 2"]  # (sample, token id) that must not be drawn; sample R is padding
    wants_logprobs: Bool[Any, ""]


_ROW = np.dtype(
    [
        ("sample_index", np.int32),
        ("seed", np.uint32, 2),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("logprobs", np.int32),
        ("suppress_until", np.int32),  # no stop token is drawn at a position below this
    ]
)


class StepBuilder:
    """Remembers each row's block table and sampling parameters, and lays out steps padded to few shapes.

    Decodes are padded to 1 sequence, or to a power of two of at least `MIN_SEQS`. A step with prefills is padded to a
    power of two of tokens, or three quarters of one, and to `MIN_SEQS` or else `max_num_seqs` sequences.
    """

    def __init__(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max(max_num_batched_tokens, max_num_seqs)
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._rows = np.zeros(max_num_seqs, _ROW)
        self._stop_token_ids: list[tuple[int, ...]] = [()] * max_num_seqs

    def build(self, output: SchedulerOutput) -> tuple[StepShape, StepInputs]:
        """Takes in what changed of the rows, and returns the step, which must have tokens."""
        self._update_rows(output)
        sequences, n = output.sequences, output.num_tokens
        row, start, lens = sequences.rows, sequences.starts, sequences.lengths
        is_decode = bool(lens.max() == 1)
        T, R = self._padded(n, max(len(sequences), len(output.samples)), is_decode)

        ends = np.cumsum(lens, dtype=np.int32)
        of_token = np.repeat(np.arange(len(sequences)), lens)  # each token's sequence
        position = np.arange(n, dtype=np.int32) + (start + lens - ends)[of_token]
        token_ids = np.zeros(T, np.int32)
        token_ids[: sequences.num_sampled] = -1 - row[: sequences.num_sampled]
        token_ids[sequences.num_sampled : n] = sequences.token_ids
        block, offset = np.divmod(position, self._block_size)
        slot = self._tables[row[of_token], block] * self._block_size + offset

        sample_row, token_index = output.samples.rows, output.samples.token_indices
        sample_position = position[token_index] + 1
        asked = self._rows[sample_row]
        suppressed = self._suppressed(sample_row, sample_position, asked, R)
        inputs = StepInputs(
            token_ids=token_ids,
            positions=_pad(position, T),
            block_tables=_pad(self._tables[row], R),
            context_lens=_pad(start + lens, R),
            query_starts=_pad(np.append(np.int32(0), ends), R + 1, n),
            slot_mapping=_pad(slot, T, -1),
            num_decodes=np.array((lens == 1).sum(), np.int32),
            token_index=_pad(token_index, R),
            rows=_pad(sample_row, R, self._max_num_seqs),
            sample_positions=_pad(sample_position, R),
            sample_index=_pad(asked["sample_index"], R),
            seed=_pad(asked["seed"], R),
            temperature=_pad(asked["temperature"], R),
            top_k=_pad(asked["top_k"], R),
            top_p=_pad(asked["top_p"], R, 1),
            min_p=_pad(asked["min_p"], R),
            suppressed=suppressed,
            wants_logprobs=(asked["logprobs"] > 0).any(),
        )
        return StepShape(T, R, len(suppressed), is_decode), inputs

    def _update_rows(self, output: SchedulerOutput) -> None:
        for new in output.new_rows:
            params = new.params
            self._rows[new.row] = (
                new.sample_index,
                divmod(new.seed % 2**64, 2**32),
                params.temperature,
                min(params.top_k, np.iinfo(np.int32).max),
                params.top_p,
                params.min_p,
                params.logprobs or 0,
                min(new.prompt_len + params.min_tokens, np.iinfo(np.int32).max),
            )
            self._stop_token_ids[new.row] = tuple(new.stop_token_ids)
        for row, first, block_ids in output.table_updates:
            self._tables[row, first : first + len(block_ids)] = block_ids

    def _suppressed(self, row: np.ndarray, position: np.ndarray, asked: np.ndarray, R: int) -> np.ndarray:
        pairs = [
            (sample, token_id)
            for sample in np.flatnonzero(position < asked["suppress_until"]).tolist()
            for token_id in self._stop_token_ids[row[sample]]
        ]
        array = np.array(pairs, np.int32).reshape(-1, 2)
        return _pad(array, max(MIN_SUPPRESSED, _power_of_two(len(pairs))), R)

    def _padded(self, num_tokens: int, num_seqs: int, is_decode: bool) -> tuple[int, int]:
        if is_decode:
            R = 1 if num_seqs == 1 else min(max(MIN_SEQS, _power_of_two(num_seqs)), self._max_num_seqs)
            return R, R
        R = min(MIN_SEQS, self._max_num_seqs)
        if num_seqs > R:
            R = self._max_num_seqs
        T = max(MIN_PREFILL_TOKENS, _power_of_two(num_tokens))
        if num_tokens <= 3 * T // 4:
            T = 3 * T // 4
        return max(R, min(T, self._max_tokens)), R


def _pad(array: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    padded = np.full((length, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


def _power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
