"""The engine over a small random Llama, whose tokens 0 to 63 a made-up tokenizer spells as letters."""

import signal
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged import BeamSearchParams, EngineConfig, LLMEngine, SamplingParams

pytest.importorskip("models")

VOCAB = 64
LETTERS = [chr(ord("0") + i) for i in range(VOCAB)]
PROMPTS = [[5, 9, 13], [1], [7] * 21, [2, 4, 8, 16, 32]]
DRAWN = SamplingParams(temperature=1.0, seed=11, max_tokens=12)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@dataclass
class Letters:
    """A letter a token; no token ends a text unless told so."""

    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text, /, *, add_special_tokens=True):
        return [LETTERS.index(letter) for letter in text if letter != " "]

    def stream(self, skip_special_tokens, /):
        return self

    def add(self, token_id, /):
        return LETTERS[token_id]


@pytest.fixture(scope="module")
def model():
    from models.config import LlamaConfig
    from models.llama import Llama

    config = LlamaConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_len=64
    )
    return Llama(config, rngs=nnx.Rngs(3))


def make(model, tokenizer=None, **config):
    sizes: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
    } | config
    return LLMEngine(model, tokenizer, EngineConfig(**sizes))


@pytest.fixture(scope="module")
def engine(model):
    """Shared, so that its steps are compiled once; every test leaves it empty."""
    return make(model, Letters())


@pytest.fixture(autouse=True)
def _leaves_nothing(engine):
    yield
    left = [engine.abort(request_id) for request_id in list(engine._requests)]  # not to spoil the tests that follow
    assert left == []
    check_empty(engine)


def check_empty(engine):
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert not engine.has_unfinished()
    assert engine.step() == []


def finish(engine):
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    return outputs


def run(engine, prompt, params):
    engine.add_request("only", prompt, params)
    return finish(engine)["only"]


def tokens(output):
    return [sample.token_ids for sample in output.outputs]


def dense_logits(model, ids):
    """The logits of the token after each of `ids`, by one dense forward pass, in float64."""
    return np.asarray(model(jnp.array([[*ids, *[0] * (64 - len(ids))]], jnp.int32))[0, : len(ids)], np.float64)


def dense_logprobs(model, ids):
    logits = dense_logits(model, ids)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_step_with_nothing_to_do(engine):
    before = engine.stats()
    assert engine.step() == []
    assert engine.stats() == before
    assert engine.abort("unknown") is None


def test_greedy_is_the_dense_models_choice(engine, model):
    for prompt in PROMPTS:
        (answer,) = tokens(run(engine, prompt, GREEDY))
        logprobs = dense_logprobs(model, [*prompt, *answer])
        assert answer == tuple(logprobs.argmax(-1)[len(prompt) - 1 : -1])


def test_a_seed_gives_the_same_alone_and_among_others(engine):
    alone = [tokens(run(engine, prompt, DRAWN)) for prompt in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        params = DRAWN if i != 2 else SamplingParams(temperature=1.0, seed=11, max_tokens=12, logprobs=2)
        engine.add_request(str(i), prompt, params)
        engine.step()  # the next joins one step later
    mixed = finish(engine)
    assert [tokens(mixed[str(i)]) for i in range(4)] == alone


def test_a_seed_gives_the_same_after_preemption(engine, model):
    alone = [tokens(run(engine, prompt, DRAWN)) for prompt in PROMPTS]
    small = make(model, num_blocks=10)  # the third request needs 9 of them in the end
    for i, prompt in enumerate(PROMPTS):
        small.add_request(str(i), prompt, DRAWN)
    outputs = finish(small)
    assert small.stats().num_preemptions > 0
    assert [tokens(outputs[str(i)]) for i in range(4)] == alone
    check_empty(small)


def test_different_seeds_differ(engine):
    answers = {
        tokens(run(engine, [5], SamplingParams(temperature=1.0, seed=seed, max_tokens=12)))[0]
        for seed in (0, 1, 2**32, 2**33, -1)
    }
    assert len(answers) == 5


def test_without_a_seed_requests_differ_and_engines_agree(model):
    params = SamplingParams(temperature=1.0, max_tokens=12)
    first, second, other = make(model), make(model), make(model, seed=1)
    answers = [tokens(run(each, [5], params)) for each in (first, first, second, second, other)]
    assert answers[0] != answers[1]
    assert answers[:2] == answers[2:4]
    assert answers[4] not in answers[:4]


def test_samples_of_one_request(engine):
    params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=12)
    first, second = run(engine, PROMPTS[0], params), run(engine, PROMPTS[0], params)
    assert tokens(first) == tokens(second)
    assert len(set(tokens(first))) == 3
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert tokens(first)[:1] == tokens(run(engine, PROMPTS[0], DRAWN))


