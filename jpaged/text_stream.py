"""The text of one sample as it grows: what may be shown of it, and where a stop string ends it."""

from typing import Protocol

from .sampling_params import SamplingParams


class Detokenizer(Protocol):
    """Text from tokens that arrive one by one (see `models.tokenizer.Detokenizer`)."""

    def add(self, token_id: int, /) -> str: ...


class TextStream:
    """Collects a sample's text and looks for its stop strings.

    `text` is what may be shown: it holds back an end that could be the beginning of a stop string, until more
    tokens or `finish` tell.

    >>> class Letters:
    ...     def add(self, token_id): return chr(token_id)
    >>> stream = TextStream(Letters(), SamplingParams(stop="xyz"))
    >>> [stream.add(ord(letter)) for letter in "abxy"], stream.text
    ([False, False, False, False], 'ab')
    >>> stream.add(ord("z")), stream.text
    (True, 'ab')
    """

    def __init__(self, detokenizer: Detokenizer | None, params: SamplingParams | None = None) -> None:
        self._detokenizer = detokenizer
        self._stop = params.stop if params else ()
        self._most_held_back = max((len(stop) for stop in self._stop), default=1) - 1
        self._include_stop = params is not None and params.include_stop_str_in_output
        self._all = ""
        self.text = ""

    def add(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Takes the next token; True if it completed a stop string, after which the text is final."""
        piece = self._detokenizer.add(token_id) if self._detokenizer else ""
        if not piece:
            return False
        searched = len(self._all)
        self._all += piece
        if may_stop:
            starts = [self._all.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stop]
            found = [(start, stop) for start, stop in zip(starts, self._stop, strict=True) if start >= 0]
            if found:
                start, stop = min(found)
                self._all = self._all[: start + len(stop) if self._include_stop else start]
                self.finish()
                return True
        self.text = self._all[: len(self._all) - self._held_back()]
        return False

    def finish(self) -> None:
        """No token follows: what was held back is text."""
        self.text = self._all

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._most_held_back, len(self._all)), 0, -1):
            end = self._all[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0
