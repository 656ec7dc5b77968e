"""Dropout's random bits: a function of (seed, head, row, column), so that backward makes them again, never stores them.

The generator is counter-based in the sense of FlashAttention (arXiv 2205.14135, section 3.1 and appendix B.2): nothing
but the seed is kept. It is made of 32-bit multiplications, xors and shifts alone, the same in every backend.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

# Multipliers of the two-round xorshift-multiply bijection with the least known bias.
_M1, _M2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def batch_seeds(rng: Array, batch: int) -> UInt32[Array, "B 2"]:
    """A pair of seeds for each sequence of the batch, from a `jax.random` key."""
    return jax.random.bits(rng, (batch, 2), jnp.uint32)


def row_keys(seed0: Array, seed1: Array, head: Array, row: Array) -> tuple[Array, Array]:
    """Two uint32 keys for each row of a head; no two (head, row) of one seed share both.

    All arguments are uint32 and broadcast together.
    """
    of_row, of_head = _mix(row ^ seed0), _mix(head ^ seed1)
    first = _mix(of_row ^ of_head)
    return first, _mix(first + of_row)


def keep(key1: Array, key2: Array, column: Array, rate: float) -> Array:
    """Whether the entry of a row (by its keys) and a column (uint32) is kept: True with probability 1 - rate.

    The upper bits decide, which the last step of `_mix` would leave as they are; so that is left out.
    """
    x = column + key1
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))) * _M1
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 15)) ^ key2) * _M2
    return x >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: Array) -> Array:
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))) * _M1
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 15))) * _M2
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))