def test_stop_tokens_and_eos(engine, model):
    (answer,) = tokens(run(engine, PROMPTS[0], DRAWN))
    end = next(i for i in range(3, 12) if answer[i] not in answer[:i])
    stopped = run(engine, PROMPTS[0], SamplingParams(temperature=1.0, seed=11, stop_token_ids=[answer[end]]))
    assert tokens(stopped) == [answer[: end + 1]]
    assert stopped.outputs[0].finish_reason == "stop"
    with_eos = make(model, Letters(eos_token_ids=(answer[end],)))
    assert tokens(run(with_eos, PROMPTS[0], DRAWN)) == [answer[: end + 1]]
    ignoring = SamplingParams(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    assert tokens(run(with_eos, PROMPTS[0], ignoring)) == [answer]


def test_min_tokens_suppress_stops(engine, model):
    """Greedily: where a stop token would come too early, the best of the others does."""
    (answer,) = tokens(run(engine, PROMPTS[0], GREEDY))
    params = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=12, stop_token_ids=[answer[0]])
    (held,) = tokens(run(engine, PROMPTS[0], params))
    logprobs = dense_logprobs(model, [*PROMPTS[0], *held])[len(PROMPTS[0]) - 1 : -1]
    logprobs[:3, answer[0]] = -np.inf
    assert held == tuple(logprobs.argmax(-1))
    assert answer[0] not in held[:3]
    assert len(held) == 12 or held[-1] == answer[0]


def test_stop_strings(engine):
    (whole,) = run(engine, PROMPTS[0], DRAWN).outputs
    assert whole.text == "".join(LETTERS[token] for token in whole.token_ids)
    stop = whole.text[4:6]
    at = whole.text.index(stop)
    (cut,) = run(engine, PROMPTS[0], SamplingParams(temperature=1.0, seed=11, max_tokens=12, stop=stop)).outputs
    assert cut.text == whole.text[:at]
    assert cut.token_ids == whole.token_ids[: at + 2]
    assert cut.finish_reason == "stop"
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert run(engine, PROMPTS[0], params).outputs[0].text == whole.text[: at + 2]


def test_a_stop_string_with_the_last_token(engine):
    (whole,) = run(engine, PROMPTS[0], DRAWN).outputs
    stop = whole.text[9:]
    assert whole.text.index(stop) == 9
    (cut,) = run(engine, PROMPTS[0], SamplingParams(temperature=1.0, seed=11, max_tokens=12, stop=stop)).outputs
    assert (cut.text, cut.finish_reason) == (whole.text[:9], "stop")


def test_ends_by_length(engine, model):
    output = run(engine, "59", GREEDY)
    assert (output.prompt, output.prompt_token_ids) == ("59", (5, 9))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (12, "length")
    short = make(model, max_model_len=9)
    output = run(short, [5, 9], GREEDY)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (7, "length")


def test_logprobs_are_the_models_own(engine, model):
    """Whatever the temperature, the cuts and the tokens suppressed."""
    params = SamplingParams(
        temperature=0.7, top_k=9, seed=4, max_tokens=8, min_tokens=8, stop_token_ids=[3], logprobs=4
    )
    (sample,) = run(engine, PROMPTS[3], params).outputs
    expected = dense_logprobs(model, [*PROMPTS[3], *sample.token_ids])[len(PROMPTS[3]) - 1 : -1]
    assert len(sample.logprobs) == 8
    for found, row, token in zip(sample.logprobs, expected, sample.token_ids, strict=True):
        assert set(found) == {token, *np.argsort(row)[-4:].tolist()}
        for token_id, value in found.items():
            assert value == pytest.approx(row[token_id], abs=1e-4)
    chosen = [found[token] for found, token in zip(sample.logprobs, sample.token_ids, strict=True)]
    assert sample.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-5)


