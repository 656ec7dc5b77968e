"""Ranges and types of BeamSearchParams."""

import math

import pytest

from jpaged import BeamSearchParams


def test_defaults():
    params = BeamSearchParams()
    assert (params.beam_width, params.max_tokens, params.length_penalty, params.early_stopping) == (4, 16, 1.0, False)
    assert BeamSearchParams(stop_token_ids=[3]).stop_token_ids == (3,)
    for early_stopping in (True, False, "never"):
        assert BeamSearchParams(early_stopping=early_stopping).early_stopping == early_stopping


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("beam_width", 0, ValueError),
        ("beam_width", 65, ValueError),
        ("beam_width", 2.0, TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", None, TypeError),
        ("length_penalty", math.nan, ValueError),
        ("length_penalty", math.inf, ValueError),
        ("length_penalty", "1", TypeError),
        ("early_stopping", "always", ValueError),
        ("early_stopping", 1, TypeError),
        ("ignore_eos", 1, TypeError),
        ("skip_special_tokens", None, TypeError),
        ("stop_token_ids", [-1], ValueError),
        ("stop_token_ids", "1", TypeError),
    ],
)
def test_each_wrong_in_turn(field, value, error):
    with pytest.raises(error, match=rf"^{field}: expected ") as raised:
        BeamSearchParams(**{field: value})
    assert str(value).strip("[]") in str(raised.value)


def test_beams_are_not_samples():
    with pytest.raises(TypeError, match="'n'"):
        BeamSearchParams(beam_width=2, n=2)  # pyright: ignore[reportCallIssue]
