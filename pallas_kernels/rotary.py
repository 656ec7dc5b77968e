"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split order of Hugging Face checkpoints."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "*B heads H"], cos: Float[Array, "*B H_half"], sin: Float[Array, "*B H_half"]
) -> Float[Array, "*B heads H"]:
    """Each head's pairs of dimensions, i and i + H / 2, turned by the angle whose cosine and sine are given, float32.

    Computed in float32; returned in x's dtype.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