def test_logprobs_are_for_who_asks(engine):
    engine.add_request("a", [5], GREEDY)
    engine.add_request("b", [5], SamplingParams(temperature=0.0, max_tokens=12, logprobs=0))
    engine.add_request("c", [5], SamplingParams(temperature=0.0, max_tokens=12, logprobs=3))
    outputs = finish(engine)
    assert outputs["a"].outputs[0].logprobs is None
    assert [set(found) for found in outputs["b"].outputs[0].logprobs] == [{t} for t in tokens(outputs["b"])[0]]
    assert [len(found) for found in outputs["c"].outputs[0].logprobs] == [3] * 12  # greedy: the token is the likeliest


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_at_any_moment(engine, steps):
    (alone,) = tokens(run(engine, PROMPTS[0], DRAWN))
    engine.add_request("stays", PROMPTS[0], DRAWN)
    engine.add_request("goes", PROMPTS[3], SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=12))
    for _ in range(steps):
        engine.step()
    output = engine.abort("goes")
    assert output.finished
    assert [(sample.finish_reason, len(sample.token_ids)) for sample in output.outputs] == [("abort", steps)] * 3
    assert engine.abort("goes") is None
    assert tokens(finish(engine)["stays"]) == [alone]


def test_abort_amid_a_chunked_prefill(model):
    engine = make(model, max_num_batched_tokens=8)
    engine.add_request("goes", PROMPTS[2], GREEDY)
    engine.step()
    assert tokens(engine.abort("goes")) == [()]
    check_empty(engine)


def test_a_request_that_never_fits_leaves_the_others_alone(engine, model):
    (alone,) = tokens(run(engine, PROMPTS[0], DRAWN))
    small = make(model, num_blocks=5)  # 20 tokens
    small.add_request("before", PROMPTS[0], DRAWN)
    small.add_request("large", PROMPTS[2], DRAWN)
    small.add_request("after", PROMPTS[0], DRAWN)
    outputs = finish(small)
    assert outputs["large"].outputs[0].finish_reason == "error"
    assert "5" in outputs["large"].error
    assert outputs["large"].outputs[0].token_ids == ()
    for name in ("before", "after"):
        assert outputs[name].error is None
        assert tokens(outputs[name]) == [alone]
    check_empty(small)


def test_a_request_that_outgrows_the_pool(engine, model):
    (alone,) = tokens(run(engine, PROMPTS[0], DRAWN))
    small = make(model, num_blocks=3)  # 12 tokens, of 15
    output = run(small, PROMPTS[0], DRAWN)
    assert output.outputs[0].finish_reason == "error"
    assert "3" in output.error
    # Nine tokens of answer fill the pool; the tenth, which needs no room, is on its way when that is found out.
    assert tokens(output) == [alone[:9]]
    check_empty(small)


BAD = {
    "bool": ([True], GREEDY, TypeError, "prompt"),
    "float": ([1.0], GREEDY, TypeError, "prompt"),
    "letter": (["a"], GREEDY, TypeError, "prompt"),
    "bytes": (b"abc", GREEDY, TypeError, "prompt"),
    "none": (None, GREEDY, TypeError, "prompt"),
    "number": (5, GREEDY, TypeError, "prompt"),
    "negative": ([1, -1], GREEDY, ValueError, "prompt"),
    "past the vocabulary": ([1, VOCAB], GREEDY, ValueError, "prompt"),
    "too long": ([1] * 64, GREEDY, ValueError, "prompt"),
    "no tokens": ([], GREEDY, ValueError, "prompt"),
    "no text": ("", GREEDY, ValueError, "prompt"),
    "too many samples": ([1], SamplingParams(n=5), ValueError, "n"),
    "a dict for parameters": ([1], {"n": 1}, TypeError, "params"),
    "stop token past the vocabulary": ([1], SamplingParams(stop_token_ids=[VOCAB]), ValueError, "stop_token_ids"),
    "allowed token past the vocabulary": (
        [1],
        SamplingParams(allowed_token_ids=[VOCAB]),
        ValueError,
        "allowed_token_ids",
    ),
    "biased token past the vocabulary": ([1], SamplingParams(logit_bias={VOCAB: 1}), ValueError, "logit_bias"),
    "name in use": ([1], GREEDY, ValueError, "request_id"),
}


