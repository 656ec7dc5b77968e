"""Beam search against Hugging Face's beams and scores (tests/data/make_beam_search_reference.py)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from safetensors.numpy import save_file

from jpaged import EngineConfig, LLMEngine
from jpaged.beam_search import BeamSearch, num_candidates
from jpaged.beam_search_params import BeamSearchParams

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "beam_search.json").read_text(encoding="utf-8"))


def test_a_search_by_hand():
    """Two beams over four tokens, 0 ends; the numbers are powers of one half."""
    search = BeamSearch(BeamSearchParams(beam_width=2), frozenset({0}), max_tokens=3)
    half = np.log(0.5)
    assert search.advance(np.array([[3, 1, 0, 2]]), half * np.array([[1, 2, 3, 3]])) == [(0, 3), (0, 1)]
    # After 3: end 1/2, 1 by 1/4. After 1: 2 by 1/2, end by 1/8. Sums: 30 2, 31 3, 12 3, 10 5.
    found = search.advance(np.array([[0, 1, 2, 3], [2, 0, 1, 3]]), half * np.array([[1, 2, 9, 9], [1, 3, 9, 9]]))
    assert found == [(0, 1), (1, 2)]
    assert [h.token_ids for h in search.best()] == [(3, 0), (3, 1)]
    assert [h.has_end_token for h in search.best()] == [True, False]
    # The last tokens: 312 by 1/2, 4 in all; 123 by 1/16, 7 in all; 120 is third and too late.
    found = search.advance(np.array([[2, 1, 3, 0], [3, 0, 1, 2]]), half * np.array([[1, 9, 9, 9], [4, 5, 9, 9]]))
    assert found == []
    ended = search.best()
    assert [h.token_ids for h in ended] == [(3, 0), (3, 1, 2)]
    assert [h.score(1.0) for h in ended] == pytest.approx([half * 2 / 2, half * 4 / 3])


@pytest.mark.parametrize(("num_end_tokens", "expected"), [(0, 8), (1, 8), (2, 12)])
def test_enough_candidates_that_some_go_on(num_end_tokens, expected):
    assert num_candidates(BeamSearchParams(beam_width=4), num_end_tokens) == expected


def test_as_wide_as_it_gets_it_finds_the_likeliest_of_all():
    """No beam is dropped: every text of up to three tokens is compared. The model: a table of two-token histories."""
    table = scipy.special.log_softmax(np.random.default_rng(0).normal(size=(4, 4, 4)), axis=-1)
    order = np.argsort(-table, axis=-1)

    def step(histories):
        rows = [(ids[-2], ids[-1]) for ids in histories]
        return np.array([order[row] for row in rows]), np.array([table[row][order[row]] for row in rows])

    params = BeamSearchParams(beam_width=64, length_penalty=0.0)
    search = BeamSearch(params, frozenset(), max_tokens=3)
    while continuations := search.advance(*step([(0, 0, *h.token_ids) for h in search.running])):
        assert len(continuations) == len(search.running)
    texts = {(a, b, c): table[0, 0, a] + table[0, a, b] + table[a, b, c] for a, b, c in np.ndindex(4, 4, 4)}
    ranked = sorted(texts, key=lambda text: -texts[text])
    assert [h.token_ids for h in search.best()] == ranked
    assert [h.logprob for h in search.best()] == pytest.approx([texts[text] for text in ranked])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The reference's tiny model, in a folder of Hugging Face's layout: its weights drawn again."""
    config, folder = REFERENCE["tiny"]["config"], tmp_path_factory.mktemp("tiny")
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    K = config["num_key_value_heads"] * config["head_dim"]
    attention = {"q": (D, D), "k": (K, D), "v": (K, D), "o": (D, D)}
    mlp = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj.weight": shape for x, shape in attention.items()}
        shapes |= {f"model.layers.{i}.mlp.{x}_proj.weight": shape for x, shape in mlp.items()}
        shapes |= {f"model.layers.{i}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    random = np.random.RandomState(REFERENCE["tiny"]["weights_seed"])
    weights = {name: random.standard_normal(shapes[name]).astype(np.float32) for name in sorted(shapes)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = pytest.importorskip("models").load(folder, dtype="float32")
    return model


def search_all(engine, searches):
    """All of them in one batch, each checked against its beams and scores."""
    for i, asked in enumerate(searches):
        params = BeamSearchParams(
            beam_width=asked["beam_width"],
            max_tokens=asked["max_tokens"],
            length_penalty=asked["length_penalty"],
            early_stopping=asked["early_stopping"],
            stop_token_ids=asked["eos_token_ids"],
            ignore_eos=True,
        )
        engine.add_request(str(i), asked["prompt_token_ids"], params)
    outputs = {}
    while engine.has_unfinished():
        outputs |= {int(output.request_id): output for output in engine.step() if output.finished}
    for i, asked in enumerate(searches):
        assert outputs[i].error is None
        found = outputs[i].outputs
        assert [answer.token_ids for answer in found] == [tuple(beam["token_ids"]) for beam in asked["beams"]], asked
        scores = [a.cumulative_logprob / len(a.token_ids) ** asked["length_penalty"] for a in found]
        assert scores == pytest.approx([beam["score"] for beam in asked["beams"]], abs=2e-4, rel=1e-4)
        for answer in found:
            is_stopped = answer.token_ids[-1] in asked["eos_token_ids"]
            assert answer.finish_reason == ("stop" if is_stopped else "length")
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


POOLS = {
    "large": {"num_blocks": 400},
    "small, recomputing": {"num_blocks": 48, "preemption": "recompute"},
    "small, swapping": {"num_blocks": 48, "num_host_blocks": 96, "preemption": "swap"},
    "no prefix caching": {"num_blocks": 48, "enable_prefix_caching": False},
    "large blocks": {"num_blocks": 48, "block_size": 16},
}


@pytest.mark.parametrize("pool", POOLS)
def test_beams_and_scores_of_a_tiny_model(tiny, pool):
    config: dict[str, Any] = {"block_size": 4, "max_num_seqs": 12, "max_num_batched_tokens": 16} | POOLS[pool]
    engine = LLMEngine(tiny, None, EngineConfig(**config))
    searches = REFERENCE["tiny"]["searches"]
    search_all(engine, searches if pool == "large" else searches[::4])
    if pool.startswith("small"):
        assert engine.stats().num_preemptions > 0


def test_beams_and_scores_of_smollm2(smollm2_path):
    pytest.importorskip("models")
    from models import load

    reference = REFERENCE["smollm2"]
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == reference["gguf_sha256"]
    model, _ = load(smollm2_path, dtype="float32")
    config = EngineConfig(max_num_seqs=8, num_blocks=128, max_model_len=128, max_num_batched_tokens=64)
    search_all(LLMEngine(model, None, config), reference["searches"])


def test_the_reference_has_what_it_is_to_show():
    searches = REFERENCE["tiny"]["searches"]
    assert (
        {s["beam_width"] for s in searches} == {s["beam_width"] for s in REFERENCE["smollm2"]["searches"]} == {2, 4, 6}
    )
    ends = [len(beam["token_ids"]) < s["max_tokens"] for s in searches for beam in s["beams"]]
    assert sum(ends) > 50  # hypotheses that an EOS ended
    for early_stopping in (True, False, "never"):
        assert sum(s["early_stopping"] == early_stopping for s in searches) > 20
