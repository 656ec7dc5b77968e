"""`flash_attention` as Flax's attention modules call it."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from .flash_attention import flash_attention


def flax_attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
) -> Array:
    """The `attention_fn` of `flax.nnx.MultiHeadAttention` and of Linen's `MultiHeadDotProductAttention`.

    Args:
      query: [..., T, N, H]; key, value: [..., S, K, H], with any number of batch dimensions.
      bias, mask: broadcast to [..., N, T, S]; a mask of numbers, as `make_causal_mask` gives, hides where it is 0.
      broadcast_dropout: either way each entry drops on its own: a mask shared by the batch would save nothing here.
      dropout_rng, dropout_rate, deterministic: dropout on the probabilities, unless deterministic.
      dtype: what the inputs are converted to; None promotes them together.

    Returns [..., T, N, H].

    Raises NotImplementedError where attention weights are to be sown (`module`), since they never exist as a whole,
    and where a `precision` is asked for; else as `flash_attention`.

    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(4, 32, attention_fn=flax_attention_fn, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 7, 32)), is_causal=True).shape
    (2, 7, 32)
    """
    if module is not None:
        raise NotImplementedError("flax_attention_fn: expected sow_weights=False: weights are never held whole")
    if precision is not None:
        raise NotImplementedError(f"flax_attention_fn: expected precision None, got {precision}")
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]

    def one_batch(x: Array) -> Array:
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    def scores(x: Array | None) -> Array | None:
        """bias or mask: one batch dimension, of 1 where all were."""
        if x is None or x.ndim <= 3:
            return x
        leading = x.shape[:-3]
        return one_batch(x if math.prod(leading) == 1 else jnp.broadcast_to(x, (*batch, *x.shape[-3:])))

    mask = None if mask is None else scores(mask.astype(jnp.bool_))
    dropping = dropout_rate > 0.0 and not deterministic
    out = flash_attention(
        one_batch(query),
        one_batch(key),
        one_batch(value),
        scores(bias),
        mask,
        is_causal=is_causal,
        dropout_rate=dropout_rate if dropping else 0.0,
        dropout_rng=dropout_rng if dropping else None,
    )
    return out.reshape(query.shape)