@pytest.mark.parametrize(("prompt", "params", "error", "name"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(engine, prompt, params, error, name):
    engine.add_request("there", [5], DRAWN)
    before = engine.stats()
    with pytest.raises(error, match=f"^{name}: expected"):
        engine.add_request("there" if name == "request_id" else "new", prompt, params)
    assert engine.stats() == before
    engine.add_request("next", [5], DRAWN)
    outputs = finish(engine)
    assert set(outputs) == {"there", "next"}
    assert tokens(outputs["there"]) == tokens(outputs["next"])


def test_without_a_tokenizer(model):
    engine = make(model)
    with pytest.raises(TypeError, match=r"^prompt: expected token ids"):
        engine.add_request("a", "text", GREEDY)
    for name in ("stop", "bad_words"):
        with pytest.raises(ValueError, match=rf"^{name}: expected none"):
            engine.add_request("a", [1], SamplingParams(**{name: "x"}))  # pyright: ignore[reportArgumentType]
    check_empty(engine)
    output = run(engine, np.array([5, 9], np.int64).tolist(), GREEDY)
    assert (output.prompt, output.outputs[0].text) == (None, "")


def test_min_tokens_without_bounds(engine):
    """Numbers that no int32 holds end with the answer, not with the engine."""
    params = SamplingParams(temperature=0.0, min_tokens=2**40, max_tokens=2**40, stop_token_ids=[3])
    engine.add_request("a", [5], params)
    try:
        (sample,) = finish(engine)["a"].outputs
    finally:
        engine.abort("a")
    assert (len(sample.token_ids), sample.finish_reason) == (63, "length")
    assert 3 not in sample.token_ids


CALLS = ["_run_model", "_sample", "finish", "_move_blocks", "_count_said"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", range(6))
def test_each_device_call_may_fail_once_at_any_point(model, engine, monkeypatch, call, when):
    """The requests of the step end with the error, those that wait are served, and the engine goes on serving."""
    params = [DRAWN, replace(DRAWN, presence_penalty=1.0), replace(DRAWN, n=3), BeamSearchParams(beam_width=2), DRAWN]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[2], PROMPTS[0]]
    requests = list(zip(prompts, params, strict=True))
    alone = [tokens(run(engine, *request)) for request in requests]
    small = make(model, num_blocks=14, num_host_blocks=8)
    original, count = getattr(small._runner, call), iter(range(100))

    def fail(*args, **kwargs):
        result = original(*args, **kwargs)  # takes what is donated along
        if next(count) == when:
            raise RuntimeError("out of order")
        return result

    with monkeypatch.context() as patched:
        patched.setattr(small._runner, call, fail)
        for i, request in enumerate(requests):
            small.add_request(str(i), *request)
        outputs = finish(small)
    failed = [i for i in range(5) if outputs[str(i)].error is not None]
    assert 0 < len(failed) < 5
    for i, expected in enumerate(alone):
        output = outputs[str(i)]
        if i in failed:
            assert output.error == "a step failed: RuntimeError: out of order"
            assert {sample.finish_reason for sample in output.outputs} <= {"error", "stop", "length"}
        else:
            assert tokens(output) == expected
    check_empty(small)
    assert [tokens(run(small, *request)) for request in requests] == alone


def test_a_failure_on_the_device_leaves_the_engine_usable(model):
    """It comes to light when the samples are fetched, and what the step returned is lost with them."""
    fails = [False]

    def check(x):
        if fails[0]:
            raise RuntimeError("out of order")
        return x

    class Failing(type(model)):
        def step(self, tokens, positions, cache, batch):
            hidden, cache = super().step(tokens, positions, cache, batch)
            keys = jax.pure_callback(check, jax.ShapeDtypeStruct(cache.keys.shape, cache.keys.dtype), cache.keys)
            return hidden, type(cache)(keys, cache.values)

    engine = make(with_class(model, Failing))
    alone = tokens(run(engine, [5], DRAWN))
    engine.add_request("a", [5], DRAWN)
    engine.step()
    fails[0] = True
    outputs = finish(engine)
    assert "out of order" in outputs["a"].error
    fails[0] = False
    check_empty(engine)
    assert tokens(run(engine, [5], DRAWN)) == alone


def with_class(model, kind):
    """The same model, of a subclass."""
    graph, state = nnx.split(model)
    changed = nnx.merge(graph, state)
    changed.__class__ = kind
    return changed


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, n=2), BeamSearchParams(beam_width=2)])
def test_logits_that_are_not_numbers_end_their_own_request(engine, model, params):
    """One token makes them so; its neighbours and who comes later notice nothing, nor find its blocks."""
    alone = [tokens(run(engine, prompt, GREEDY)) for prompt in PROMPTS]
    said = {token_id for answer in alone for sample in answer for token_id in sample}
    bad = next(token_id for token_id in range(10, VOCAB) if token_id not in said)

    class Poisoned(type(model)):
        def step(self, tokens, positions, cache, batch):
            hidden, cache = super().step(tokens, positions, cache, batch)
            return jnp.where((tokens == bad).reshape(-1, 1), jnp.nan, hidden), cache

    poisoned = make(with_class(model, Poisoned))
    for _ in range(2):
        poisoned.add_request("bad", [*[7] * 20, bad], params)
        poisoned.add_request("same prefix", PROMPTS[2], GREEDY)
        poisoned.add_request("other", PROMPTS[0], GREEDY)
        outputs = finish(poisoned)
        assert outputs["bad"].error == "the model's logits are not numbers"
        assert outputs["bad"].num_cached_tokens == 0
        assert all(sample.finish_reason == "error" for sample in outputs["bad"].outputs)
        assert tokens(outputs["same prefix"]) == alone[2]
        assert tokens(outputs["other"]) == alone[0]
        poisoned.add_request("last", [*[7] * 20, bad], params)
        assert finish(poisoned)["last"].error is not None
    check_empty(poisoned)


