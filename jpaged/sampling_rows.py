"""What the occupant of each row asks of the sampler, remembered from step to step and laid out for one step."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from .beam_search import num_candidates
from .beam_search_params import BeamSearchParams
from .sampling_params import MAX_LOGPROBS, SamplingParams
from .scheduler_output import NewRow

MIN_EDITS = 16
_INT32_MAX = np.iinfo(np.int32).max


class SamplingShape(NamedTuple):
    """What the sampler's part of a step is compiled for: what no sample asks for is left out."""

    samples: int
    draws: bool  # some sample is not greedy
    cuts: bool  # by top_k, top_p or min_p
    edits: int  # of logits
    is_restricted: bool  # some sample may draw but some tokens
    is_penalized: bool
    num_logprobs: int  # likeliest tokens of a sample that are ranked; 0: none

    def __str__(self) -> str:
        return f"a sampler of {self.samples} tokens"


class SamplingInputs(NamedTuple):
    """R samples and what they ask, padding included. See `sampler` for what is done with it.

    NumPy arrays as laid out here, JAX's within the step.
    """

    rows: Int32[Any, " R"]  # whose last sample each becomes; max_num_seqs for padding
    positions: Int32[Any, " R"]  # where it will stand in its sequence
    index: Int32[Any, " R"]  # of the sample within its request
    seed: UInt32[Any, "R 2"]
    temperature: Float32[Any, " R"]
    top_k: Int32[Any, " R"]
    top_p: Float32[Any, " R"]
    min_p: Float32[Any, " R"]
    penalties: Float32[Any, "R 3"]  # presence, frequency, repetition
    # E edits of logits, see `LogitEdits`; sample R is padding
    edit_sample: Int32[Any, " E"]
    edit_token: Int32[Any, " E"]
    edit_value: Float32[Any, " E"]
    edit_after: Int32[Any, " E"]
    allowed: UInt32[Any, "R words"]  # a bit a token; no words at all where every sample may draw any token


_ROW = np.dtype(
    [
        ("index", np.int32),
        ("seed", np.uint32, 2),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("penalties", np.float32, 3),
        ("num_logprobs", np.int32),  # how many likeliest tokens are wanted; 0: none
        ("prompt_len", np.int32),
        ("suppress_until", np.int32),  # no stop token is drawn at a position below this
        ("is_penalized", np.bool_),
        ("is_restricted", np.bool_),  # to allowed_token_ids
        ("has_edits", np.bool_),  # whatever the position
    ]
)


class _Edits(NamedTuple):
    """E edits of one row's logits."""

    token: np.ndarray
    value: np.ndarray
    after: np.ndarray


