"""However blocks are shared, moved, given back or found again, a request's tokens are the same.

32 requests of every way of decoding in one batch, over a small random Llama, in pools that never run out and in pools
that keep running out; the measure is each request alone in an engine that neither shares prefixes nor preempts.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jpaged import BeamSearchParams, EngineConfig, LLMEngine, SamplingParams

pytest.importorskip("models")

VOCAB = 64
SIZES: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 12, "max_model_len": 64}
POOLS: dict[str, dict[str, Any]] = {
    "large": {"num_blocks": 64},
    "large, no prefix caching": {"num_blocks": 64, "enable_prefix_caching": False},
    "tiny, swapping": {"num_blocks": 16, "num_host_blocks": 64, "preemption": "swap"},
    "tiny, recomputing": {"num_blocks": 16, "preemption": "recompute"},
    "tiny, recomputing, no prefix caching": {
        "num_blocks": 16,
        "preemption": "recompute",
        "enable_prefix_caching": False,
    },
    "tiny, few host blocks": {"num_blocks": 16, "num_host_blocks": 5},
    "blocks of 16": {"num_blocks": 10, "num_host_blocks": 64, "preemption": "swap", "block_size": 16},
    "blocks of 32": {"num_blocks": 8, "block_size": 32},
}
WAYS: list[SamplingParams | BeamSearchParams] = [
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=1.0, seed=1, max_tokens=20),
    SamplingParams(n=4, temperature=1.0, seed=2, max_tokens=16),
    BeamSearchParams(beam_width=4, max_tokens=16),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=3, max_tokens=24),
    SamplingParams(temperature=1.3, seed=4, max_tokens=20, min_tokens=8, stop_token_ids=[4, 9, 22, 51]),
    SamplingParams(temperature=0.0, max_tokens=20, presence_penalty=0.5, repetition_penalty=1.2),
    BeamSearchParams(beam_width=3, max_tokens=20, length_penalty=0.5, early_stopping=True, stop_token_ids=[4, 51]),
]


def requests():
    """The ways four times each, with prompts of 1 to 30 tokens that often begin alike."""
    random = np.random.RandomState(5)
    heads = [random.randint(0, VOCAB, 20).tolist() for _ in range(3)]
    for i in range(32):
        prompt = [*heads[i % 3][: random.randint(0, 21)], *random.randint(0, VOCAB, random.randint(1, 11)).tolist()]
        way = WAYS[i % len(WAYS)]
        yield prompt, replace(way, seed=i) if isinstance(way, SamplingParams) else way


@pytest.fixture(scope="module")
def model():
    from models.config import LlamaConfig
    from models.llama import Llama

    config = LlamaConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_len=64
    )
    return Llama(config, rngs=nnx.Rngs(3))


def make(model, **config):
    sizes: dict[str, Any] = {"block_size": 8} | SIZES | config
    return LLMEngine(model, None, EngineConfig(**sizes))


def finish(engine):
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    return outputs


def answers(output):
    assert output.error is None
    return [(answer.token_ids, answer.finish_reason) for answer in output.outputs]


@pytest.fixture(scope="module")
def alone(model):
    engine = make(model, num_blocks=64, enable_prefix_caching=False)
    found = []
    for i, (prompt, params) in enumerate(requests()):
        engine.add_request(str(i), prompt, params)
        found.append(answers(finish(engine)[str(i)]))
    assert engine.stats().num_preemptions == 0
    return found


@pytest.mark.parametrize("pool", POOLS)
def test_answers_are_the_same(model, alone, pool):
    engine = make(model, **POOLS[pool])
    for again in range(2):  # the second time with a prefix cache that is warm, where there is one
        for i, (prompt, params) in enumerate(requests()):
            engine.add_request(str(i), prompt, params, priority=i % 2)
        outputs = finish(engine)
        for i, expected in enumerate(alone):
            assert answers(outputs[str(i)]) == expected, f"request {i}, round {again}"
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_swapped) == (0, 0, 0)
    assert (stats.num_free_blocks, stats.num_free_host_blocks) == (stats.num_blocks, stats.num_host_blocks)
    if pool.startswith("large"):
        assert stats.num_preemptions == 0
    elif pool != "blocks of 32":
        assert stats.num_preemptions > 0
        assert (engine._scheduler.num_swapped_out > 0) == (stats.num_host_blocks > 0)
    if pool != "blocks of 32":  # which no prompt fills
        assert (stats.prefix_cache_hits > 0) == ("no prefix caching" not in pool)


def test_requests_that_join_and_leave_at_any_step(model, alone):
    engine = make(model, **POOLS["tiny, swapping"])
    outputs, left = {}, set()
    for i, (prompt, params) in enumerate(requests()):
        engine.add_request(str(i), prompt, params)
        for _ in range(i % 4):
            outputs |= {output.request_id: output for output in engine.step() if output.finished}
        if i % 5 == 4:
            left.add(i - 3)
            engine.abort(str(i - 3))
    outputs |= finish(engine)
    for i, expected in enumerate(alone):
        if str(i) in outputs:
            assert answers(outputs[str(i)]) == expected, f"request {i}"
    assert {int(name) for name in outputs} | left == set(range(32))
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.num_free_host_blocks) == (stats.num_blocks, stats.num_host_blocks)