def test_metrics_are_ordered_in_time(engine):
    start = time.monotonic()
    engine.add_request("a", [5], GREEDY)
    (output,) = engine.step()
    first = output.metrics
    assert not output.finished
    assert start <= first.arrival_time <= first.first_token_time <= time.monotonic()
    assert first.finished_time is None
    last = finish(engine)["a"].metrics
    assert (last.arrival_time, last.first_token_time) == (first.arrival_time, first.first_token_time)
    assert last.first_token_time < last.finished_time <= time.monotonic()
    assert last.time_to_first_token == last.first_token_time - last.arrival_time


def test_stats_count_a_request(model):
    engine = make(model)
    engine.add_request("a", [7] * 6, SamplingParams(temperature=0.0, max_tokens=4))
    assert (engine.stats().num_waiting, engine.stats().num_running) == (1, 0)
    engine.step()
    assert (engine.stats().num_waiting, engine.stats().num_running) == (0, 1)
    assert engine.stats().num_free_blocks == 62  # two hold 6 tokens
    finish(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps) == (6, 4, 4)
    assert stats.compiled_shapes == 4  # prefill and decode, and a sampler for each
    assert 0 < stats.used_slot_steps <= stats.held_slot_steps


def test_the_models_own_eos_ends_a_text(model):
    free = run(make(model), PROMPTS[0], GREEDY).outputs[0].token_ids
    eos = free[4]
    first = free.index(eos)
    graph, state = nnx.split(model)
    with_eos = nnx.merge(graph, state)
    with_eos.config = replace(model.config, eos_token_ids=(eos,))
    output = run(make(with_eos), PROMPTS[0], GREEDY).outputs[0]
    assert (output.token_ids, output.finish_reason) == (free[: first + 1], "stop")


def test_a_length_beyond_the_models_is_refused(model):
    with pytest.raises(ValueError, match=r"max_model_len: expected at most the model's 64, got 65"):
        make(model, max_model_len=65)


@pytest.mark.parametrize("where", ["schedule", "update"])
def test_an_interrupt_amid_the_bookkeeping_loses_nothing(engine, monkeypatch, where):
    expected = tokens(run(engine, PROMPTS[3], GREEDY))
    engine.add_request("a", PROMPTS[3], GREEDY)
    engine.step()
    original = getattr(engine._scheduler, where)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(engine._scheduler, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert tokens(finish(engine)["a"]) == expected


EDITED = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.75},
    "repetition": {"repetition_penalty": 1.7},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 1.0, "repetition_penalty": 0.8},
    "bias": {"logit_bias": {3: 1.5, 51: -2.0, 63: 0.25}},
    "allowed": {"allowed_token_ids": [0, 7, 31, 32, 63]},
    "bias and penalty": {"logit_bias": {7: 3.0}, "repetition_penalty": 1.3, "allowed_token_ids": list(range(2, 40))},
    "bad letter": {"bad_words": ["g", "H"]},  # greedily it says WgNAW?W?HW^WD^^^
    "bad word": {"bad_words": ["gN", "W?W", "^^"]},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": [30, 15]},  # N and ?
}


