"""With `batch_invariant` a request's tokens and log-probabilities have the same bits, whatever else happens."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jpaged import BeamSearchParams, EngineConfig, LLMEngine, SamplingParams

pytest.importorskip("models")

SIZES: dict[str, Any] = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 8, "max_model_len": 64}
SITUATIONS: dict[str, dict[str, Any]] = {
    "batched": {},
    "swapped": {"num_blocks": 24, "num_host_blocks": 100, "preemption": "swap"},
    "recomputed": {"num_blocks": 24, "preemption": "recompute"},
    "small chunks": {"max_num_batched_tokens": 3},
}
WAYS: list[SamplingParams | BeamSearchParams] = [
    SamplingParams(temperature=0.0, max_tokens=24, logprobs=20),
    SamplingParams(temperature=1.0, seed=7, max_tokens=24, logprobs=20),
    SamplingParams(n=2, temperature=1.0, seed=8, max_tokens=20, logprobs=20, prompt_logprobs=20),
    BeamSearchParams(beam_width=3, max_tokens=12),
    SamplingParams(temperature=0.5, seed=9, max_tokens=24, logprobs=3, top_k=40, top_p=0.9),
]


@pytest.fixture(scope="module")
def model():
    from models.config import LlamaConfig
    from models.llama import Llama

    # Wide enough for a matmul's terms to be added up in more than one way.
    config = LlamaConfig(
        vocab_size=300, d_model=96, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=160, max_len=64
    )
    return Llama(config, rngs=nnx.Rngs(3))


def make(model, **config):
    sizes: dict[str, Any] = SIZES | {"batch_invariant": True} | config
    return LLMEngine(model, None, EngineConfig(**sizes))


def requests():
    random = np.random.RandomState(2)
    head = random.randint(0, 300, 20).tolist()
    for i in range(10):
        prompt = [*head[: random.randint(0, 21)], *random.randint(0, 300, random.randint(1, 15)).tolist()]
        way = WAYS[i % len(WAYS)]
        yield prompt, replace(way, seed=i) if isinstance(way, SamplingParams) else way


def finish(engine):
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    return outputs


def run_together(engine):
    for i, (prompt, params) in enumerate(requests()):
        engine.add_request(str(i), prompt, params)
    return finish(engine)


def bits(output):
    """Everything that was computed; floats are compared as they are."""
    assert output.error is None
    answers = [(a.token_ids, a.cumulative_logprob, a.logprobs) for a in output.outputs]
    return answers, output.prompt_logprobs


@pytest.fixture(scope="module")
def alone(model):
    engine = make(model, enable_prefix_caching=False)
    found = []
    for i, (prompt, params) in enumerate(requests()):
        engine.add_request(str(i), prompt, params)
        found.append(bits(finish(engine)[str(i)]))
    return found


@pytest.mark.parametrize("situation", SITUATIONS)
def test_bits_are_the_same(model, alone, situation):
    engine = make(model, **SITUATIONS[situation])
    for prefix in ("cold", "warm"):
        outputs = run_together(engine)
        for i, expected in enumerate(alone):
            assert bits(outputs[str(i)]) == expected, f"request {i}, {prefix}"
    assert engine.stats().prefix_cache_hits > 0
    assert (engine.stats().num_preemptions > 0) == (situation in ("swapped", "recomputed"))


def test_without_the_option_bits_do_differ(model, alone):
    """So that the tests above show something: here shapes and chunks leave their traces."""
    outputs = run_together(make(model, batch_invariant=False, max_num_batched_tokens=16))
    assert [bits(outputs[str(i)]) == expected for i, expected in enumerate(alone)].count(False) > 0


def test_one_shape_serves_all(model):
    engine = make(model, num_blocks=32)
    for prompt in ([5], [7] * 30):
        engine.add_request("a", prompt, SamplingParams(max_tokens=4))
        finish(engine)
    assert engine.stats().compiled_shapes == 2  # the model, and the sampler
