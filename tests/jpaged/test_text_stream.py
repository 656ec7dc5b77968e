"""What of a growing text may be shown, against cuts made by hand and by a search over the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.sampling_params import SamplingParams
from jpaged.text_stream import TextStream


class Pieces:
    """Gives the text of token i: the i-th piece."""

    def __init__(self, pieces):
        self.pieces = pieces

    def add(self, token_id, /):
        return self.pieces[token_id]


def follow(pieces, stop, *, include=False, min_tokens=0):
    """The stream after its last token, and the text shown after each one; what follows a stop is not added."""
    stream = TextStream(Pieces(pieces), SamplingParams(stop=stop, include_stop_str_in_output=include))
    shown = []
    for token_id in range(len(pieces)):
        is_stopped = stream.add(token_id, may_stop=token_id >= min_tokens)
        shown.append(stream.text)
        if is_stopped:
            return stream, shown, True
    return stream, shown, False


def test_text_without_stop_strings_is_shown_at_once():
    stream, shown, is_stopped = follow(["Hel", "lo", "", " you"], ())
    assert shown == ["Hel", "Hello", "Hello", "Hello you"]
    assert not is_stopped
    stream.finish()
    assert stream.text == "Hello you"


def test_without_a_detokenizer_there_is_no_text():
    stream = TextStream(None, SamplingParams(stop="a"))
    assert [stream.add(token_id) for token_id in (97, 0)] == [False, False]
    stream.finish()
    assert stream.text == ""


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "included"),
    [
        # Within one piece, with text before and after it.
        (["one STOP two"], "STOP", ["one "], "one STOP"),
        # Split over tokens, which may carry text before the stop and after it.
        (["ab", "c<", "/", "s>d"], "</s>", ["ab", "abc", "abc", "abc"], "abc</s>"),
        (["x", "y", "z"], "xyz", ["", "", ""], "xyz"),
        # A beginning that comes to nothing is shown as soon as that is known.
        (["a#", "#", "b", "###"], "###", ["a", "a", "a##b", "a##b"], "a##b###"),
        # A beginning within a beginning: after "aab" a third "a" would be too much, "aab" again is not.
        (["aa", "b", "aa", "bc"], "aabc", ["", "", "aab", "aab"], "aabaabc"),
        (["a", "a", "a", "b"], "aab", ["", "", "a", "a"], "aaab"),
        # Pieces without text change nothing.
        (["a", "", "S", "", "T"], "ST", ["a", "a", "a", "a", "a"], "aST"),
        # Beyond the basic plane, one character is one.
        (["é🙂", "🙂🙃", "!"], ("🙂🙃",), ["é", "é🙂"], "é🙂🙂🙃"),
    ],
)
def test_a_stop_string_ends_the_text(pieces, stop, shown, included):
    assert follow(pieces, stop)[1:] == (shown, True)
    stream, _, is_stopped = follow(pieces, stop, include=True)
    assert is_stopped
    assert stream.text == included


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("pieces", "stops", "text", "included"),
    [
        # In one piece: the match that begins first, wherever it stands in the list.
        (["1 end 2 fin"], ("fin", "end"), "1 ", "1 end"),
        (["abcd"], ("c", "bcd"), "a", "abcd"),
        # Of two that begin together, the shorter is complete first.
        (["abcd"], ("bcd", "bc"), "a", "abc"),
        # Over pieces: the match that ends first, since nothing is known of the other.
        (["ab", "c", "d"], ("c", "bcd"), "ab", "abc"),
        (["ab", "cd", "e"], ("cde", "bcd"), "a", "abcd"),
    ],
)
def test_the_earliest_of_several_stop_strings_wins(pieces, stops, text, included, order):
    stream, _, is_stopped = follow(pieces, stops[::order])
    assert (stream.text, is_stopped) == (text, True)
    stream, _, is_stopped = follow(pieces, stops[::order], include=True)
    assert (stream.text, is_stopped) == (included, True)


def test_the_longest_possible_beginning_is_held_back():
    _, shown, _ = follow(["1ab", "x"], ("bc", "abd"))
    assert shown == ["1", "1abx"]


def test_what_was_held_back_is_released_at_the_end():
    stream, shown, is_stopped = follow(["ab", "<", "/"], "</s>")
    assert (shown, is_stopped) == (["ab", "ab", "ab"], False)
    stream.finish()
    assert stream.text == "ab</"
    stream.finish()
    assert stream.text == "ab</"


def test_a_stop_string_that_may_not_stop_is_text():
    stream, shown, is_stopped = follow(["a", "ST", "OP", "b", "STOP"], "STOP", min_tokens=3)
    assert (shown, is_stopped) == (["a", "a", "aSTOP", "aSTOPb", "aSTOPb"], True)
    assert stream.text == "aSTOPb"


def test_a_stop_string_completed_by_a_token_that_may_stop_counts():
    stream, _, is_stopped = follow(["aST", "OPb"], "STOP", min_tokens=1)
    assert (stream.text, is_stopped) == ("a", True)


def cut(pieces, stops, include, min_tokens):
    """The final text: all of it up to the first token that completes a stop string, cut there."""
    for count in range(min_tokens + 1, len(pieces) + 1):
        before, text = "".join(pieces[: count - 1]), "".join(pieces[:count])
        matches = [
            (start, start + len(stop))
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(before)
        ]
        if matches:
            start, end = min(matches)
            return text[: end if include else start], count
    return "".join(pieces), None


# Few letters and short strings, so that beginnings of stop strings abound.
@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
def test_what_was_shown_is_never_taken_back(pieces, stops, include, min_tokens):
    stream, shown, is_stopped = follow(pieces, stops, include=include, min_tokens=min_tokens)
    stream.finish()
    final, stopped_after = cut(pieces, stops, include, min_tokens)
    assert stream.text == final
    assert (len(shown) if is_stopped else None) == stopped_after
    for text, longer in pairwise([*shown, final]):
        assert longer.startswith(text)
    # Nor is more held back than could still become a stop string.
    for count, text in enumerate(shown[: len(shown) - is_stopped], start=1):
        held = "".join(pieces[:count])[len(text) :]
        assert not held or any(stop.startswith(held) for stop in stops)
