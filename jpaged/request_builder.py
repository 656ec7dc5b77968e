"""From what a caller asks to a request that can be served, or an error that says why not."""

from collections.abc import Sequence
from itertools import count
from typing import Protocol

import numpy as np

from .beam_search_params import BeamSearchParams
from .config import EngineConfig
from .request import BeamSearchRequest, Request, SamplingRequest
from .sampling_params import SamplingParams
from .sequence import Sequence as TokenSequence
from .sequence import SequenceGroup
from .text_stream import Detokenizer, TextStream


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer (see `models.Tokenizer`)."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...
    def stream(self, skip_special_tokens: bool, /) -> Detokenizer: ...


class RequestBuilder:
    """Checks all that a caller gives before anything of it is queued.

    Args:
      vocab_size: the width of the model's logits.
      eos_token_ids: the model's and the tokenizer's.
      max_model_len: tokens of prompt and answer together.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._seq_ids = count()
        self._num_built = 0

    def build(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        priority: int,
        cache_salt: str | None,
        keeps_prefix: bool,
    ) -> Request:
        """Raises ValueError or TypeError that names the argument, what was expected and what came."""
        if not isinstance(request_id, str):
            raise TypeError(f"request_id: expected a str, got {request_id!r}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise TypeError(f"priority: expected an int, got {priority!r}")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt: expected a str or None, got {cache_salt!r}")
        if isinstance(params, SamplingParams):
            self._check_sampling(params)
        elif isinstance(params, BeamSearchParams):
            self._check_fits_rows("beam_width", params.beam_width)
        else:
            raise TypeError(f"params: expected SamplingParams or BeamSearchParams, got {type(params).__name__}")
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        token_ids = self._token_ids(prompt)
        eos = () if params.ignore_eos else self._eos_token_ids
        group = SequenceGroup(
            request_id,
            [],
            params,
            frozenset((*eos, *params.stop_token_ids)),
            seed=self._seed(params),
            max_len=min(len(token_ids) + params.max_tokens, self._max_model_len),
            bad_words=self._bad_words(params),
            priority=priority,
            cache_salt=cache_salt,
            beam_width=params.beam_width if isinstance(params, BeamSearchParams) else None,
            needs_prompt_logits=isinstance(params, SamplingParams) and params.prompt_logprobs is not None,
            keeps_prefix=keeps_prefix,
        )
        num_sequences = params.n if isinstance(params, SamplingParams) else 1
        group.sequences = [self.new_sequence(index, token_ids) for index in range(num_sequences)]
        self._num_built += 1
        text = prompt if isinstance(prompt, str) else None
        if isinstance(params, BeamSearchParams):
            return BeamSearchRequest(group, text, params, lambda: TextStream(self._detokenizer(params)))
        return SamplingRequest(group, text, params, lambda: TextStream(self._detokenizer(params), params))

    def new_seq_id(self) -> int:
        """One that no sequence had before."""
        return next(self._seq_ids)

    def new_sequence(self, index: int, token_ids: list[int]) -> TokenSequence:
        return TokenSequence(self.new_seq_id(), index, list(token_ids))

    def _seed(self, params: SamplingParams | BeamSearchParams) -> int:
        if isinstance(params, SamplingParams) and params.seed is not None:
            return params.seed
        return (self._config.seed << 32) + self._num_built

    def _check_sampling(self, params: SamplingParams) -> None:
        self._check_fits_rows("n", params.n)
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_token_ids("logit_bias", tuple(params.logit_bias or ()))
        for name in ("stop", "bad_words"):
            if self._tokenizer is None and (texts := getattr(params, name)):
                raise ValueError(f"{name}: expected none for a model without a tokenizer, got {texts!r}")

    def _check_fits_rows(self, name: str, number: int) -> None:
        if number > self._config.max_num_seqs:
            raise ValueError(f"{name}: expected at most max_num_seqs ({self._config.max_num_seqs}), got {number}")

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"{name}: expected token ids in [0, {self._vocab_size}), got {token_id}")

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise TypeError("prompt: expected token ids for a model without a tokenizer, got a str")
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = _token_ids(prompt)
        self._check_token_ids("prompt", token_ids)
        if not token_ids:
            raise ValueError(f"prompt: expected at least one token, got none in {prompt!r}")
        if len(token_ids) >= self._max_model_len:
            raise ValueError(
                f"prompt: expected fewer than {self._max_model_len} tokens, the model's length with at least one "
                f"to generate, got {len(token_ids)}"
            )
        return token_ids

    def _bad_words(self, params: SamplingParams | BeamSearchParams) -> tuple[tuple[int, ...], ...]:
        """The bad words in tokens: as a text begins with them and, where those are others, after a space."""
        if self._tokenizer is None or not isinstance(params, SamplingParams):
            return ()
        spelled: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                spelled[tuple(self._tokenizer.encode(text, add_special_tokens=False))] = None
        return tuple(token_ids for token_ids in spelled if token_ids)

    def _detokenizer(self, params: SamplingParams | BeamSearchParams) -> Detokenizer | None:
        if self._tokenizer is None or (isinstance(params, SamplingParams) and not params.detokenize):
            return None
        return self._tokenizer.stream(params.skip_special_tokens)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    expected = "prompt: expected a str or a sequence of token ids"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(f"{expected}, got {type(prompt).__name__}")
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise TypeError(f"{expected}, got an element {token_id!r}")
    return [int(token_id) for token_id in prompt]
