"""The real model against what Hugging Face transformers computed in float32 (tests/data/make_smollm2_reference.py)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import EngineConfig, LLMEngine, SamplingParams, generate

pytest.importorskip("models")

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text(encoding="utf-8"))
PROMPTS: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in REFERENCE["prompts"]}
LONG = {"table", "story"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    from models import load

    return load(smollm2_path, dtype="float32")


@pytest.fixture(scope="module")
def alone(smollm2):
    """An engine that runs one sequence at a time."""
    return make(smollm2, max_num_seqs=1, max_model_len=1536)


def make(smollm2, **config):
    model, tokenizer = smollm2
    return LLMEngine(model, tokenizer, EngineConfig(**config))


def answer(engine, names, params=GREEDY):
    """The finished outputs of the prompts with these names, given as text and run together."""
    for name in names:
        engine.add_request(name, PROMPTS[name]["prompt"], params)
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    return [outputs[name] for name in names]


def check_tokens(outputs):
    for output in outputs:
        entry = PROMPTS[output.request_id]
        assert output.outputs[0].token_ids == tuple(entry["token_ids"]), output.request_id
        assert output.outputs[0].finish_reason == "length"
        assert output.error is None


def check_freed(engine):
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_reference_is_of_this_file_and_not_of_ties(smollm2_path):
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == REFERENCE["gguf_sha256"]
    assert len(PROMPTS) == 17
    assert min(min(entry["margins"]) for entry in PROMPTS.values()) >= 1e-3


def test_tokenization(smollm2):
    _, tokenizer = smollm2
    for entry in PROMPTS.values():
        assert tokenizer.encode(entry["prompt"]) == entry["prompt_token_ids"], entry["name"]
        assert tokenizer.decode(entry["token_ids"]) == entry["text"], entry["name"]


@pytest.mark.parametrize("names", [[name for name in PROMPTS if name not in LONG], sorted(LONG)], ids=["short", "long"])
def test_prompt_logits_of_the_dense_model(smollm2, names):
    model, _ = smollm2
    ids = [PROMPTS[name]["prompt_token_ids"] for name in names]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)  # padded on the right, which causal attention ignores
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    places = [(row, at) for row, name in enumerate(names) for at in PROMPTS[name]["logits"]]
    rows = np.array([row for row, _ in places])
    positions = np.array([at["position"] for _, at in places])
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens)[rows, positions])(model, tokens))
    for (row, at), found in zip(places, logits, strict=True):
        where = f"{names[row]} at {at['position']}"
        np.testing.assert_allclose(found[at["top_ids"]], at["top"], rtol=0, atol=2e-3, err_msg=where)
        np.testing.assert_allclose(found[REFERENCE["logit_ids"]], at["values"], rtol=0, atol=2e-3, err_msg=where)
        assert found.max() <= at["top"][0] + 2e-3, where


def test_all_prompts_batched_together(smollm2):
    # Room for all prompts in the first step, so that two steps are compiled, that one and the decodes, and one sampler.
    engine = make(smollm2, max_num_seqs=17, max_num_batched_tokens=2560, max_model_len=1536)
    outputs = answer(engine, PROMPTS)
    check_tokens(outputs)
    assert engine.stats().steps == 48
    assert engine.stats().compiled_shapes == 3
    for output in outputs:
        entry = PROMPTS[output.request_id]
        assert output.prompt == entry["prompt"]
        assert output.prompt_token_ids == tuple(entry["prompt_token_ids"])
        # The two differ in an unfinished last character alone, which the engine may hold back.
        assert entry["text"].startswith(output.outputs[0].text.rstrip("\ufffd"))
        assert len(entry["text"]) - len(output.outputs[0].text) <= 1
    check_freed(engine)


def test_the_longest_prompt_alone(alone):
    check_tokens(answer(alone, ["story"]))


def test_prompts_of_least_margin_alone(alone):
    closest = sorted(PROMPTS, key=lambda name: min(PROMPTS[name]["margins"]))
    for name in [name for name in closest if name not in LONG][:3]:
        check_tokens(answer(alone, [name]))


def test_logprobs(alone):
    name = "emoji"
    (output,) = answer(alone, [name], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=5))
    expected = PROMPTS[name]["logprobs"]
    found = output.outputs[0].logprobs
    assert len(found) == len(expected) == 16
    for token_logprobs, best in zip(found, expected, strict=True):
        # By rank: which of two equal ones comes first says nothing.
        ranked = sorted(token_logprobs.values(), reverse=True)
        np.testing.assert_allclose(ranked, best["values"], rtol=0, atol=2e-3)
        for token_id, value in zip(best["ids"], best["values"], strict=True):
            assert token_logprobs.get(token_id, best["values"][-1]) == pytest.approx(value, abs=2e-3)
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(e["values"][0] for e in expected), abs=1e-2)


def test_eos_ends_an_answer(alone):
    entry = PROMPTS["arithmetic"]
    (output,) = answer(alone, ["arithmetic"], SamplingParams(temperature=0.0, max_tokens=48))
    assert output.outputs[0].token_ids == tuple(entry["token_ids"][: entry["eos_index"] + 1])
    assert output.outputs[0].finish_reason == "stop"
    # EOS itself is no text.
    assert output.outputs[0].text == text_before_eos(entry)
    check_freed(alone)


def text_before_eos(entry):
    """What the reference says before its first EOS, after which come a newline and the next turn."""
    text = entry["text"]
    return text[: text.index("\nsystem\n")]


def test_preempted_requests_say_the_same(smollm2):
    names = ["c", "hindi", "digits", "chat"]  # 39 to 45 tokens of prompt: 3 blocks each at first, 6 at the end
    engine = make(smollm2, max_num_seqs=4, num_blocks=14, max_model_len=128)
    check_tokens(answer(engine, names))
    assert engine.stats().num_preemptions > 0
    check_freed(engine)


@pytest.mark.parametrize("budget", [64, 200])
def test_chunked_prefill(smollm2, budget):
    names = ["emoji", "table"]  # 809 tokens in the second
    engine = make(smollm2, max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=1024)
    check_tokens(answer(engine, names))
    assert engine.stats().steps > 48 + 800 // budget - 1
    check_freed(engine)


@pytest.mark.parametrize("block_size", [8, 32])
def test_block_sizes(smollm2, block_size):
    names = ["hindi", "arabic", "newline", "python"]
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 128}
    engine = make(smollm2, block_size=block_size, **sizes)
    check_tokens(answer(engine, names))
    check_freed(engine)


def test_generate_in_one_program(smollm2):
    model, tokenizer = smollm2
    names = ["one_token", "english", "arithmetic", "french"]
    ids = [PROMPTS[name]["prompt_token_ids"] for name in names]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    (eos_id,) = tokenizer.eos_token_ids
    run = jax.jit(generate, static_argnames=("max_new_tokens", "eos_id"))
    output = run(model, jnp.asarray(tokens), jnp.array([*map(len, ids)]), max_new_tokens=48, eos_id=eos_id)
    for i, name in enumerate(names):
        entry = PROMPTS[name]
        length = 48 if entry["eos_index"] is None else entry["eos_index"] + 1
        expected = entry["token_ids"][:length] + [0] * (48 - length)
        assert output.tokens[i].tolist() == expected, name
        assert output.lengths[i] == length
    best = [logprobs["values"][0] for logprobs in PROMPTS["english"]["logprobs"]]
    np.testing.assert_allclose(output.logprobs[names.index("english"), :16], best, rtol=0, atol=2e-3)
    assert "arithmetic" in names  # one that EOS ends before the others
