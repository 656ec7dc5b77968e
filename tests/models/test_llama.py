"""Small Llamas against the same network written out in NumPy, float64; the full size by its shapes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import LlamaConfig, llama3_rope_factors
from models.llama import Block, Llama
from models.rotary import Rotary, rotate
from pallas_kernels import KVCache, PagedBatch

# N * H is not D, and no two sizes are equal.
CONFIG = LlamaConfig(
    vocab_size=61,
    d_model=20,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    d_ff=28,
    max_len=128,
    rope_theta=100.0,
    norm_eps=1e-3,
)
TIED = replace(CONFIG, tie_embeddings=True, rope_factors=(1.0, 1.5, 4.0, 8.0))
KINDS = [(CONFIG, False), (CONFIG, True), (TIED, False), (TIED, True)]
NAMES = ["untied-unrolled", "untied-scanned", "tied-unrolled", "tied-scanned"]
LENGTHS = (21, 9, 1, 14)


def make(config, scan_layers=False, **options):
    """A model whose norms are not all ones, and whose logits are not all alike."""
    model = Llama(config, rngs=nnx.Rngs(1), scan_layers=scan_layers, **options)
    keys = iter(jax.random.split(jax.random.key(2), 64))

    def spread(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return leaf * jax.random.uniform(next(keys), leaf.shape, leaf.dtype, 0.5, 1.5)
        return leaf * jnp.asarray(1.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(spread, model)


def weights_of(model) -> dict[str, np.ndarray]:
    """Every parameter in float64 under its path, layers apart: `layers.0.mlp.down_weight_df`."""
    weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, array = ".".join(map(str, path)), np.asarray(leaf[...]).astype(np.float64)
        if isinstance(model.layers, Block) and name.startswith("layers."):
            rest = name.removeprefix("layers.")
            weights |= {f"layers.{i}.{rest}": array[i] for i in range(model.config.num_layers)}
        else:
            weights[name] = array
    return weights


def turned(x, positions, config):
    """RoFormer, eq. 34, each pair (i, i + H/2) as a complex number; x is [T, heads, H]."""
    half = config.head_dim // 2
    factors = np.array(config.rope_factors or [1.0] * half)
    angles = np.outer(positions, config.rope_theta ** (-2 * np.arange(half) / config.head_dim) / factors)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def logits_in_numpy(weights, tokens, config, first_position=0):
    """One sequence [T] -> [T, V]."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights[f"{name}.weight_d"]

    T, repeats = len(tokens), config.num_heads // config.num_kv_heads
    positions = first_position + np.arange(T)
    x = weights["embedding.weight_vd"][tokens]
    for i in range(config.num_layers):
        layer = {name.removeprefix(f"layers.{i}."): array for name, array in weights.items()}
        y = norm(x, f"layers.{i}.attention_norm")
        qkv = np.einsum("td,kghd->tkgh", y, layer["attention.qkv_weight_kghd"])
        query, key, value = qkv[:, :, :-2].reshape(T, config.num_heads, -1), qkv[:, :, -2], qkv[:, :, -1]
        query, key = turned(query, positions, config), turned(key, positions, config)
        key, value = np.repeat(key, repeats, axis=1), np.repeat(value, repeats, axis=1)
        scores = np.einsum("tnh,snh->nts", query, key) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh,dnh->td", probs, value, layer["attention.o_weight_dnh"])
        y = norm(x, f"layers.{i}.mlp_norm")
        gate, up = np.einsum("td,cfd->ctf", y, layer["mlp.gate_up_weight_2fd"])
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_weight_df"].T
    head = weights["embedding.weight_vd" if config.tie_embeddings else "head.weight_vd"]
    return norm(x, "norm") @ head.T


def some_tokens(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, CONFIG.vocab_size, length).astype(np.int32)


dense = jax.jit(lambda model, tokens, **packing: model(tokens, **packing))


# Dense.