def edited_logits(logits, prompt, generated, params):
    """By the formulas of `SamplingParams`, one token at a time, in float64."""
    logits = logits.copy()
    if params.allowed_token_ids is not None:
        logits[[t for t in range(VOCAB) if t not in params.allowed_token_ids]] = -np.inf
    for word in params.bad_words:
        ids = [LETTERS.index(letter) for letter in word]
        if generated[len(generated) - len(ids) + 1 :] == ids[:-1]:
            logits[ids[-1]] = -np.inf
    if len(generated) < params.min_tokens:
        logits[list(params.stop_token_ids)] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        logits[token_id] += bias
    for token_id in {*prompt, *generated}:
        logits[token_id] *= params.repetition_penalty ** (-1 if logits[token_id] > 0 else 1)
    for token_id in generated:
        logits[token_id] -= params.frequency_penalty
    for token_id in set(generated):
        logits[token_id] -= params.presence_penalty
    return logits


def check_edited_greedy(model, output, params):
    """Every token was the likeliest after what was said before it, and reported as likely as the model found it."""
    (sample,) = output.outputs
    prompt = list(output.prompt_token_ids)
    logits = dense_logits(model, [*prompt, *sample.token_ids])[len(prompt) - 1 :]
    total = 0.0
    for i, token_id in enumerate(sample.token_ids):
        edited = edited_logits(logits[i], prompt, list(sample.token_ids[:i]), params)
        assert token_id == edited.argmax(), f"token {i}"
        total += (logits[i] - np.log(np.exp(logits[i]).sum()))[token_id]
    assert sample.cumulative_logprob == pytest.approx(total, abs=1e-4)


def edited_params(name):
    return SamplingParams(temperature=0.0, max_tokens=16, **EDITED[name])


@pytest.mark.parametrize("name", EDITED)
def test_greedy_by_what_is_asked_of_the_logits(engine, model, name):
    params = edited_params(name)
    output = run(engine, PROMPTS[0], params)
    check_edited_greedy(model, output, params)
    assert tokens(output) != tokens(run(engine, PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=16))), (
        "no effect"
    )


def test_what_one_asks_is_not_done_to_others(model):
    """All of it in one batch, with too few blocks and rows, so that requests are preempted and rows change hands."""
    small = make(model, Letters(), num_blocks=14)
    for name in EDITED:
        small.add_request(name, PROMPTS[0], edited_params(name))
        small.add_request(f"plain beside {name}", PROMPTS[3], GREEDY)
    outputs = finish(small)
    assert small.stats().num_preemptions > 0
    for name in EDITED:
        check_edited_greedy(model, outputs[name], edited_params(name))
        check_edited_greedy(model, outputs[f"plain beside {name}"], GREEDY)
    check_empty(small)


@pytest.mark.parametrize("budget", [8, 64])
def test_prompt_logprobs(model, budget):
    engine = make(model, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2)
    engine.add_request("a", [*PROMPTS[2][:-1], 9], params)
    engine.add_request("b", PROMPTS[3], SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0))
    engine.add_request("c", PROMPTS[0], GREEDY)
    outputs = finish(engine)
    assert outputs["c"].prompt_logprobs is None
    for name, n in (("a", 2), ("b", 0)):
        prompt, found = outputs[name].prompt_token_ids, outputs[name].prompt_logprobs
        expected = dense_logprobs(model, prompt)
        assert found[0] is None
        assert len(found) == len(prompt)
        for position in range(1, len(prompt)):
            row = expected[position - 1]
            assert set(found[position]) == {prompt[position], *np.argsort(-row)[:n].tolist()}
            for token_id, value in found[position].items():
                assert value == pytest.approx(row[token_id], abs=1e-4)


def test_prompt_logprobs_of_several_samples(engine, model):
    output = run(engine, PROMPTS[3], SamplingParams(n=3, seed=5, max_tokens=4, prompt_logprobs=1))
    expected = dense_logprobs(model, PROMPTS[3])
    for position in range(1, 5):
        assert output.prompt_logprobs[position][PROMPTS[3][position]] == pytest.approx(
            expected[position - 1, PROMPTS[3][position]], abs=1e-4
        )


