"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split order of Hugging Face checkpoints."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels

from .config import LlamaConfig


class Rotary(NamedTuple):
    """The angles' cosine and sine for some positions, float32; the pair of dimension i is i + H / 2."""

    cos: Float[Array, "*B H_half"]
    sin: Float[Array, "*B H_half"]

    @classmethod
    def at(cls, positions: Int32[Array, "*B"], config: LlamaConfig) -> "Rotary":
        exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        frequencies = config.rope_theta**-exponents
        if config.rope_factors is not None:
            frequencies = frequencies / jnp.asarray(config.rope_factors, jnp.float32)
        angles = jnp.einsum("...,h->...h", positions.astype(jnp.float32), frequencies)
        return cls(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "*B heads H"], rotary: Rotary) -> Float[Array, "*B heads H"]:
    """Each head's pairs of dimensions turned by their angle, in float32."""
    return pallas_kernels.rotate(x, rotary.cos, rotary.sin)
