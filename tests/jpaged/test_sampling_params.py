"""Ranges and types of SamplingParams; what is expected is the table of names and ranges, written out here."""

import dataclasses
import importlib.util
import math

import pytest


def load_as_users_do():
    """The module without the tests' own run-time type checks, which would speak before its errors do."""
    found = importlib.util.find_spec("jpaged.sampling_params")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(found.name, found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SamplingParams = load_as_users_do().SamplingParams


def test_defaults_are_those_of_the_public_apis():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "bad_words": (),
        "allowed_token_ids": None,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [1, 100]),
        ("temperature", [0, 0.0, 0.7, 2]),
        ("top_p", [1e-9, 0.5, 1]),
        ("top_k", [-1, 0, 1, 50_000]),
        ("min_p", [0, 0.05, 1]),
        ("presence_penalty", [-2, 0, 1.5, 2]),
        ("frequency_penalty", [-2, 0.0, 2]),
        ("repetition_penalty", [1e-3, 1, 100]),
        ("allowed_token_ids", [None, (3,), (0, 7)]),
        ("bad_words", [(), ("a", "b c")]),
        ("seed", [None, 0, -1, 2**63 - 1]),
        ("stop_token_ids", [(), (0,), (2, 3)]),
        ("max_tokens", [1, 10_000]),
        ("min_tokens", [0, 16]),
        ("logprobs", [None, 0, 20]),
        ("prompt_logprobs", [None, 0, 20]),
    ],
)
def test_values_in_range_are_kept(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1]),
        ("temperature", [-1, -1e-9, 2.001, math.nan, math.inf, -math.inf]),
        ("top_p", [0, -0.5, 1.0001, math.nan, math.inf]),
        ("top_k", [-2]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, math.inf]),
        ("repetition_penalty", [0, 0.0, -1, math.nan, math.inf]),
        ("logit_bias", [{-1: 1.0}, {3: math.nan}]),
        ("allowed_token_ids", [(), (-1,), [3, -7]]),
        ("bad_words", ["", ("a", "")]),
        ("seed", [2**63, -(2**63) - 1]),
        ("stop", ["", ("a", ""), ("a", "b", "c", "d", "e")]),
        ("stop_token_ids", [(-1,), [3, -7]]),
        ("max_tokens", [0, -3]),
        ("min_tokens", [-1, 17]),
        ("logprobs", [-1, 21]),
        ("prompt_logprobs", [-1, 21]),
    ],
)
def test_values_out_of_range_raise_and_are_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field}: expected ") as raised:
            SamplingParams(**{field: value})
        assert "\n" not in str(raised.value)
        assert str(value).strip("{}") in str(raised.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [True, 1.0, "1", None]),
        ("temperature", [True, "0.7", None]),
        ("top_p", [False, "1", None]),
        ("top_k", [True, 1.5, None]),
        ("min_p", [True, None, "0"]),
        ("presence_penalty", [True, None, "0"]),
        ("frequency_penalty", [True, None, "0"]),
        ("repetition_penalty", [True, None, "1"]),
        ("logit_bias", [3, ((3, 1.0),), "3", [3], ((3,),), {"3"}]),
        ("allowed_token_ids", [3, "3", (True,), (1.0,), {3}]),
        ("bad_words", [None, 3, b"x", ("a", 3), {"a"}]),
        ("seed", [True, 1.0, "7"]),
        ("stop", [None, 3, b"x", ("a", 3), {"a"}]),
        ("stop_token_ids", [None, 3, "3", b"3", (True,), (1.0,), {3}]),
        ("ignore_eos", [1, None]),
        ("max_tokens", [True, 16.0, None]),
        ("min_tokens", [False, 1.0, None]),
        ("logprobs", [True, 1.0]),
        ("prompt_logprobs", [True, 1.0]),
        ("detokenize", [None, 1]),
        ("skip_special_tokens", [0]),
        ("include_stop_str_in_output", ["yes"]),
    ],
)
def test_values_of_another_type_raise_and_are_named(field, values):
    for value in values:
        with pytest.raises(TypeError, match=rf"^{field}: expected ") as raised:
            SamplingParams(**{field: value})
        assert repr(value) in str(raised.value)


def test_sequences_become_tuples():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    ids = [4, 5]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(6)
    assert params.stop_token_ids == (4, 5)
    assert hash(params) == hash(SamplingParams(stop_token_ids=(4, 5)))


def test_min_tokens_is_measured_against_max_tokens():
    assert SamplingParams(max_tokens=40, min_tokens=40).min_tokens == 40
    with pytest.raises(ValueError, match=r"min_tokens: expected an int in \[0, 3 \(max_tokens\)\], got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2


def test_biases_are_clamped():
    params = SamplingParams(logit_bias={5: 1, 3: 250.0, 4: -math.inf})
    assert params.logit_bias == {5: 1.0, 3: 100.0, 4: -100.0}
    assert hash(params) == hash(dataclasses.replace(params))
    for value in ({"3": 1.0}, {True: 1.0}, {3: "1"}, {3: None}, {3: False}):
        with pytest.raises(TypeError, match=r"^logit_bias: expected a mapping of token ids to numbers, got"):
            SamplingParams(logit_bias=value)


def test_a_stop_string_needs_a_text():
    assert SamplingParams(detokenize=False).detokenize is False
    with pytest.raises(ValueError, match=r"^stop: expected none without detokenize, got \('a',\)"):
        SamplingParams(detokenize=False, stop="a")


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_what_is_a_penalty(field):
    assert not SamplingParams().has_penalties
    assert SamplingParams(**{field: 0.5}).has_penalties
