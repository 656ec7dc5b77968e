"""`generate`, one program for a whole batch, against the engine and a dense forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged import EngineConfig, LLMEngine, SamplingParams, generate

pytest.importorskip("models")

PROMPTS = [[5, 9, 13], [1], [7, 6, 5, 4, 3, 2, 1], [2, 4, 8, 16, 32]]
LENS = jnp.array([3, 1, 7, 5], jnp.int32)
NEW = 10


def padded(value):
    """The prompts, with this token past their ends."""
    return jnp.array([[*prompt, *[value] * (7 - len(prompt))] for prompt in PROMPTS], jnp.int32)


@pytest.fixture(scope="module")
def model():
    from models.config import LlamaConfig
    from models.llama import Llama

    config = LlamaConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_len=32
    )
    return Llama(config, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def run():
    return jax.jit(generate, static_argnames=("max_new_tokens", "eos_id", "block_size", "temperature", "top_k"))


@pytest.fixture(scope="module")
def greedy(model, run):
    return jax.device_get(run(model, padded(0), LENS, max_new_tokens=NEW))


def test_greedy_is_the_engines(model, greedy):
    engine = LLMEngine(model, None, EngineConfig(num_blocks=16, max_num_seqs=4, max_num_batched_tokens=16))
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=NEW))
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                row = int(output.request_id)
                assert output.outputs[0].token_ids == tuple(greedy.tokens[row])
                assert output.outputs[0].cumulative_logprob == pytest.approx(greedy.logprobs[row].sum(), abs=1e-4)
    assert greedy.lengths.tolist() == [NEW] * 4


def test_greedy_is_the_dense_models_choice(model, greedy):
    for prompt, tokens, logprobs in zip(PROMPTS, greedy.tokens, greedy.logprobs, strict=True):
        ids = [*prompt, *tokens.tolist()]
        logits = np.asarray(model(jnp.array([ids + [0] * (17 - len(ids))], jnp.int32))[0], np.float64)
        logits = logits[len(prompt) - 1 : len(ids) - 1]
        assert tokens.tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(logprobs, logits.max(-1) - np.log(np.exp(logits).sum(-1)), rtol=0, atol=1e-4)


def test_shapes_and_types(greedy):
    assert (greedy.tokens.shape, greedy.lengths.shape, greedy.logprobs.shape) == ((4, NEW), (4,), (4, NEW))
    assert (greedy.tokens.dtype, greedy.lengths.dtype, greedy.logprobs.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize("block_size", [3, 32])
def test_block_sizes(model, run, greedy, block_size):
    output = run(model, padded(0), LENS, max_new_tokens=NEW, block_size=block_size)
    np.testing.assert_array_equal(output.tokens, greedy.tokens)


def test_what_stands_past_a_prompt_has_no_influence(model, run, greedy):
    output = run(model, padded(63), LENS, max_new_tokens=NEW)
    np.testing.assert_array_equal(output.tokens, greedy.tokens)


def test_eos_ends_a_row(model, run, greedy):
    eos_id = int(greedy.tokens[1, 4])
    expected = greedy.tokens.copy()
    lengths = []
    for row in expected:
        found = np.flatnonzero(row == eos_id)
        lengths.append(int(found[0]) + 1 if len(found) else NEW)
        row[lengths[-1] :] = 0
    assert lengths[1] <= 5
    output = run(model, padded(0), LENS, max_new_tokens=NEW, eos_id=eos_id)
    np.testing.assert_array_equal(output.tokens, expected)
    assert output.lengths.tolist() == lengths
    goes_on = np.arange(NEW)[None] < np.array(lengths)[:, None]
    np.testing.assert_allclose(output.logprobs, np.where(goes_on, greedy.logprobs, 0), rtol=0, atol=1e-5)


def test_the_loop_ends_with_the_last_row(model):
    """One step of the model for the prompts, and one for each token after the first, until all rows have ended."""
    steps = []

    class Counting(type(model)):
        def step(self, tokens, positions, cache, batch):
            hidden, cache = super().step(tokens, positions, cache, batch)
            jax.debug.callback(lambda: steps.append(1), ordered=False)
            return hidden, cache

    counting = nnx.merge(*nnx.split(model))
    counting.__class__ = Counting
    prompt, lens = jnp.array([[5, 9, 13]], jnp.int32), jnp.array([3], jnp.int32)
    tokens = np.asarray(generate(counting, prompt, lens, max_new_tokens=NEW).tokens[0])
    jax.effects_barrier()
    assert len(steps) == NEW
    steps.clear()
    output = generate(counting, prompt, lens, max_new_tokens=NEW, eos_id=int(tokens[3]))
    jax.effects_barrier()
    assert len(steps) == output.lengths[0] == tokens.tolist().index(tokens[3]) + 1


def test_sampling(model, run):
    def draw(tokens, seed):
        return np.asarray(
            run(model, tokens, LENS, max_new_tokens=NEW, rng=jax.random.key(seed), temperature=1.0).tokens
        )

    first = draw(padded(0), 1)
    np.testing.assert_array_equal(draw(padded(0), 1), first)
    np.testing.assert_array_equal(draw(padded(63), 1), first)
    assert (draw(padded(0), 2) != first).any(axis=1).all()


def test_rows_of_one_prompt_differ(model, run):
    tokens, lens = jnp.full((4, 7), 5, jnp.int32), jnp.array([2, 2, 2, 2], jnp.int32)
    output = run(model, tokens, lens, max_new_tokens=NEW, rng=jax.random.key(0), temperature=1.0)
    assert len({tuple(row) for row in output.tokens.tolist()}) == 4


def test_top_k_of_one_is_greedy(model, run, greedy):
    output = run(model, padded(0), LENS, max_new_tokens=NEW, rng=jax.random.key(0), temperature=1.0, top_k=1)
    np.testing.assert_array_equal(output.tokens, greedy.tokens)


def test_inside_a_larger_program(model, greedy):
    @jax.jit
    def sum_of_logprobs(model, tokens, lens):
        output = generate(model, tokens, lens, max_new_tokens=NEW)
        return output.logprobs.sum(1) / output.lengths.astype(jnp.float32)

    np.testing.assert_allclose(sum_of_logprobs(model, padded(0), LENS), greedy.logprobs.sum(1) / NEW, rtol=0, atol=1e-5)


def test_vmapped_over_keys(model):
    def draw(key):
        return generate(model, padded(0), LENS, max_new_tokens=4, rng=key, temperature=1.0).tokens

    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(draw))(keys)
    for tokens, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(tokens, jax.jit(draw)(key))


BAD = {
    "one dimension": ({"prompt_tokens": jnp.array([1, 2])}, "prompt_tokens"),
    "no rows": ({"prompt_tokens": jnp.zeros((0, 3), jnp.int32)}, "prompt_tokens"),
    "no columns": ({"prompt_tokens": jnp.zeros((4, 0), jnp.int32)}, "prompt_tokens"),
    "fewer lengths": ({"prompt_lens": jnp.array([1, 2])}, "prompt_lens"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "block size": ({"block_size": 0}, "block_size"),
    "no rng": ({"temperature": 0.5}, "rng is needed"),
}


# Past the check of shapes at each call, which the tests switch on.
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(model, changes, message):
    arguments = {"prompt_tokens": padded(0), "prompt_lens": LENS, "max_new_tokens": NEW} | changes
    unchecked = getattr(generate, "__wrapped__", generate)
    with pytest.raises(ValueError, match=f"^generate: {message}"):
        unchecked(model, **arguments)