def test_no_text_without_detokenize(engine):
    (plain,) = run(engine, PROMPTS[0], GREEDY).outputs
    (silent,) = run(engine, PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=12, detokenize=False)).outputs
    assert (silent.text, silent.token_ids) == ("", plain.token_ids)
    assert plain.text


def test_a_request_that_rules_out_every_token_fails_alone(engine):
    alone = tokens(run(engine, PROMPTS[0], DRAWN))
    engine.add_request("stays", PROMPTS[0], DRAWN)
    params = SamplingParams(n=2, allowed_token_ids=[5], min_tokens=1, stop_token_ids=[5])
    engine.add_request("fails", PROMPTS[3], params)
    outputs = finish(engine)
    assert outputs["fails"].error == "no token may be drawn: the request's parameters rule out all of them"
    assert [(sample.finish_reason, sample.token_ids) for sample in outputs["fails"].outputs] == [("error", ())] * 2
    assert tokens(outputs["stays"]) == alone


def test_a_prefix_is_shared_only_under_the_same_salt(model):
    engine = make(model)
    prompt, cached = [7] * 21, []
    for i, salt in enumerate([None, None, "a", "b", "a", None]):
        engine.add_request(str(i), prompt, GREEDY, cache_salt=salt)
        cached.append(finish(engine)[str(i)].num_cached_tokens)
    assert cached == [0, 20, 0, 0, 20, 20]
    assert engine.stats().prefix_cache_hits == 60
    assert engine.stats().prefix_cache_queries == 6 * 21


def test_the_more_urgent_runs_first(model):
    engine = make(model, max_num_seqs=1)
    for name, priority in (("a", 0), ("later", 5), ("urgent", -1)):
        engine.add_request(name, [5], GREEDY, priority=priority)
    ended = []
    while engine.has_unfinished():
        ended += [output.request_id for output in engine.step() if output.finished]
    assert ended == ["urgent", "a", "later"]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"priority": 1.0}, "priority: expected an int, got 1.0"),
        ({"priority": True}, "priority: expected an int, got True"),
        ({"cache_salt": 3}, "cache_salt: expected a str or None, got 3"),
        ({"cache_salt": b"a"}, "cache_salt: expected a str or None, got b'a'"),
    ],
)
def test_bad_priorities_and_salts(engine, asked, error):
    with pytest.raises(TypeError, match=f"^{error}$"):
        engine.add_request("a", [5], GREEDY, **asked)


def test_a_beam_search_that_is_aborted_gives_what_it_has(engine):
    engine.add_request("goes", PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=12))
    engine.add_request("stays", PROMPTS[1], GREEDY)
    for _ in range(8):
        engine.step()
    output = engine.abort("goes")
    assert [answer.finish_reason for answer in output.outputs] == ["abort"] * 3
    assert {len(answer.token_ids) for answer in output.outputs} <= set(range(2, 9))
    assert len({answer.token_ids for answer in output.outputs}) == 3
    finish(engine)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"preemption": "swap"}, 'num_host_blocks: expected at least 1 for preemption="swap", got 0'),
        ({"preemption": "never"}, 'preemption: expected "auto", "swap" or "recompute", got \'never\''),
        ({"num_host_blocks": -1}, "num_host_blocks: expected an int >= 0, got -1"),
    ],
)
def test_bad_configurations(config, error):
    with pytest.raises(ValueError, match=f"^{error}$"):
        EngineConfig(**config)
    for name in ("enable_prefix_caching", "batch_invariant"):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got 1$"):
            EngineConfig(**{name: 1})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("params", "ahead"), [(GREEDY, True), (BeamSearchParams(beam_width=2, max_tokens=12), False)])
def test_the_next_step_starts_while_the_last_one_runs(engine, monkeypatch, params, ahead):
    """Where the host need not know the tokens in between."""
    calls = []
    for name in ("start", "finish"):
        original = getattr(engine._runner, name)

        def noted(step, name=name, original=original):
            calls.append(name)
            return original(step)

        monkeypatch.setattr(engine._runner, name, noted)
    run(engine, [5], params)
    steady = ["start", *["start", "finish"] * 11, "finish"]
    assert calls == (steady if ahead else ["start", "finish"] * 12)