class SamplingRows:
    """Remembers the sampling parameters of `max_num_seqs` rows over a vocabulary of `vocab_size` tokens.

    A sampled token is known here only once `record` brings it, which may be after the step that follows it has been
    laid out: what depends on it is left to the device (see `LogitEdits.after`).
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_num_seqs, _ROW)
        self._stop_token_ids: list[np.ndarray] = [_ids(())] * max_num_seqs
        self._always: list[_Edits] = [_no_edits()] * max_num_seqs  # biases, and bad words of one token
        self._bad_words: list[tuple[tuple[int, ...], ...]] = [()] * max_num_seqs  # those of several tokens
        self._seq_ids = [-1] * max_num_seqs
        self._generated: list[list[int]] = [[] for _ in range(max_num_seqs)]  # where bad words need them
        self._allowed: np.ndarray | None = None  # [max_num_seqs, words], once a row is restricted

    def occupy(self, new: NewRow) -> None:
        """The row gets a new occupant; nothing of the one before remains."""
        params, row, num_logprobs = new.params, new.row, 0
        if isinstance(params, BeamSearchParams):
            params, num_logprobs = SamplingParams(temperature=0.0), num_candidates(params, len(new.stop_token_ids))
        elif params.logprobs is not None:
            num_logprobs = params.logprobs
        single = [word[0] for word in new.bad_words if len(word) == 1]
        biases = params.logit_bias or {}
        several = tuple(word for word in new.bad_words if len(word) > 1)
        self._rows[row] = (
            new.sample_index,
            divmod(new.seed % 2**64, 2**32),
            params.temperature,
            min(params.top_k, _INT32_MAX),
            params.top_p,
            params.min_p,
            (params.presence_penalty, params.frequency_penalty, params.repetition_penalty),
            num_logprobs,
            new.prompt_len,
            min(new.prompt_len + params.min_tokens, _INT32_MAX),
            params.has_penalties,
            params.allowed_token_ids is not None,
            bool(biases or new.bad_words),
        )
        self._stop_token_ids[row] = _ids(sorted(new.stop_token_ids))
        self._always[row] = _edits(
            [*biases, *single],
            [*biases.values(), *[-np.inf] * len(single)],
        )
        self._seq_ids[row] = new.seq_id
        self._bad_words[row] = several
        self._generated[row] = list(new.token_ids[new.prompt_len :]) if several else []
        if params.allowed_token_ids is not None or self._allowed is not None:
            self._allow(row, params)

    def record(self, seq_id: int, row: int, token_id: int) -> None:
        """The row's next token has become known; of no interest where it has another occupant by now."""
        if self._bad_words[row] and self._seq_ids[row] == seq_id:
            self._generated[row].append(token_id)

    def lay_out(self, rows: np.ndarray, positions: np.ndarray, R: int) -> tuple[SamplingShape, SamplingInputs]:
        """The samples that these rows take at these positions, padded to R."""
        asked = self._rows[rows]
        draws = asked["temperature"] > 0
        cuts = draws & ((asked["top_k"] > 0) | (asked["top_p"] < 1) | (asked["min_p"] > 0))
        edits = self._lay_out_edits(rows, positions, asked, R)
        allowed = np.zeros((R, 0), np.uint32)
        if self._allowed is not None and asked["is_restricted"].any():
            allowed = pad(self._allowed[rows], R)
        num_logprobs = int(asked["num_logprobs"].max(initial=0))
        shape = SamplingShape(
            samples=R,
            draws=bool(draws.any()),
            cuts=bool(cuts.any()),
            edits=len(edits[0]),
            is_restricted=allowed.shape[1] > 0,
            is_penalized=bool(asked["is_penalized"].any()),
            num_logprobs=max(MAX_LOGPROBS, power_of_two(num_logprobs)) if num_logprobs else 0,
        )
        inputs = SamplingInputs(
            rows=pad(rows, R, len(self._rows)),
            positions=pad(positions, R),
            index=pad(asked["index"], R),
            seed=pad(asked["seed"], R),
            temperature=pad(asked["temperature"], R),
            top_k=pad(asked["top_k"], R),
            top_p=pad(asked["top_p"], R, 1),
            min_p=pad(asked["min_p"], R),
            penalties=pad(asked["penalties"], R, 1),
            edit_sample=edits[0],
            edit_token=edits[1],
            edit_value=edits[2],
            edit_after=edits[3],
            allowed=allowed,
        )
        return shape, inputs

    def _lay_out_edits(
        self, rows: np.ndarray, positions: np.ndarray, asked: np.ndarray, R: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        of_samples: list[tuple[int, _Edits]] = []
        is_early = positions < asked["suppress_until"]
        are_edited = np.flatnonzero(asked["has_edits"] | is_early)
        if not len(are_edited):
            nothing = _no_edits()
            return _ids(()), nothing.token, nothing.value, nothing.after
        for sample in are_edited.tolist():
            row = int(rows[sample])
            of_samples.append((sample, self._always[row]))
            if is_early[sample]:
                stops = self._stop_token_ids[row]
                of_samples.append((sample, _edits(stops, [-np.inf] * len(stops))))
            if self._bad_words[row]:
                of_samples.append((sample, self._ends_of_bad_words(row, int(positions[sample]))))
        num_edits = sum(len(edits.token) for _, edits in of_samples)
        E = max(MIN_EDITS, power_of_two(num_edits)) if num_edits else 0
        sample = np.repeat(
            np.array([sample for sample, _ in of_samples], np.int32), [len(edits.token) for _, edits in of_samples]
        )
        token, value, after = (
            np.concatenate([getattr(_no_edits(), name), *(getattr(edits, name) for _, edits in of_samples)])
            for name in _Edits._fields
        )
        return pad(sample, E, R), pad(token, E), pad(value, E), pad(after, E, -1)

    def _ends_of_bad_words(self, row: int, position: int) -> _Edits:
        """The last tokens of bad words of which all but the last two have been generated just before.

        Whether the last but one has been, too, the device sees.
        """
        num_known = position - int(self._rows["prompt_len"][row]) - 1  # generated, less the one that may be unknown
        known = self._generated[row][: max(num_known, 0)]
        due = []
        for word in self._bad_words[row]:
            before = list(word[:-2])
            if len(before) <= num_known and known[num_known - len(before) :] == before:
                due.append(word)
        return _edits([word[-1] for word in due], [-np.inf] * len(due), [word[-2] for word in due])

    def _allow(self, row: int, params: SamplingParams) -> None:
        num_words = -(-self._vocab_size // 32)
        if self._allowed is None:
            self._allowed = np.full((len(self._rows), num_words), 2**32 - 1, np.uint32)
        if params.allowed_token_ids is None:
            self._allowed[row] = 2**32 - 1
            return
        bits = np.zeros(num_words * 32, np.uint8)
        bits[_ids(params.allowed_token_ids)] = 1
        self._allowed[row] = np.packbits(bits, bitorder="little").view("<u4")


def pad(array: np.ndarray, length: int, value: float = 0) -> np.ndarray:
    """With `value` up to the length."""
    if len(array) == length:
        return array
    padded = np.full((length, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


def power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _ids(token_ids: Any) -> np.ndarray:
    return np.array(token_ids, np.int32)


def _no_edits() -> _Edits:
    return _edits([], [])


def _edits(tokens: Any, values: list[float], after: list[int] | None = None) -> _Edits:
    after_ids = np.full(len(values), -1, np.int32) if after is None else _ids(after)
    return _Edits(_ids(tokens), np.array(values, np.float32), after_ids)
