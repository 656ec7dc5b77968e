"""flax_attention_fn inside Flax's own modules, against their own attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import flash_attention, flax_attention_fn


def both(make):
    """The same nnx layer twice: with Flax's attention and with ours."""
    return make(nnx.dot_product_attention), make(flax_attention_fn)


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": "causal"}, {"mask": "padding"}], ids=str)
@pytest.mark.parametrize("batch", [(2,), (2, 3), ()], ids=str)
def test_nnx_gives_what_its_own_attention_gives(options: Any, batch):
    def make(attention_fn):
        return nnx.MultiHeadAttention(4, 32, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))

    x = inputs(*batch, 9, 32)
    if options.get("mask") == "causal":
        options = {"mask": nnx.make_causal_mask(x[..., 0])}
    elif options.get("mask") == "padding":
        valid = jnp.broadcast_to(jnp.arange(9) < 6, (*batch, 9))
        options = {"mask": nnx.make_attention_mask(jnp.ones_like(valid), valid)}
    if not batch:  # jax.nn takes no mask without a batch
        options = {}
    theirs, ours = both(make)
    np.testing.assert_allclose(ours(x, **options), theirs(x, **options), atol=2e-6)


def test_nnx_decodes_with_its_cache():
    def make(attention_fn):
        layer = nnx.MultiHeadAttention(4, 32, attention_fn=attention_fn, decode=True, rngs=nnx.Rngs(0))
        layer.init_cache((2, 5, 32))
        return layer

    theirs, ours = both(make)
    for step in range(5):
        x = inputs(2, 1, 32, seed=step)
        np.testing.assert_allclose(ours(x), theirs(x), atol=2e-6)


def test_nnx_dropout_drops_in_training_only():
    layer = nnx.MultiHeadAttention(
        4, 32, attention_fn=flax_attention_fn, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0)
    )
    x = inputs(2, 9, 32)
    plain = layer(x, deterministic=True)
    np.testing.assert_array_equal(layer(x, deterministic=True), plain)
    one, two = layer(x, deterministic=False), layer(x, deterministic=False)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3  # Flax draws a new key at each call


@pytest.mark.parametrize("masked", [False, True])
def test_linen_passes_its_mask(masked):
    x = inputs(2, 9, 32)
    mask = nn.make_causal_mask(x[..., 0]) if masked else None
    theirs = nn.MultiHeadDotProductAttention(4)
    ours = nn.MultiHeadDotProductAttention(4, attention_fn=flax_attention_fn)
    params = theirs.init(jax.random.key(0), x)
    found, expected = (jnp.asarray(layer.apply(params, x, mask=mask)) for layer in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_dtype_converts_and_none_promotes():
    q, kv = inputs(2, 5, 4, 8), inputs(2, 5, 2, 8, seed=1)
    assert flax_attention_fn(q, kv, kv, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        flax_attention_fn(q, kv, kv, is_causal=True), flash_attention(q, kv, kv, is_causal=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"module": object()}, "sow_weights=False"), ({"precision": "highest"}, "precision None, got highest")],
)
def test_what_it_cannot_do_is_said(options, message):
    q = inputs(2, 5, 4, 8)
    with pytest.raises(NotImplementedError, match=message):
        flax_attention_fn(q, q, q, **options)