@pytest.mark.parametrize(("config", "scan_layers"), KINDS, ids=NAMES)
def test_dense_logits_are_numpys(config, scan_layers):
    model = make(config, scan_layers)
    tokens = np.stack([some_tokens(19, seed) for seed in range(2)])
    logits = dense(model, jnp.asarray(tokens))
    assert (logits.shape, logits.dtype) == ((2, 19, 61), jnp.float32)
    weights = weights_of(model)
    for row in range(2):
        np.testing.assert_allclose(logits[row], logits_in_numpy(weights, tokens[row], config), rtol=1e-4, atol=1e-4)


def test_scanned_layers_are_the_unrolled_ones():
    unrolled = make(TIED)
    scanned = make(TIED, scan_layers=True)
    scanned.embedding, scanned.norm = unrolled.embedding, unrolled.norm
    scanned.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *unrolled.layers)
    tokens = jnp.asarray(some_tokens(19)[None])
    np.testing.assert_allclose(dense(scanned, tokens), dense(unrolled, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_layers_start_out_different(scan_layers):
    weights = weights_of(Llama(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers))
    drawn = [name for name in weights if "norm" not in name and name.startswith("layers.0.")]
    assert len(drawn) == 4
    for name in drawn:
        others = [weights[name.replace("layers.0", f"layers.{i}")] for i in (1, 2)]
        assert not any(np.array_equal(weights[name], other) for other in others)
        # Drawn with the variance that keeps a unit input at unit size: fan-in is D, but N * H and F on the way back.
        fan_in = {"o": 6 * 8, "down": 28}.get(name.split(".")[-1].split("_")[0], 20)
        assert weights[name].std() * fan_in**0.5 == pytest.approx(1, abs=0.2)


def test_packed_sequences_are_the_separate_ones():
    model = make(CONFIG)
    packed = np.concatenate([some_tokens(n) for n in LENGTHS])
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    segments = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    logits = dense(
        model,
        jnp.asarray(packed[None]),
        positions=jnp.asarray(positions[None], jnp.int32),
        segment_ids=jnp.asarray(segments[None], jnp.int32),
    )
    expected = np.concatenate([logits_in_numpy(weights_of(model), some_tokens(n), CONFIG) for n in LENGTHS])
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)


# Paged.


class Serving:
    """Some sequences' steps through one compiled shape: their blocks lie anywhere in the pool."""

    def __init__(self, model, max_query_len=24):
        config = model.config
        self.model, self.max_query_len = model, max_query_len
        self.tables = np.random.default_rng(0).permutation(60)[: 5 * 6].reshape(5, 6).astype(np.int32)
        self.cache = KVCache.create(
            num_layers=config.num_layers,
            num_blocks=60,
            block_size=4,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jax.tree.leaves(model)[0].dtype,
        )
        self.done = [0] * len(LENGTHS)
        self.compiled = jax.jit(self.run)

    @staticmethod
    def run(model, tokens, positions, cache, batch):
        hidden, cache = model.step(tokens, positions, cache, batch)
        return model.logits(hidden), hidden, cache

    def step(self, **news):
        """So many new tokens of each sequence, decodes first by the caller's order; returns logits by sequence."""
        tokens, positions, slots, tables, lens, starts = [], [], [], [], [], [0]
        for name, new in news.items():
            i = int(name[1:])
            here = np.arange(self.done[i], self.done[i] + new)
            self.done[i] += new
            tokens.extend(some_tokens(LENGTHS[i])[here])
            positions.extend(here)
            slots.extend(self.tables[i, here // 4] * 4 + here % 4)
            tables.append(self.tables[i])
            lens.append(self.done[i])
            starts.append(len(tokens))
        num_decodes = next((i for i, new in enumerate(news.values()) if new != 1), len(news))
        rows, room = 5 - len(news), 48 - len(tokens)
        batch = PagedBatch(
            block_tables=jnp.asarray(np.concatenate([tables, self.tables[:rows]])),
            context_lens=jnp.asarray(lens + [0] * rows, jnp.int32),
            query_starts=jnp.asarray(starts + starts[-1:] * rows, jnp.int32),
            slot_mapping=jnp.asarray(slots + [-1] * room, jnp.int32),
            num_decodes=jnp.int32(num_decodes),
            max_query_len=self.max_query_len,
        )
        padded = [jnp.asarray(values + [0] * room, jnp.int32) for values in (tokens, positions)]
        logits, self.hidden, self.cache = self.compiled(self.model, *padded, self.cache, batch)
        return dict(zip(news, np.split(np.asarray(logits)[: starts[-1]], starts[1:-1]), strict=True))


@pytest.mark.parametrize(("config", "scan_layers"), KINDS, ids=NAMES)
def test_paged_steps_are_the_dense_model(config, scan_layers):
    """Prompts whole, in chunks and token by token, and all of these in one step."""
    serving = Serving(make(config, scan_layers))
    steps = [
        serving.step(s0=8, s1=9),  # the second one is whole
        serving.step(s3=1, s0=7),
        serving.step(s2=1, s3=4),
        serving.step(s3=1, s0=5),
        serving.step(s0=1, s3=1),
        serving.step(s3=7),
    ]
    weights = weights_of(serving.model)
    assert tuple(serving.done) == LENGTHS
    for i, length in enumerate(LENGTHS):
        logits = np.concatenate([step[f"s{i}"] for step in steps if f"s{i}" in step])
        expected = logits_in_numpy(weights, some_tokens(length), config)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_decoding_from_the_first_token_on_is_the_dense_model():
    serving = Serving(make(CONFIG), max_query_len=1)
    logits = np.concatenate([serving.step(s1=1)["s1"] for _ in range(LENGTHS[1])])
    expected = logits_in_numpy(weights_of(serving.model), some_tokens(LENGTHS[1]), CONFIG)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_every_layer_has_its_own_keys_in_the_cache():
    serving = Serving(make(CONFIG))
    serving.step(s1=9)
    block, offset = serving.tables[1, np.arange(9) // 4], np.arange(9) % 4
    keys = np.asarray(serving.cache.keys)
    written = keys[:, block, offset]
    assert (np.abs(written).max((1, 2, 3)) > 0.1).all()
    assert not np.array_equal(written[0], written[1])
    # Rotated by its position: the first layer's, from the embedding alone.
    weights = weights_of(serving.model)
    x = weights["embedding.weight_vd"][some_tokens(9)]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * weights["layers.0.attention_norm.weight_d"]
    expected = turned(
        np.einsum("td,khd->tkh", x, weights["layers.0.attention.qkv_weight_kghd"][:, -2]), np.arange(9), CONFIG
    )
    np.testing.assert_allclose(written[0], expected, rtol=1e-4, atol=1e-5)
    keys = keys.copy()
    keys[:, block, offset] = 0
    assert not keys.any()


# Training.


@pytest.mark.parametrize(("config", "scan_layers"), [KINDS[0], KINDS[3]], ids=[NAMES[0], NAMES[3]])
def test_gradients_are_slopes_of_the_loss(config, scan_layers):
    """Along a random direction for each parameter by itself, against a difference quotient in float64."""
    model = make(config, scan_layers)
    tokens = some_tokens(16)

    @jax.jit
    @jax.grad
    def gradient(model, tokens):
        logprobs = jax.nn.log_softmax(model(tokens[None, :-1])[0])
        return -jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1).mean()

    def loss(weights):
        logits = logits_in_numpy(weights, tokens[:-1], config)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -logprobs[np.arange(15), tokens[1:]].mean()

    found, weights = weights_of(gradient(model, jnp.asarray(tokens))), weights_of(model)
    assert found.keys() == weights.keys()
    assert len(found) == 3 * 6 + 2 + (not config.tie_embeddings)
    rng = np.random.default_rng(0)
    for name, array in weights.items():
        assert np.isfinite(found[name]).all(), name
        # Mostly along the gradient, so that the slope is not small by chance.
        direction = found[name] / np.linalg.norm(found[name]) + 0.3 * rng.standard_normal(array.shape) / array.size**0.5
        step = 1e-4
        ahead, behind = (loss(weights | {name: array + sign * step * direction}) for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        assert abs(slope) > 1e-4, name
        assert (found[name] * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6), name


# Numbers.


def test_bfloat16_computes_what_its_weights_say():
    model = make(CONFIG, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    tokens = some_tokens(LENGTHS[0])
    expected = logits_in_numpy(weights_of(model), tokens, CONFIG)
    serving = Serving(model)
    paged = serving.step(s0=21)["s0"]
    assert serving.hidden.dtype == jnp.bfloat16
    for logits in (dense(model, jnp.asarray(tokens[None]))[0], paged):
        assert logits.dtype == jnp.float32
        error = np.abs(np.asarray(logits) - expected)
        # Eight bits, several roundings a layer: a few hundredths of the logits' size.
        assert error.max() < 0.15 * expected.std()
        assert error.max() > 0


def test_rotary_angles_are_the_definition():
    config = replace(CONFIG, rope_factors=(1.0, 2.0, 4.0, 8.0))
    positions = np.array([[0, 1, 5], [100, 7, 127]], np.int32)
    rotary = Rotary.at(jnp.asarray(positions), config)
    # theta = 100, H = 8: frequencies 100 ** (0, -1/4, -1/2, -3/4).
    angles = positions[..., None] * np.array([1.0, 100**-0.25 / 2, 0.1 / 4, 100**-0.75 / 8])
    np.testing.assert_allclose(rotary.cos, np.cos(angles), atol=2e-5)
    np.testing.assert_allclose(rotary.sin, np.sin(angles), atol=2e-5)
    x = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    found = rotate(jnp.asarray(x), Rotary(rotary.cos[0], rotary.sin[0]))
    np.testing.assert_allclose(found, turned(x.astype(np.float64), positions[0], config), atol=1e-5)
    assert rotate(jnp.asarray(x, jnp.bfloat16), Rotary(rotary.cos[0], rotary.sin[0])).dtype == jnp.bfloat16


def test_only_the_distance_of_two_positions_matters():
    model = make(TIED)
    tokens = jnp.asarray(some_tokens(12)[None])
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    near = dense(model, tokens, positions=positions)
    np.testing.assert_allclose(dense(model, tokens, positions=positions + 50), near, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dense(model, tokens), near, rtol=1e-6, atol=1e-6)
    assert np.abs(dense(model, tokens, positions=2 * positions) - near).max() > 0.1


# Full size, by shapes alone.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_llama_3_8b_has_its_published_size(scan_layers):
    config = LlamaConfig(
        vocab_size=128256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        max_len=8192,
        rope_theta=500000.0,
        rope_factors=llama3_rope_factors(
            128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
        ),
    )

    def serve(tokens) -> Any:
        model = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan_layers=scan_layers)
        cache = KVCache.create(
            num_layers=32, num_blocks=1000, block_size=16, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16
        )
        batch = PagedBatch(
            block_tables=jnp.zeros((4, 512), jnp.int32),
            context_lens=jnp.zeros(4, jnp.int32),
            query_starts=jnp.zeros(5, jnp.int32),
            slot_mapping=tokens,
            num_decodes=jnp.int32(0),
            max_query_len=64,
        )
        hidden, cache = model.step(tokens, tokens, cache, batch)
        trained = model(tokens[None]) if scan_layers else None
        return jax.tree.leaves(model), hidden, (cache.keys, cache.values), model.logits(hidden[:4]), trained

    leaves, hidden, cache, logits, trained = jax.eval_shape(serve, jax.ShapeDtypeStruct((64,), jnp.int32))
    assert sum(leaf.size for leaf in leaves) == 8_030_261_248  # arXiv 2407.21783's 8B, by Meta's checkpoint
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert len(leaves) == (6 if scan_layers else 6 * 32) + 3
    assert (hidden.shape, hidden.dtype) == ((64, 4096), jnp.bfloat16)
    assert [pages.shape for pages in cache] == [(32, 1000, 16, 8, 128)] * 2
    assert (logits.shape, logits.dtype) == ((4, 128256), jnp.float32)
    if scan_layers:
        assert trained.shape == (1, 64, 128256)
